from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlib.compression import ScaledSign

L2, L1 = ScaledSign(), ScaledSign(scale="l1")


@partial(jax.jit, static_argnums=0)
def compress(codec, u, *mask):
    return codec.decode(codec.encode(None, u, *mask), u, *mask)


def apply(codec, u, *mask):
    return np.asarray(compress(codec, np.asarray(u, np.float32), *mask))


def test_hand_cases():
    np.testing.assert_allclose(apply(L2, [3, -4]), [3.535534, -3.535534], rtol=1e-6)
    np.testing.assert_allclose(apply(L1, [3, -4]), [3.5, -3.5], rtol=1e-6)
    u = np.array([1, -2, 2, 0])
    np.testing.assert_allclose(u - apply(L2, u), [-0.5, -0.5, 0.5, -1.5], rtol=1e-6)
    assert np.sum((u - apply(L2, u)) ** 2) == pytest.approx(3.0)
    assert np.sum((u - apply(L1, u)) ** 2) == pytest.approx(2.75)


def test_zero_and_negative_zero_are_positive():
    np.testing.assert_allclose(apply(L2, [0.0, -0.0, -1.0]), np.array([1, 1, -1]) / np.sqrt(3))


@pytest.mark.parametrize(
    ("codec", "limit"), [(L2, 2 - 2 * np.sqrt(2 / np.pi)), (L1, 1 - 2 / np.pi)]
)
def test_relative_error_of_a_gaussian(codec, limit):
    assert round(limit, 6) in (0.404231, 0.363380)
    d = 1_000_000
    u = np.random.default_rng(0).standard_normal(d).astype(np.float32)
    error = np.sum((u - apply(codec, u)) ** 2) / np.sum(u**2)
    # Five standard deviations: by the delta method .42 / sqrt(d) for l2, .34 / sqrt(d) for l1.
    assert abs(error - limit) < 5 * 0.42 / np.sqrt(d)


@pytest.mark.parametrize("d", [1, 2, 5, 1000, 1025, 40_000])
def test_l2_keeps_the_norm(d):
    u = np.random.default_rng(d).standard_normal(d).astype(np.float32) ** 3
    norm = np.linalg.norm(u.astype(np.float64))
    assert np.linalg.norm(apply(L2, u).astype(np.float64)) == pytest.approx(norm, rel=1e-6)


def test_l2_is_not_contractive_on_one_hot_and_l1_is_at_its_worst():
    u = np.eye(16, dtype=np.float32)[3]
    assert np.sum((u - apply(L2, u)) ** 2) == pytest.approx(1.5)
    assert np.sum((u - apply(L1, u)) ** 2) == pytest.approx(1 - L1.contraction((16,)))
    assert L2.contraction((16,)) is None


@pytest.mark.parametrize("codec", [L2, L1])
def test_mask_is_the_codec_of_what_remains(codec):
    rng = np.random.default_rng(0)
    u, mask = rng.standard_normal((7, 300)).astype(np.float32), rng.random((7, 300)) < 0.3
    out = apply(codec, u, jnp.asarray(mask))
    np.testing.assert_array_equal(out[~mask], 0)
    np.testing.assert_allclose(out[mask], apply(codec, u[mask]), rtol=1e-6)


@pytest.mark.parametrize("codec", [L2, L1])
def test_masked_values_do_not_count_even_when_not_finite(codec):
    u, mask = np.float32([np.nan, 2.0, -np.inf, -2.0]), np.array([False, True, False, True])
    np.testing.assert_array_equal(apply(codec, u, mask), [0, 2, 0, -2])


@pytest.mark.parametrize("codec", [L2, L1])
def test_nothing_to_count_gives_scale_zero(codec):
    assert codec.encode(None, jnp.ones(9), jnp.zeros(9, bool)).scale == 0
    assert codec.encode(None, jnp.ones((0, 3))).scale == 0
    assert codec.encode(None, jnp.zeros(9)).scale == 0


def test_not_a_number_is_not_hidden():
    assert np.isnan(apply(L2, [1.0, np.nan])).all()
    assert np.isnan(apply(L1, [1.0, np.nan])).all()


def test_scale_of_half_precision_is_summed_in_float32():
    # In bfloat16 a running sum of ones stops at 256.
    payload = L1.encode(None, jnp.full(5000, 3, jnp.bfloat16))
    assert payload.scale.dtype == jnp.float32 and payload.scale == 3


def test_mask_under_vmap():
    rng = np.random.default_rng(2)
    u, mask = rng.standard_normal((4, 33)).astype(np.float32), rng.random((4, 33)) < 0.5
    out = jax.jit(jax.vmap(lambda u, m: L2.decode(L2.encode(None, u, m), u, m)))(u, mask)
    one = np.stack([apply(L2, a, jnp.asarray(m)) for a, m in zip(u, mask, strict=True)])
    np.testing.assert_allclose(out, one, rtol=1e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match="'l3'"):
        ScaledSign(scale="l3")
    with pytest.raises(ValueError, match=r"mask has shape \(2,\), and the array \(3,\)"):
        L2.encode(None, jnp.ones(3), jnp.ones(2, bool))
