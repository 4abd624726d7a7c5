"""flash_attention against cases by hand, conservation laws, and the plain formula in float64."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import flash_attention, sharded_flash_attention
from kernels_pallas.attention import IMPLEMENTATIONS, implementations, xla
from kernels_pallas.attention.problem import Band, Problem, tile_counts

LN2 = math.log(2)
HAND = tuple(
    np.array(x, float).reshape(1, 3, 1, 1) for x in ((0, 1, 2), (0, LN2, 2 * LN2), (1, 10, 100))
)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed, *shapes, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def tiled(blocks, problem):
    """The loop over tiles of given sizes, as a differentiable function of (q, k, v)."""

    @jax.custom_vjp
    def attend(q, k, v):
        return xla.forward(problem, q, k, v, blocks=blocks)

    def forward(q, k, v):
        out = attend(q, k, v)
        return out, (q, k, v, *out)

    def backward(kept, gradients):
        q, k, v, out, lse = kept
        return xla.backward(
            problem, q, k, v, None, None, None, out, lse, *gradients,
            bias_gradient=False, blocks=blocks,
        )[:3]  # fmt: skip

    attend.defvjp(forward, backward)
    return attend


# By hand


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
    ("causal", "out", "sums", "dq", "dk", "dv"),
    [
        (
            False, (37, 60.142857, 78.142857), (3, 7, 21),
            (33 * LN2, 31.224490 * LN2, 20.326531 * LN2), (-15.795918, -40.285714, 56.081633),
            (0.523810, 0.809524, 1.666667),
        ),
        (
            True, (1, 7, 78.142857), (1, 3, 21),
            (0, 2 * LN2, 20.326531 * LN2), (-9.346939, -23.959184, 33.306122),
            (1.380952, 0.857143, 0.761905),
        ),
    ],
)  # fmt: skip
def test_three_tokens_by_hand(float64, implementation, causal, out, sums, dq, dk, dv):
    attend = functools.partial(
        flash_attention, scale=1.0, causal=causal, implementation=implementation, return_lse=True
    )
    (found, lse), pull = jax.vjp(attend, *map(jnp.asarray, HAND))
    gradients = pull((jnp.ones_like(found), jnp.zeros_like(lse)))
    np.testing.assert_allclose(found.ravel(), out, atol=1e-6)
    np.testing.assert_allclose(np.exp(lse.ravel()), sums, atol=1e-6)
    for found, expected in zip(gradients, (dq, dk, dv), strict=True):
        np.testing.assert_allclose(found.ravel(), expected, atol=1e-5)


def test_tile_counts_by_hand():
    causal = Band(right=0)
    assert tile_counts(4096, 4096, 128, 128, causal) == (528, 32)
    assert tile_counts(1024, 1024, 64, 64, causal) == (136, 16)
    assert tile_counts(1000, 700, 100, 100, Band()) == (70, 0)
    assert tile_counts(64, 100, 64, 64, Band()) == (2, 1)  # the last tile holds padding


@pytest.mark.parametrize(
    ("left", "right", "offset"),
    list(itertools.product((None, 0, 5), (None, 0, 3), (-9, 0, 4, 30))),
)
def test_tiles_of_a_band_are_those_of_its_matrix(left, right, offset):
    band, (rows, columns), (block_q, block_kv) = Band(left, right, offset), (23, 19), (5, 4)
    seen = np.broadcast_to(band.sees(np.arange(rows)[:, None], np.arange(columns)), (rows, columns))
    visited = masked = 0
    for i, j in itertools.product(range(0, rows, block_q), range(0, columns, block_kv)):
        tile = seen[i : i + block_q, j : j + block_kv]
        whole = tile.all() and tile.shape[1] == block_kv
        visited, masked = visited + tile.any(), masked + (tile.any() and not whole)
    assert tile_counts(rows, columns, block_q, block_kv, band) == (visited, masked)
    assert (band.transposed.sees(np.arange(columns)[:, None], np.arange(rows)) == seen.T).all()


# Laws


def test_conservation_laws(float64):
    q, k, v, dout = draw(0, (2, 13, 4, 8), (2, 17, 2, 8), (2, 17, 2, 5), (2, 13, 4, 5))
    (dlse,) = draw(1, (2, 4, 13))
    attend = functools.partial(flash_attention, causal=True, window=(6, 0), return_lse=True)
    _, pull = jax.vjp(attend, q, k, v)
    dq, dk, dv = pull((dout, jnp.zeros_like(dlse)))
    np.testing.assert_allclose(jnp.sum(dk, axis=1), 0, atol=1e-13)
    total = jnp.sum(dout.reshape(2, 13, 2, 2, 5), axis=(1, 3))
    np.testing.assert_allclose(jnp.sum(dv, axis=1), total, atol=1e-13)
    np.testing.assert_allclose(jnp.sum(q * dq), jnp.sum(k * dk), atol=1e-12)
    # The gradient of the sums' logarithms adds dlse to each row's total.
    _, dk, _ = pull((dout, dlse))
    by_head = jnp.einsum("bnt,btnd->bnd", dlse, q).reshape(2, 2, 2, 8).sum(axis=2) / math.sqrt(8)
    np.testing.assert_allclose(jnp.sum(dk, axis=1), by_head, atol=1e-12)


def test_invariances(float64):
    q, k, v, shift = draw(0, (1, 9, 2, 4), (1, 11, 2, 4), (1, 11, 2, 3), (4,))
    attend = functools.partial(flash_attention, scale=0.7, return_lse=True)
    out, lse = attend(q, k, v)
    moved, moved_lse = attend(q, k + shift, v)
    np.testing.assert_allclose(moved, out, atol=1e-13)
    np.testing.assert_allclose(moved_lse - lse, 0.7 * (q @ shift).swapaxes(1, 2), atol=1e-13)
    order = np.random.default_rng(1).permutation(11)
    np.testing.assert_allclose(attend(q, k[:, order], v[:, order])[0], out, atol=1e-13)
    np.testing.assert_allclose(attend(q, k, 3 * v)[0], 3 * out, atol=1e-13)
    equal, equal_lse = attend(q, jnp.ones_like(k), v)
    np.testing.assert_allclose(
        equal, jnp.broadcast_to(v.mean(axis=1), out.shape[1:])[None], atol=1e-13
    )
    np.testing.assert_allclose(equal_lse[0, 0], math.log(11) + 0.7 * q[0, :, 0].sum(-1), atol=1e-13)


def test_two_parts_of_the_keys_merge_to_the_whole_with_gradients(float64):
    q, k, v = draw(0, (1, 7, 2, 4), (1, 12, 2, 4), (1, 12, 2, 4))

    def merged(q, k, v):
        parts = [
            flash_attention(q, k[:, part], v[:, part], return_lse=True)
            for part in (slice(0, 5), slice(5, 12))
        ]
        lse = jnp.logaddexp(parts[0][1], parts[1][1])
        weigh = lambda out, own: jnp.exp(own - lse).swapaxes(1, 2)[..., None] * out
        return sum(weigh(*part) for part in parts), lse

    whole = functools.partial(flash_attention, return_lse=True)
    weights = draw(2, (1, 7, 2, 4), (1, 2, 7))
    loss = lambda f: lambda *a: sum(jnp.sum(w * x) for w, x in zip(weights, f(*a), strict=True))
    for found, expected in zip(merged(q, k, v), whole(q, k, v), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-13)
    found = jax.grad(loss(merged), (0, 1, 2))(q, k, v)
    for x, y in zip(found, jax.grad(loss(whole), (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)


@pytest.mark.parametrize("length", [47, 64])
def test_results_do_not_depend_on_the_tiles(length):
    q, k, v, dout = draw(0, *[(1, length, 2, 8)] * 4, dtype=np.float32)
    problem = Problem(0.35, Band(right=0))

    @functools.partial(jax.jit, static_argnums=0)
    def all_of(blocks, q, k, v, dout):
        (out, lse), pull = jax.vjp(tiled(blocks, problem), q, k, v)
        return out, lse, *pull((dout, jnp.zeros_like(lse)))

    results = [
        all_of(xla.Blocks(a, b, heads), q, k, v, dout)
        for a, b, heads in ((16, 16, 1), (16, 32, 2), (64, 16, 1), (32, 64, 2))
    ]
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_allclose(x, y, atol=3e-6)


def test_large_scores_do_not_overflow():
    q, k, v = draw(0, *[(1, 6, 1, 2)] * 3, dtype=np.float32)
    assert np.isfinite(flash_attention(1e4 * q, k, v, scale=1.0)).all()
    k = jnp.zeros((1, 6, 1, 2)).at[0, 4, 0, 0].set(100)
    out = flash_attention(jnp.ones((1, 6, 1, 2)), k, v, scale=1.0)
    np.testing.assert_allclose(out, jnp.broadcast_to(v[:, 4:5], out.shape), atol=1e-6)


# Against the plain formula

CASES = {
    "plain": ({}, None),
    "causal": ({"causal": True}, None),
    "causal, top left": ({"causal": True, "causal_align": "top_left"}, None),
    "window": ({"window": (7, 3), "causal_align": "top_left"}, None),
    "window of one side, softcap": ({"window": (None, 2), "softcap": 1.5}, None),
    "segments": ({"causal": True, "segments": True}, None),
    "bias": ({"softcap": 2.0}, (2, 6, 37, 53)),
    "bias of heads and keys": ({"causal": True}, (1, 6, 1, 53)),
    "bias of queries, segments": ({"segments": True, "window": 9}, (2, 1, 37, 1)),
}


def arguments(options, bias, seed=0, dtype=np.float64):
    q, k, v = draw(seed, (2, 37, 6, 8), (2, 53, 2, 8), (2, 53, 2, 5), dtype=dtype)
    options = dict(options)
    if options.pop("segments", False):
        rng = np.random.default_rng(seed)
        ids = (np.sort(rng.integers(0, 4, (2, n)), axis=1) for n in (37, 53))
        options["segment_ids"] = tuple(map(jnp.asarray, ids))
    values = [q, k, v] + ([] if bias is None else draw(seed + 1, bias, dtype=dtype))
    return values, options


def everything(values, options, weights):
    """Output, logarithms of sums, and gradients of all arguments."""

    def attend(q, k, v, bias=None):
        return flash_attention(q, k, v, bias=bias, return_lse=True, **options)

    @jax.jit
    def compute(*values):
        (out, lse), pull = jax.vjp(attend, *values)
        dlse = jnp.where(jnp.isfinite(lse), weights[1], 0).astype(lse.dtype)
        return out, lse, *pull((weights[0].astype(out.dtype), dlse))

    return compute(*values)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_formula(float64, case, monkeypatch):
    monkeypatch.setattr(xla, "choose_blocks", lambda *_, **__: xla.Blocks(16, 8, 2))
    values, options = arguments(*CASES[case])
    weights = draw(9, (2, 37, 6, 5), (2, 6, 37))
    found = everything(values, {**options, "implementation": "xla"}, weights)
    expected = everything(values, {**options, "implementation": "reference"}, weights)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-9)


def test_the_reference_is_numpys_formula(float64):
    values, options = arguments(*CASES["bias of queries, segments"])
    q, k, v, bias = map(np.asarray, values)
    k, v = (np.repeat(x, 3, axis=2) for x in (k, v))
    scores = np.einsum("btnd,bsnd->bnts", q, k) / math.sqrt(8) + bias
    place = np.arange(53) - np.arange(37)[:, None] - (53 - 37)
    ids = [np.asarray(x) for x in options["segment_ids"]]
    seen = (abs(place) <= 9) & (ids[0][:, None, :, None] == ids[1][:, None, None, :])
    weights = np.where(seen, np.exp(scores), 0)
    total = weights.sum(axis=-1)
    out = np.einsum("bnts,bsne->btne", weights / np.where(total, total, 1)[..., None], v)
    found, lse = flash_attention(
        *values[:3], bias=values[3], return_lse=True, implementation="reference", **options
    )
    np.testing.assert_allclose(found, out, atol=1e-12)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(total), atol=1e-12)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_queries_that_see_nothing(implementation):
    q, k, v, dout = draw(
        0, (1, 8, 2, 4), (1, 5, 2, 4), (1, 5, 2, 4), (1, 8, 2, 4), dtype=np.float32
    )
    attend = functools.partial(
        flash_attention, causal=True, implementation=implementation, return_lse=True
    )
    (out, lse), pull = jax.vjp(attend, q, k, v)  # bottom right: three queries see no key
    dq, dk, dv = pull((dout, jnp.ones_like(lse)))
    assert (np.asarray(out[:, :3]) == 0).all() and (np.asarray(lse[:, :, :3]) == -np.inf).all()
    assert (np.asarray(dq[:, :3]) == 0).all()
    assert all(np.isfinite(x).all() for x in (out, lse[:, :, 3:], dq, dk, dv))
    nothing = flash_attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert (np.asarray(nothing[0]) == 0).all() and (np.asarray(nothing[1]) == -np.inf).all()
    hidden = flash_attention(q, k, v, bias=jnp.full((5,), -jnp.inf), implementation=implementation)
    assert (np.asarray(hidden) == 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_errs_no_more_than_the_formula_in_it(dtype):
    q, k, v = draw(0, *[(1, 200, 2, 64)] * 3, dtype=np.float32)
    weights = draw(9, (1, 200, 2, 64), (1, 2, 200), dtype=np.float32)
    weights[1] *= 0
    narrow = [x.astype(dtype) for x in (q, k, v)]
    options = {"causal": True}
    exact = everything([x.astype(np.float32) for x in narrow], options, weights)
    plain, found = (
        everything(narrow, {**options, "implementation": name}, weights)
        for name in ("reference", "xla")
    )
    error = lambda xs: [
        float(np.max(np.abs(np.asarray(x - y, float)))) for x, y in zip(xs, exact, strict=True)
    ]
    for i, (of_plain, of_found) in enumerate(zip(error(plain), error(found), strict=True)):
        assert of_found <= (2 if i < 2 else 3) * max(of_plain, 1e-6)
    assert found[0].dtype == dtype and found[1].dtype == jnp.float32


def test_it_is_jaxs_attention():
    q, k, v = draw(0, (2, 33, 4, 32), (2, 33, 2, 32), (2, 33, 2, 32), dtype=np.float32)
    for ours, theirs in (
        ({}, {}),
        ({"causal": True}, {"is_causal": True}),
        ({"window": (5, 2), "scale": 0.3}, {"local_window_size": (5, 2), "scale": 0.3}),
    ):
        expected = jax.nn.dot_product_attention(q, k, v, **theirs)
        np.testing.assert_allclose(flash_attention(q, k, v, **ours), expected, atol=2e-6)
    one = flash_attention(q[0], k[0], v[0], causal=True, return_lse=True)
    whole = flash_attention(q, k, v, causal=True, return_lse=True)
    for x, y in zip(one, whole, strict=True):
        np.testing.assert_allclose(x, y[0], atol=1e-6)


# Under transformations


def test_vmap_and_checkpoint(float64):
    q, k, v = draw(0, (3, 2, 9, 4, 8), (3, 2, 9, 2, 8), (3, 2, 9, 2, 8))
    (bias,) = draw(1, (3, 1, 4, 9, 9))
    attend = lambda q, k, v, bias: flash_attention(q, k, v, bias=bias, causal=True)
    loss = lambda *xs: jnp.sum(jnp.sin(attend(*xs)))
    gradients = jax.grad(loss, (0, 1, 2, 3))
    found = jax.jit(jax.vmap(gradients))(q, k, v, bias)
    again = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss), (0, 1, 2, 3))))(q, k, v, bias)
    each = [gradients(*xs) for xs in zip(q, k, v, bias, strict=True)]
    for i in range(4):
        expected = np.stack([one[i] for one in each])
        np.testing.assert_allclose(found[i], expected, atol=1e-12)
        np.testing.assert_allclose(again[i], expected, atol=1e-12)
    twice = jax.vmap(jax.vmap(lambda q, k, v: flash_attention(q, k, v)))(q, k, v)
    np.testing.assert_allclose(twice[1], flash_attention(q[1], k[1], v[1]), atol=1e-12)


def test_a_gradient_of_the_bias_is_made_only_where_it_is_wanted():
    q, k, v = draw(0, *[(1, 64, 2, 8)] * 3, dtype=np.float32)
    bias = jnp.zeros((1, 2, 64, 64))
    loss = lambda q, bias: jnp.sum(flash_attention(q, k, v, bias=bias))
    size = lambda f: str(jax.make_jaxpr(f)(q, bias)).count("scatter-add")
    assert size(jax.grad(loss)) < size(jax.grad(loss, (0, 1)))


@pytest.mark.parametrize("kv_heads", [4, 3, 1])
@pytest.mark.parametrize("kind", ["auto", "explicit", "manual"])
def test_over_a_mesh_of_eight_devices(kind, kv_heads, monkeypatch):
    monkeypatch.setattr(xla, "choose_blocks", lambda *_, **__: xla.Blocks(16, 16, 1))
    heads = 12 if kv_heads == 3 else 8
    q, k, v = draw(0, (4, 21, heads, 8), *[(4, 21, kv_heads, 8)] * 2, dtype=np.float32)
    (bias,) = draw(1, (1, heads, 21, 21), dtype=np.float32)
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (4, 21)), axis=1))
    options = {"causal": True, "segment_ids": ids}
    plain = lambda q, k, v, bias: flash_attention(q, k, v, bias=bias, **options)
    loss = lambda f: lambda *xs: jnp.sum(jnp.sin(f(*xs)))
    expected = jax.value_and_grad(loss(plain), (0, 1, 2, 3))(q, k, v, bias)
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=types)
    split = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))
    values = [
        split(q, "data", None, "model"), split(k, "data"), split(v, "data"),
        split(bias, None, "model"),
    ]  # fmt: skip
    if kind == "auto":
        attend = sharded_flash_attention(batch="data", heads="model", mesh=mesh)
        of = lambda q, k, v, bias: attend(q, k, v, bias=bias, **options)
    elif kind == "explicit":
        of = plain
    else:  # a shard_map of the caller's own over the batch; the rest of the mesh stays automatic
        inner = sharded_flash_attention(batch="data", heads="model")

        def attend(q, k, v, bias, ids):  # in a scan, as of layers
            once = lambda x, _: (inner(x, k, v, bias=bias, causal=True, segment_ids=ids), None)
            return jax.lax.scan(once, q, length=1)[0]

        over = jax.shard_map(
            attend, mesh=mesh, axis_names={"data"}, out_specs=P("data"),
            in_specs=(P("data"), P("data"), P("data"), P(), P("data")),
        )  # fmt: skip
        of = lambda q, k, v, bias: over(q, k, v, bias, ids)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(loss(of), (0, 1, 2, 3)))(*values)
        text = jax.jit(of).lower(*values).compile().as_text()
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-5)
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all"))


# The choice, and bad input


def test_the_choice_and_its_reasons():
    q = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.float32)
    found = implementations(q, q, q, causal=True)
    assert list(found) == list(IMPLEMENTATIONS) and found["xla"] == "chosen"
    assert found["mosaic_tpu"].startswith("it runs on TPUs")
    assert implementations(q, q, q, implementation="reference")["reference"] == "chosen"


GOOD = {"q": (2, 5, 4, 8), "k": (2, 7, 2, 8), "v": (2, 7, 2, 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (5, 4, 8, 1, 1)}, r"q \(5, 4, 8, 1, 1\): \[batch, length, heads, size\]"),
        ({"k": (1, 7, 2, 8)}, "their batches differ"),
        ({"k": (2, 7, 2, 4)}, "heads of size 8 are needed"),
        ({"v": (2, 6, 2, 8)}, r"v \(2, 6, 2, 8\): length and heads of k"),
        ({"k": (2, 7, 3, 8), "v": (2, 7, 3, 8)}, "q has 4 heads, which do not divide by the 3"),
        ({"v": (2, 7, 2, 0)}, "or of size 0"),
        ({"dtype": jnp.int32}, "q is int32; one of float16"),
        ({"k_dtype": jnp.bfloat16}, "k is bfloat16, q is float32"),
        ({"window": -1}, "window=-1: .* from 0 on"),
        ({"window": (3, -2)}, r"window=\(3, -2\)"),
        ({"window": (1, 2, 3)}, "window="),
        ({"window": 1.5}, "window=1.5"),
        ({"softcap": 0.0}, "softcap=0.0: a positive number"),
        ({"scale": math.nan}, "scale=nan: a finite number"),
        ({"causal_align": "left"}, "causal_align='left': one of bottom_right, top_left"),
        ({"causal": 1}, "causal=1"),
        ({"bias": (2, 3, 5, 7)}, r"bias \(2, 3, 5, 7\) does not broadcast to .* \(2, 4, 5, 7\)"),
        ({"segment_ids": (2, 5)}, r"segment_ids of k \(2, 5\): \(2, 7\) is needed"),
        ({"implementation": "cuda"}, "implementation='cuda': one of mosaic_gpu, mosaic_tpu"),
    ],
)
def test_bad_input_is_told_while_tracing(change, message):
    shapes = {name: change.get(name, shape) for name, shape in GOOD.items()}
    dtype = change.get("dtype", jnp.float32)
    q, k, v = (jax.ShapeDtypeStruct(shapes[n], dtype) for n in "qkv")
    k = jax.ShapeDtypeStruct(k.shape, change.get("k_dtype", k.dtype))
    options = {n: x for n, x in change.items() if n not in (*GOOD, "dtype", "k_dtype")}
    given = {"bias": jnp.float32, "segment_ids": jnp.int32}
    arrays = {n: jax.ShapeDtypeStruct(options.pop(n), d) for n, d in given.items() if n in options}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda q, k, v, kw: flash_attention(q, k, v, **options, **kw), q, k, v, arrays
        )


def test_segments_and_bias_of_wrong_dtypes():
    q = jnp.zeros((1, 3, 1, 4))
    with pytest.raises(ValueError, match="segment_ids of q are float32; integers"):
        flash_attention(q, q, q, segment_ids=jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="bias is bool; a floating dtype"):
        flash_attention(q, q, q, bias=jnp.ones((3, 3), bool))
    with pytest.raises(ValueError, match="segment_ids: 3 arrays"):
        flash_attention(q, q, q, segment_ids=(jnp.zeros((1, 3), int),) * 3)


def test_an_implementation_that_cannot_serve_says_why():
    q = jnp.zeros((1, 3, 1, 4), jnp.float16)
    with pytest.raises(NotImplementedError, match="'mosaic_tpu': TPU kernels serve float32 and"):
        flash_attention(q, q, q, implementation="mosaic_tpu")


def test_a_split_length_is_refused():
    mesh = jax.make_mesh((8,), ("data",))
    q = jnp.zeros((1, 16, 1, 4))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="not its length"):
        flash_attention(jax.sharding.reshard(q, P(None, "data")), q, q)


# What a reader tried


@pytest.mark.parametrize("bias_dtype", [jnp.bfloat16, jnp.float32])
def test_gradients_have_the_dtypes_of_their_arguments(bias_dtype):
    q, k, v = draw(0, (1, 7, 4, 8), (1, 11, 2, 8), (1, 11, 2, 5), dtype=jnp.bfloat16)
    bias = jnp.zeros((4, 7, 11), bias_dtype)
    loss = lambda q, k, v, bias: jnp.sum(flash_attention(q, k, v, bias=bias).astype(jnp.float32))
    found = jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias)
    assert [x.dtype for x in found] == [x.dtype for x in (q, k, v, bias)]


def test_windows_beyond_all_keys_are_none():
    q, k, v = draw(0, (1, 7, 1, 8), (1, 11, 1, 8), (1, 11, 1, 8), dtype=np.float32)
    whole = flash_attention(q, k, v)
    for size in (18, 2**31 - 1, 2**31, 2**70, np.int64(2**40)):
        np.testing.assert_array_equal(flash_attention(q, k, v, window=size), whole)


def test_nothing_to_attend_and_nobody_who_does():
    q = jnp.ones((2, 7, 4, 8))
    for part in (q[:0], q[:, :0]):
        assert flash_attention(part, part, part).shape == part.shape
        assert jax.grad(lambda x: jnp.sum(flash_attention(x, x, x)))(part).shape == part.shape
    assert flash_attention(q[:, :0], q, q).shape == (2, 0, 4, 8)


def test_calls_outside_of_jit_are_compiled_once():
    q = jnp.ones((1, 16, 2, 8))
    step = jax.grad(lambda q: jnp.sum(flash_attention(q, q, q, causal=True)))
    step(q)
    compiled = []
    listen = lambda name, *_, **about: "compile" in name and compiled.append((name, about))
    jax.monitoring.register_event_duration_secs_listener(listen)
    step(q + 1)
    # Tracing and compiling of the loops takes most of a second; what is left are single operations.
    assert not any("scan" in str(about) or "while" in str(about) for _, about in compiled)


def test_numpy_arrays_and_numbers():
    q = np.ones((1, 6, 2, 4), np.float32)
    ids = np.array([[0, 0, 0, 1, 1, 1]])
    options = {"scale": np.float32(0.5), "window": np.int64(2), "causal": np.bool_(True)}
    found = flash_attention(q, q, q, segment_ids=ids, **options)
    np.testing.assert_allclose(found, q, atol=1e-6)
    one = flash_attention(q[0], q[0], q[0], segment_ids=ids[0], **options)
    np.testing.assert_allclose(one, q[0], atol=1e-6)
    with pytest.raises(ValueError, match="segment_ids holds None"):
        flash_attention(q, q, q, segment_ids=(None, ids))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_what_is_not_a_number_stays_that(implementation):
    q = jnp.ones((1, 6, 1, 4)).at[0, 3].set(jnp.nan)
    options = {"implementation": implementation, "return_lse": True}
    out, lse = flash_attention(q, jnp.ones_like(q), jnp.ones_like(q), **options)
    assert np.isnan(out[0, 3]).all() and np.isnan(lse[0, 0, 3])
    assert np.isfinite(out[0, :3]).all()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("value", [-np.inf, -1e30, np.finfo(np.float32).min])
def test_a_bias_that_is_a_mask(implementation, value):
    q, k, v = draw(0, *[(1, 5, 1, 4)] * 3, dtype=np.float32)
    bias = jnp.zeros((5, 5)).at[0].set(value).at[:, 3].set(value)
    found = flash_attention(q, k, v, bias=bias, implementation=implementation)
    keep = jnp.array([0, 1, 2, 4])
    expected = flash_attention(q, k[:, keep], v[:, keep]).at[:, 0].set(0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_arrays_of_explicit_types_are_brought_together():
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    q, k, v = draw(0, (2, 9, 4, 8), (2, 9, 4, 8), (2, 9, 4, 8), dtype=np.float32)
    expected = flash_attention(q, k, v, causal=True)
    put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))
    for specs in (
        ((), ("data",), (None, None, "model")),
        (("data",), (), ("data", None, "model")),
        (("data",), (None, None, "data"), ()),  # one axis for two things: the batch has it
    ):
        given = [put(x, *spec) for x, spec in zip((q, k, v), specs, strict=True)]
        found = jax.jit(functools.partial(flash_attention, causal=True))(*given)  # no set_mesh
        np.testing.assert_allclose(found, expected, atol=1e-6)
        with jax.set_mesh(mesh):
            found = flash_attention(*given, causal=True)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_explicit_axis_beside_an_automatic_one():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit))
    (q,) = draw(0, (4, 9, 4, 8), dtype=np.float32)
    attend = sharded_flash_attention(batch="data")
    with jax.set_mesh(mesh):
        split = jax.device_put(q, jax.NamedSharding(mesh, P(None, None, "model")))
        found = jax.jit(lambda q: attend(q, q, q))(split)
    np.testing.assert_allclose(found, flash_attention(q, q, q), atol=1e-6)


def test_the_mesh_that_is_given_and_axes_that_do_not_divide():
    auto = lambda *names: jax.make_mesh((8,), names, axis_types=(AxisType.Auto,))
    attend = sharded_flash_attention(batch="data", heads="data", mesh=auto("data"))
    q = jnp.ones((8, 4, 1, 4))
    assert "shard_map" in str(jax.make_jaxpr(attend)(q, q, q))
    with jax.set_mesh(auto("other")), pytest.raises(ValueError, match="should match the mesh"):
        attend(q, q, q)
    assert "shard_map" not in str(jax.make_jaxpr(attend)(q[:3], q[:3], q[:3]))
    np.testing.assert_allclose(attend(q[0], q[0], q[0]), q[0])


def test_reasons_for_three_dimensions_and_a_bias():
    q = jax.ShapeDtypeStruct((8, 2, 4), jnp.float16)
    bias = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    found = implementations(q, q, q, bias=bias, implementation="mosaic_tpu", return_lse=True)
    assert "chosen" not in found.values() and found["xla"] == "can serve"
