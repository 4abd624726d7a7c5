"""What holds for every codec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rlib.compression import (
    Identity,
    LowRank,
    NaturalCompression,
    RandK,
    ScaledSign,
    StochasticQuantization,
    TopK,
    decode_tree,
    encode_tree,
    payload_bytes,
)

CODECS = [
    Identity(),
    ScaledSign(),
    TopK(fraction=0.1),
    RandK(fraction=0.1),
    RandK(fraction=0.1, unbiased=True, seeded=True),
    StochasticQuantization(3),
    NaturalCompression(),
    LowRank(2),
]
#: Further constants, of code that the above run through already.
MORE = [
    ScaledSign(scale="l1"),
    RandK(fraction=0.1, unbiased=True),
    StochasticQuantization(2),
    StochasticQuantization(8),
]
KEY = jax.random.key(0)
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)


encode = jax.jit(lambda codec, key, x: codec.encode(key, x), static_argnums=0)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def eager(codec, key, x):
    return codec.decode(codec.encode(key, x), x)


compress = jax.jit(eager, static_argnums=0)
many = jax.jit(
    lambda codec, keys, x: jax.vmap(lambda k: eager(codec, k, x))(keys), static_argnums=0
)


def each(codec, keys, x):
    return np.stack([compress(codec, k, row) for k, row in zip(keys, x, strict=True)])


def bytes_of(codec, shape, dtype=jnp.float32):
    x = jax.ShapeDtypeStruct(shape, dtype)
    return payload_bytes(jax.eval_shape(codec.encode, KEY, x))


def vectors():
    """Random, spiky, flat and heavy-tailed vectors of 60 coordinates."""
    rng = np.random.default_rng(0)
    rows = [
        rng.standard_normal(60),
        np.eye(60)[17],
        -np.ones(60),
        rng.standard_normal(60) ** 5,
        np.where(np.arange(60) < 3, 1.0, 1e-3),
        1.5 * 2.0 ** rng.integers(-3, 4, 60),
        1e-6 * rng.standard_normal(60),
    ]
    return np.stack(rows).astype(np.float32)


# Cost: hand counts.


@pytest.mark.parametrize(
    ("codec", "shape", "expected"),
    [
        (Identity(), (10, 10), 400),
        (ScaledSign(), (10, 10), 13 + 4),
        (ScaledSign(), (1024,), 128 + 4),
        (ScaledSign(), (1025,), 256 + 4),  # 129 bytes, filled to two rows
        (ScaledSign(), (10_240_000,), 1_280_000 + 4),
        (TopK(k=10), (256,), 10 * (4 + 1)),
        (TopK(k=10), (257,), 10 * (4 + 2)),
        (TopK(fraction=0.01), (10_000_000,), 100_000 * (4 + 4)),
        (RandK(k=10), (1000,), 10 * (4 + 2)),
        (RandK(k=10, seeded=True), (1000,), 10 * 4 + 4),
        (StochasticQuantization(2), (100,), 25 + 4),
        (StochasticQuantization(3), (100,), 38 + 4),
        (StochasticQuantization(4), (1024, 1024), 1024 * 1024 // 2 + 4),
        (StochasticQuantization(8), (5001,), 5001 + 4),
        (NaturalCompression(), (100,), 100 + 13),
        (NaturalCompression(), (8192,), 8192 * 9 // 8),
        (LowRank(2), (100, 50), 4 * 2 * (100 + 50)),
        (LowRank(2), (100,), 400),
    ],
    ids=str,
)
def test_cost_by_hand(codec, shape, expected):
    assert bytes_of(codec, shape) == expected


def test_values_travel_in_their_own_dtype():
    assert bytes_of(TopK(k=10), (256,), jnp.bfloat16) == 10 * (2 + 1)
    assert bytes_of(Identity(), (256,), jnp.bfloat16) == 512
    assert bytes_of(ScaledSign(), (256,), jnp.bfloat16) == 32 + 4


@every_codec
def test_cost_without_running_is_the_real_one(codec):
    shape = (60, 50)
    payload = encode(codec, KEY, np.ones(shape, np.float32))
    assert bytes_of(codec, shape) == sum(np.asarray(x).nbytes for x in jax.tree.leaves(payload))


# Form.


@every_codec
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(), (7,), (12, 9), (3, 5, 100)])
def test_shape_and_dtype_come_back(codec, dtype, shape):
    like = jax.ShapeDtypeStruct(shape, dtype)
    payload = jax.eval_shape(codec.encode, KEY, like)
    out = jax.eval_shape(lambda payload: codec.decode(payload, like), payload)
    assert out.shape == shape and out.dtype == dtype


@every_codec
def test_half_precision_is_the_rounded_float32(codec):
    x = normal(12, 9).astype(jnp.bfloat16)
    wide = np.asarray(compress(codec, KEY, x.astype(np.float32)))
    np.testing.assert_array_equal(compress(codec, KEY, x), wide.astype(jnp.bfloat16))


@every_codec
def test_empty_arrays(codec):
    shape = (3, 0)
    out = compress(codec, KEY, np.ones(shape, np.float32))
    assert out.shape == shape
    assert bytes_of(codec, shape) <= 4  # a scale or a seed at most


@every_codec
def test_jit_and_vmap_and_scan_equal_one_by_one(codec):
    x = normal(4, 12, 9)
    keys = jax.random.split(KEY, 4)
    one = each(codec, keys, x)
    together = jax.jit(jax.vmap(lambda k, row: eager(codec, k, row)))(keys, x)
    np.testing.assert_allclose(together, one, rtol=1e-5, atol=1e-5)
    _, scanned = jax.lax.scan(lambda c, kx: (c, eager(codec, *kx)), 0, (keys, x))
    np.testing.assert_allclose(scanned, one, rtol=1e-5, atol=1e-5)


@every_codec
def test_mean_over_eight_devices_by_gathering_payloads(codec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, keys = normal(8, 12, 9), jax.random.split(KEY, 8)

    def mean(keys, x):
        payload = codec.encode(keys[0], x[0])
        payloads = jax.tree.map(lambda p: jax.lax.all_gather(p, "data", to="invarying"), payload)
        return jax.vmap(lambda p: codec.decode(p, x[0]))(payloads).mean(0)

    specs = {"in_specs": (P("data"), P("data")), "out_specs": P()}
    gathered = jax.jit(jax.shard_map(mean, mesh=mesh, **specs))(keys, x)
    one = each(codec, keys, x).mean(0)
    np.testing.assert_allclose(gathered, one, rtol=1e-5, atol=1e-5)


@every_codec
def test_codecs_are_values(codec):
    assert hash(codec) == hash(type(codec)(**vars(codec))) and codec == type(codec)(**vars(codec))
    assert payload_bytes(encode(codec, KEY, np.ones(60, np.float32))) == bytes_of(codec, (60,))


@every_codec
def test_integers_are_refused(codec):
    with pytest.raises(TypeError, match="floating dtype, and this one is int32"):
        codec.encode(KEY, np.ones((12, 9), np.int32))


@pytest.mark.parametrize("codec", [RandK(k=2), StochasticQuantization(4), NaturalCompression()])
def test_a_missing_key_is_named(codec):
    with pytest.raises(ValueError, match=f"{type(codec).__name__}.*needs a key"):
        codec.encode(None, np.ones(5, np.float32))


# Constants: E||C(u) - u||^2 over 4000 keys, each bound with 5 standard errors of that mean.

SAMPLES = 4000


def samples(codec, u):
    return np.asarray(many(codec, jax.random.split(KEY, SAMPLES), u), np.float64)


def assert_mean_error_within(out, u, factor):
    error = np.sum((out - u) ** 2, axis=(1, *range(2, out.ndim))) / np.sum(np.float64(u) ** 2)
    slack = 5 * error.std() / np.sqrt(SAMPLES) + 1e-5
    assert error.mean() <= factor + slack
    return error.mean()


@pytest.mark.parametrize(
    "codec", [c for c in CODECS + MORE if c.contraction((60,)) is not None], ids=str
)
def test_contraction_constant(codec):
    for u in vectors():
        assert_mean_error_within(samples(codec, u), u, 1 - codec.contraction((60,)))


def test_contraction_constant_of_low_rank_is_reached_by_the_identity():
    codec, rng = LowRank(2), np.random.default_rng(0)
    orthogonal = np.linalg.qr(rng.standard_normal((9, 9)))[0].astype(np.float32)
    spiky = np.outer(np.eye(12)[0], np.eye(9)[0]).astype(np.float32)
    for m in (rng.standard_normal((12, 9)).astype(np.float32), spiky, orthogonal):
        error = assert_mean_error_within(samples(codec, m), m, 1 - codec.contraction(m.shape))
    assert error == pytest.approx(1 - 2 / 9, abs=1e-4)  # equality for an orthogonal matrix


@pytest.mark.parametrize(("codec", "tight"), [(TopK(k=6), -np.ones(60)), (RandK(k=6), np.ones(60))])
def test_sparse_constants_are_reached(codec, tight):
    error = assert_mean_error_within(samples(codec, np.float32(tight)), tight, 0.9)
    assert error == pytest.approx(0.9, abs=1e-6)


UNBIASED = [c for c in CODECS + MORE if c.variance((60,)) is not None]


def test_which_codecs_are_unbiased():
    assert {type(c) for c in UNBIASED} == {
        Identity,
        RandK,
        StochasticQuantization,
        NaturalCompression,
    }
    assert all(c.contraction((60,)) is None for c in UNBIASED if c != Identity())


@pytest.mark.parametrize("codec", UNBIASED, ids=str)
def test_unbiased_with_the_stated_variance(codec):
    for u in vectors():
        out = samples(codec, u)
        # 5 standard errors of the mean of 4000 samples; Bernstein's second term at the same level,
        # 2/3 * 12.5 * largest / samples, for coordinates that are seldom sent; float32 rounding.
        slack = 5 * out.std(0) / np.sqrt(SAMPLES) + 8.4 * np.abs(out).max() / SAMPLES
        assert np.all(np.abs(out.mean(0) - u) <= slack + 1e-6 * np.abs(u).max())
        assert_mean_error_within(out, u, codec.variance((60,)))


def test_natural_variance_is_reached():
    # Worst mantissa: 4/3, where (m - 1)(2 - m) / m^2 = 1/8.
    u = np.full(60, 4 / 3, np.float32)
    error = assert_mean_error_within(samples(NaturalCompression(), u), u, 1 / 8)
    assert error == pytest.approx(1 / 8, abs=2e-3)


def test_unbiased_rand_k_variance_is_exact():
    codec, u = RandK(k=6, unbiased=True), np.ones(60, np.float32)
    assert codec.variance((60,)) == pytest.approx(9)
    assert assert_mean_error_within(samples(codec, u), u, 9) == pytest.approx(9, rel=1e-5)


# Trees.

TREE = {
    "a": np.float32([[3, -4]]),
    "b": np.float32([1, -2, 2, 0]),
    "c": np.float32(5),
}


def test_a_scale_per_leaf_or_one_for_all():
    codec = ScaledSign()
    leaf = decode_tree(codec, encode_tree(codec, None, TREE), TREE)
    np.testing.assert_allclose(leaf["a"], [[3.535534, -3.535534]], rtol=1e-6)
    np.testing.assert_allclose(leaf["b"], [1.5, -1.5, 1.5, 1.5], rtol=1e-6)
    payloads = encode_tree(codec, None, TREE, scope="global")
    assert payload_bytes(payloads) == 1 + 4
    like = jax.eval_shape(lambda: TREE)
    out = decode_tree(codec, payloads, like, scope="global")
    s = np.sqrt((25 + 9 + 25) / 7)
    np.testing.assert_allclose(out["a"], [[s, -s]], rtol=1e-6)
    np.testing.assert_allclose(out["b"], [s, -s, s, s], rtol=1e-6)
    assert out["c"].shape == ()


def test_global_top_k_is_another_algorithm():
    out = decode_tree(
        TopK(k=2), encode_tree(TopK(k=2), None, TREE, scope="global"), TREE, scope="global"
    )
    assert out["a"].tolist() == [[0, -4]] and out["b"].tolist() == [0, 0, 0, 0] and out["c"] == 5


def test_leaves_draw_from_different_keys():
    twins = {"a": jnp.ones(100), "b": jnp.ones(100)}
    a, b = encode_tree(RandK(k=10), KEY, twins)
    assert set(a.indices.tolist()) != set(b.indices.tolist())


def test_trees_of_mixed_dtypes_and_empty_trees():
    tree = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.full(2, 1 / 3)}
    for scope in ("leaf", "global"):
        out = decode_tree(
            Identity(), encode_tree(Identity(), None, tree, scope=scope), tree, scope=scope
        )
        assert out["a"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(out["b"], tree["b"])
        assert (
            decode_tree(Identity(), encode_tree(Identity(), KEY, {}, scope=scope), {}, scope=scope)
            == {}
        )
    with pytest.raises(ValueError, match="'layer'"):
        encode_tree(Identity(), None, tree, scope="layer")
