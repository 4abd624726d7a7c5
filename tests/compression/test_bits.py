import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlib.compression import count_true, pack_bits, pack_codes, unpack_bits, unpack_codes
from rlib.compression.bits import _pack_planes, _unpack_planes

# Compiled, which is faster than operation by operation.
pack, unpack = jax.jit(pack_bits), jax.jit(unpack_bits, static_argnums=1)
codes_of, read_codes = (
    jax.jit(pack_codes, static_argnums=1),
    jax.jit(unpack_codes, static_argnums=(1, 2)),
)

SIZES = [0, 127, 1016, 1023, 1024, 1025, 2049, 7169, 20001]


@pytest.mark.parametrize("n", SIZES)
def test_round_trip_and_size(n):
    bits = np.random.default_rng(n).random(n) < 0.5
    packed = pack(bits)
    assert packed.dtype == jnp.uint8
    assert packed.shape == ((-(-n // 8),) if n <= 1024 else (-(-n // 1024), 128))
    assert packed.size - -(-n // 8) in range(128 if n > 1024 else 1)
    np.testing.assert_array_equal(unpack(packed, n), bits)
    assert int(count_true(jnp.asarray(bits))) == bits.sum()


def test_round_trip_of_every_short_length():
    bits = np.random.default_rng(0).random(18) < 0.5
    for n in range(1, 17):
        packed = np.packbits(bits[:n])
        np.testing.assert_array_equal(pack(bits[:n]), packed)
        np.testing.assert_array_equal(unpack(jnp.asarray(packed), n), bits[:n])


@pytest.mark.parametrize(("platform", "planes"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_both_ways_take_the_order_of_the_platform(platform, planes):
    def text(f, x):
        return jax.jit(f).trace(x).lower(lowering_platforms=(platform,)).as_text()

    packing = text(pack_bits, jnp.zeros(2048, bool))
    assert ("8x2x128" in packing) == planes
    unpacking = text(lambda p: unpack_bits(p, 2048), jnp.zeros((2, 128), jnp.uint8))
    assert ("8x2x128" in unpacking) == planes


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the order of a CPU")
@pytest.mark.parametrize("n", [1025, 2048, 7171])
def test_long_order_is_that_of_numpy_on_a_cpu(n):
    bits = np.random.default_rng(n).random(n) < 0.5
    expected = np.packbits(bits)
    packed = np.asarray(pack(bits)).reshape(-1)
    np.testing.assert_array_equal(packed[: len(expected)], expected)


@pytest.mark.parametrize(
    ("n", "byte", "bit"), [(0, 0, 7), (255, 255, 7), (256, 0, 6), (2047, 255, 0)]
)
def test_long_order_elsewhere_is_eight_planes(n, byte, bit):
    packed = np.asarray(_pack_planes(jnp.arange(2048) == n)).reshape(-1)
    assert packed[byte] == 1 << bit and packed.sum() == 1 << bit


@pytest.mark.parametrize("n", [1025, 7171])
def test_planes_round_trip(n):
    bits = np.random.default_rng(n).random(n) < 0.5
    np.testing.assert_array_equal(_unpack_planes(_pack_planes(jnp.asarray(bits)))[:n], bits)


def test_padding_is_zero_bits():
    packed = np.asarray(pack(np.ones(1025, bool)))
    assert np.unpackbits(packed).sum() == 1025


@pytest.mark.parametrize(("n", "shape"), [(9, (1,)), (1024, (1, 128)), (1025, (1, 128))])
def test_bytes_of_another_length_are_refused(n, shape):
    with pytest.raises(ValueError, match=f"{n} bits travel as uint8"):
        unpack(jnp.zeros(shape, jnp.uint8), n)


@pytest.mark.parametrize("width", [1, 3, 7, 8])
@pytest.mark.parametrize("n", [13, 3001])
def test_codes_round_trip_in_their_bits(width, n):
    codes = np.random.default_rng(n).integers(0, 2**width, n).astype(np.uint8)
    packed = codes_of(jnp.asarray(codes), width)
    np.testing.assert_array_equal(read_codes(packed, width, n), codes)
    assert -(-n * width // 8) <= packed.size < -(-n * width // 8) + 128


@pytest.mark.parametrize("n", [13, 2049])
def test_vmap_and_jit(n):
    bits = np.random.default_rng(1).random((3, n)) < 0.5
    packed = jax.jit(jax.vmap(pack_bits))(bits)
    np.testing.assert_array_equal(packed, np.stack([pack(row) for row in bits]))
    np.testing.assert_array_equal(jax.vmap(lambda p: unpack(p, n))(packed), bits)
