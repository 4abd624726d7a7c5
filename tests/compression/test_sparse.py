import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlib.compression import RandK, SeededPayload, TopK

encode = jax.jit(lambda codec, key, x: codec.encode(key, x), static_argnums=0)
decode = jax.jit(lambda codec, payload, x: codec.decode(payload, x), static_argnums=0)
RANDK = [RandK(k=3), RandK(k=3, unbiased=True, seeded=True)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_top_k_keeps_the_largest_exactly(dtype):
    u = jnp.asarray(np.random.default_rng(0).standard_normal((30, 40)), dtype)
    payload = TopK(fraction=0.1).encode(None, u)
    # A stable sort in NumPy is the oracle; in bfloat16 there are many ties.
    order = np.argsort(-np.abs(np.asarray(u, np.float64)).ravel(), kind="stable")[:120]
    np.testing.assert_array_equal(payload.indices, order)
    assert payload.values.dtype == dtype
    out = np.asarray(TopK(fraction=0.1).decode(payload, u)).ravel()
    np.testing.assert_array_equal(out[order], np.asarray(u).ravel()[order])
    assert np.count_nonzero(out) == 120


def test_top_k_ties_go_to_the_lowest_index():
    u = np.float32([0.0, 2.0, -2.0, 2.0, -2.0, 1.0])
    assert encode(TopK(k=3), None, u).indices.tolist() == [1, 2, 3]
    assert encode(TopK(k=700), None, -np.ones(5000, np.float32)).indices.tolist() == list(
        range(700)
    )
    assert encode(TopK(k=2), None, np.float32([-0.0, 0.0, -0.0])).indices.tolist() == [0, 1]


def test_top_one_hand_case_of_econtrol():
    # papers/econtrol.md, oracle 2: d = 3, eta = .5, constant g, h_0 = 0.
    codec, g = TopK(k=1), np.float32([4.0, 2.0, 1.0])
    h, e, sent = jnp.zeros(3), jnp.zeros(3), []
    for _ in range(4):
        message = decode(codec, encode(codec, None, 0.5 * e + g - h), g)
        e, h = e + g - h - message, h + message
        sent.append(message.tolist())
    assert sent == [[4, 0, 0], [0, 3, 0], [0, 0, 2], [0, -1, 0]]
    assert h.tolist() == [4, 2, 2]


@pytest.mark.parametrize("codec", [TopK(k=2), *RANDK])
@pytest.mark.parametrize("size", [256, 257, 65_537])
def test_indices_use_the_smallest_dtype_and_reach_the_last_coordinate(codec, size):
    u = np.zeros(size, np.float32)
    u[-1], u[size // 2] = 1, -1
    payload = encode(codec, jax.random.key(0), u)
    if isinstance(payload, SeededPayload):
        assert payload.seed.dtype == jnp.uint32
    else:
        expected = {256: "uint8", 257: "uint16"}
        assert payload.indices.dtype == expected.get(size, "uint32")
    if isinstance(codec, TopK):
        np.testing.assert_array_equal(decode(codec, payload, u), u)


@pytest.mark.parametrize("make", [TopK, RandK])
def test_k_too_large_is_said_while_tracing(make):
    with pytest.raises(ValueError, match=r"k = 4 exceeds the size 3 of shape \(3,\)"):
        jax.eval_shape(make(k=4).encode, jax.random.key(0), jnp.ones(3))
    with pytest.raises(ValueError, match="exceeds the size 0"):
        make(k=1).encode(jax.random.key(0), jnp.ones(0))


@pytest.mark.parametrize("make", [TopK, RandK])
@pytest.mark.parametrize("arguments", [{}, {"k": 1, "fraction": 0.1}, {"k": 0}, {"fraction": 1.5}])
def test_bad_arguments(make, arguments):
    with pytest.raises(ValueError, match=r"k or fraction|k must|fraction must"):
        make(**arguments)


def test_fraction_counts():
    counts = [TopK(fraction=0.1).count((d,)) for d in (0, 1, 4, 14, 16, 60)]
    assert counts == [0, 1, 1, 1, 2, 6]
    assert TopK(fraction=1.0).count((7,)) == 7


@pytest.mark.parametrize("codec", RANDK)
def test_rand_k_keeps_k_different_coordinates(codec):
    u = np.arange(1, 11, dtype=np.float32)
    out = np.asarray(decode(codec, encode(codec, jax.random.key(3), u), u))
    kept = out != 0
    assert kept.sum() == 3
    gain = 10 / 3 if codec.unbiased else 1
    np.testing.assert_allclose(out[kept], gain * np.asarray(u)[kept], rtol=1e-6)


def test_rand_k_draws_every_coordinate_equally():
    keys = jax.random.split(jax.random.key(0), 20_000)
    counts = jax.jit(jax.vmap(lambda key: RandK(k=3).encode(key, jnp.ones(10)).indices))(keys)
    share = np.bincount(np.asarray(counts).ravel(), minlength=10) / 20_000
    np.testing.assert_array_less(np.abs(share - 0.3), 5 * np.sqrt(0.3 * 0.7 / 20_000))


@pytest.mark.parametrize("unbiased", [False, True])
def test_a_seed_means_the_same_as_indices(unbiased):
    u, key = np.arange(1, 3001, dtype=np.float32), jax.random.key(5)
    plain, seeded = (RandK(fraction=0.01, unbiased=unbiased, seeded=s) for s in (False, True))
    payload = encode(seeded, key, u)
    np.testing.assert_array_equal(
        decode(seeded, payload, u), decode(plain, encode(plain, key, u), u)
    )
    other_generator = jax.random.key(5, impl="rbg")
    payload = encode(seeded, other_generator, u)
    out = np.asarray(decode(seeded, payload, u))
    gain = 100 if unbiased else 1
    assert set(np.unique(out[out != 0])) == set(np.asarray(payload.values) * np.float32(gain))
    np.testing.assert_allclose(out[out != 0], gain * np.asarray(u)[out != 0], rtol=1e-6)


def test_workers_with_one_key_share_coordinates():
    u = jax.random.normal(jax.random.key(1), (4, 100))
    payload = jax.jit(jax.vmap(RandK(k=5).encode, in_axes=(None, 0)))(jax.random.key(0), u)
    assert (payload.indices == payload.indices[0]).all()
