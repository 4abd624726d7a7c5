import jax
import numpy as np
import pytest

from rlib.compression import NaturalCompression, StochasticQuantization

many = jax.jit(
    lambda codec, keys, u: jax.vmap(lambda k: codec.decode(codec.encode(k, u), u))(keys),
    static_argnums=0,
)
one = jax.jit(lambda codec, key, u: codec.decode(codec.encode(key, u), u), static_argnums=0)
SPECIAL = np.array([0.0, -0.0, 1.0, -2.0, 0.5, 2.0**-126, -(2.0**126)], np.float32)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_quantized_values_are_neighbouring_levels(bits):
    codec = StochasticQuantization(bits)
    u = np.random.default_rng(bits).standard_normal(77).astype(np.float32)
    step = np.linalg.norm(u) / (2 ** (bits - 1) - 1)
    out = np.asarray(one(codec, jax.random.key(0), u), np.float64)
    level = out / step
    np.testing.assert_allclose(level, np.round(level), atol=1e-4)
    assert np.abs(out - u).max() < step * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_quantization_of_zeros_and_of_one_hot_is_exact(bits):
    codec, keys = StochasticQuantization(bits), jax.random.split(jax.random.key(0), 50)
    for u in (np.zeros(5, np.float32), np.float32([0, 0, -0.37, 0, 0])):
        out = many(codec, keys, u)
        np.testing.assert_allclose(out, np.tile(u, (50, 1)), rtol=1e-6)


def test_two_bits_hand_case():
    # ||u|| = 5, s = 1: +5 with probability .6, and -5 with probability .8, else 0.
    codec, u = StochasticQuantization(2), np.float32([3.0, -4.0])
    keys = jax.random.split(jax.random.key(1), 10_000)
    out = np.asarray(many(codec, keys, u))
    assert set(np.unique(out)) == {-5.0, 0.0, 5.0}
    share = (out == [5.0, -5.0]).mean(0)
    assert np.all(np.abs(share - [0.6, 0.8]) < 5 * np.sqrt([0.24 / 1e4, 0.16 / 1e4]))


def test_bits_out_of_range():
    for bits in (1, 9):
        with pytest.raises(ValueError, match="from 2 to 8"):
            StochasticQuantization(bits)


def test_powers_of_two_and_zero_are_exact():
    codec = NaturalCompression()
    out = many(codec, jax.random.split(jax.random.key(0), 50), SPECIAL)
    np.testing.assert_array_equal(out, np.tile(SPECIAL, (50, 1)))


def test_natural_values_are_the_neighbouring_powers_with_the_right_odds():
    # 1.25 = .75 * 1 + .25 * 2 and -12 = .5 * -8 + .5 * -16.
    codec, u = NaturalCompression(), np.float32([1.25, -12.0])
    keys = jax.random.split(jax.random.key(2), 10_000)
    out = np.asarray(many(codec, keys, u))
    assert set(np.unique(out)) == {1.0, 2.0, -8.0, -16.0}
    share = (out == [2.0, -16.0]).mean(0)
    assert np.all(np.abs(share - [0.25, 0.5]) < 5 * np.sqrt([0.1875 / 1e4, 0.25 / 1e4]))


def test_natural_keeps_what_is_not_finite_so():
    u = np.float32([np.nan, np.inf, -np.inf])
    out = one(NaturalCompression(), jax.random.key(0), u)
    assert np.isinf(out).all() and out[1] > 0 > out[2]


def test_quantization_does_not_hide_what_is_not_finite():
    codec, u = StochasticQuantization(4), np.float32([1.0, np.nan])
    assert np.isnan(one(codec, jax.random.key(0), u)).all()
    u = np.float32([1.0, np.inf])
    assert not np.isfinite(one(codec, jax.random.key(0), u)).any()
