import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlib import spectral
from rlib.nn import Siren


def test_band_limited_noise_lies_in_its_band_with_one_modulus():
    y = spectral.band_limited_noise(4096, 0.5, 0.9)
    frequency, amplitude = spectral.amplitude_spectrum(y[:, 0])
    inside = (frequency >= 0.5) & (frequency <= 0.9)
    assert amplitude[~inside].max() < 1e-9
    np.testing.assert_allclose(amplitude[inside], amplitude[inside][0], rtol=1e-9)
    assert np.abs(y).max() == 1
    assert spectral.psnr(np.mean(y**2)) == pytest.approx(11.62, abs=0.01)  # of the specification


@pytest.mark.parametrize("band", [(0.5, 0.4), (-0.1, 0.5), (0.5, 1.5)])
def test_impossible_bands_are_refused(band):
    with pytest.raises(ValueError, match="band"):
        spectral.band_limited_noise(64, *band)


def test_kernel_is_the_gradients_gram_matrix():
    graphdef, params, rest = nnx.split(Siren(1, 8, 1, 2, rngs=nnx.Rngs(0)), nnx.Param, ...)
    apply = lambda p, x: nnx.merge(graphdef, p, rest)(x)
    x = np.linspace(-1, 1, 10, dtype=np.float32)[:, None]
    jacobian = jax.jacrev(lambda p: apply(p, x)[:, 0])(params)
    flat = np.concatenate(
        [np.asarray(leaf, np.float64).reshape(10, -1) for leaf in jax.tree.leaves(jacobian)], 1
    )
    for rows in (3, 64):
        kernel = spectral.empirical_ntk(apply, params, x, rows=rows)
        np.testing.assert_allclose(kernel, flat @ flat.T / 100, rtol=1e-4)


def test_kernel_of_a_linear_model_is_its_design():
    x = jnp.linspace(-1, 1, 6)[:, None]
    kernel = spectral.empirical_ntk(lambda p, v: p["a"] * v[0] + p["b"], {"a": 0.3, "b": 0.1}, x)
    np.testing.assert_allclose(kernel, (x @ x.T + 1) / 36, rtol=1e-6)


def test_kernel_spectrum_is_the_sum_over_eigenpairs():
    draw = np.random.default_rng(0).normal(size=(32, 20))
    kernel = draw @ draw.T
    values, vectors = np.linalg.eigh(kernel)
    expected = (values * np.abs(np.fft.fft(vectors, axis=0)) ** 2).sum(axis=1) / 32
    frequency, spectrum = spectral.ntk_spectrum(kernel)
    np.testing.assert_allclose(spectrum, expected[:17], rtol=1e-9)
    assert frequency[-1] == 1


def test_grid_runs_the_last_axis_fastest():
    points = spectral.grid(2, 3)
    assert points.shape == (6, 2)
    np.testing.assert_array_equal(points[:3, 0], -1)
    np.testing.assert_allclose(points[:3, 1], [-1, 0, 1])
