import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlib.compression import pack_bits, pack_codes, unpack_bits, unpack_codes

SIZES = [0, 1, 7, 8, 9, 63, 127, 128, 1016, 1023, 1024, 1025, 2047, 2049, 7168, 8191, 8193, 20001]


@pytest.mark.parametrize("n", SIZES)
def test_round_trip_and_size(n):
    bits = np.random.default_rng(n).random(n) < 0.5
    packed = pack_bits(bits)
    assert packed.dtype == jnp.uint8
    assert packed.shape == ((-(-n // 8),) if n <= 1024 else (-(-n // 1024), 128))
    assert packed.size - -(-n // 8) in range(128 if n > 1024 else 1)
    np.testing.assert_array_equal(unpack_bits(packed, n), bits)


def test_round_trip_of_every_short_length():
    bits = np.random.default_rng(0).random(200) < 0.5
    for n in range(200):
        packed = np.packbits(bits[:n])
        np.testing.assert_array_equal(pack_bits(bits[:n]), packed)
        np.testing.assert_array_equal(unpack_bits(jnp.asarray(packed), n), bits[:n])


@pytest.mark.parametrize(
    ("n", "byte", "bit"), [(0, 0, 7), (255, 255, 7), (256, 0, 6), (2047, 255, 0)]
)
def test_long_layout_is_eight_planes(n, byte, bit):
    packed = np.asarray(pack_bits(np.arange(2048) == n)).reshape(-1)
    assert packed[byte] == 1 << bit and packed.sum() == 1 << bit


def test_padding_is_zero_bits():
    packed = np.asarray(pack_bits(np.ones(1025, bool)))
    assert np.unpackbits(packed).sum() == 1025


@pytest.mark.parametrize(("n", "shape"), [(9, (1,)), (1024, (1, 128)), (1025, (1, 128))])
def test_bytes_of_another_length_are_refused(n, shape):
    with pytest.raises(ValueError, match=f"{n} bits travel as uint8"):
        unpack_bits(jnp.zeros(shape, jnp.uint8), n)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("n", [0, 1, 13, 255, 3001])
def test_codes_round_trip_in_their_bits(width, n):
    codes = np.random.default_rng(n).integers(0, 2**width, n).astype(np.uint8)
    packed = pack_codes(jnp.asarray(codes), width)
    np.testing.assert_array_equal(unpack_codes(packed, width, n), codes)
    assert -(-n * width // 8) <= packed.size < -(-n * width // 8) + 128


@pytest.mark.parametrize("n", [13, 2049])
def test_vmap_and_jit(n):
    bits = np.random.default_rng(1).random((3, n)) < 0.5
    packed = jax.jit(jax.vmap(pack_bits))(bits)
    np.testing.assert_array_equal(packed, np.stack([pack_bits(row) for row in bits]))
    np.testing.assert_array_equal(jax.vmap(lambda p: unpack_bits(p, n))(packed), bits)
