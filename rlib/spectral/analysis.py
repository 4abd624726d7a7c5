"""Signals with a known band, spectra, and the empirical neural tangent kernel."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Array, Float


def band_limited_noise(
    n: int, low: float, high: float, *, seed: int = 0
) -> Float[np.ndarray, "n 1"]:
    """Noise whose spectrum has unit modulus inside a band and is zero outside, with peak 1.

    Args:
        n: samples.
        low, high: the band, closed, as fractions of the Nyquist frequency.
        seed: of the phases, one per frequency bin in the band, in order.

    Raises:
        ValueError: a band outside [0, 1], or without width.

    >>> y = band_limited_noise(1024, 0.5, 0.9)
    >>> y.shape, float(np.abs(y).max())
    ((1024, 1), 1.0)
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"band [{low}, {high}]: needs 0 <= low < high <= 1 (Nyquist)")
    bins = np.arange(n // 2 + 1) / (n // 2)
    inside = (bins >= low) & (bins <= high)
    spectrum = np.zeros(bins.shape, np.complex128)
    phases = np.random.default_rng(seed).uniform(0, 2 * np.pi, inside.sum())
    spectrum[inside] = np.exp(1j * phases)
    signal = np.fft.irfft(spectrum, n)
    return (signal / np.abs(signal).max())[:, None]


def amplitude_spectrum(y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies (fractions of Nyquist) and abs(rfft) along axis 0, for y of shape (N, ...).

    >>> frequencies, amplitudes = amplitude_spectrum(np.cos(np.pi * np.arange(8) / 2))
    >>> frequencies, amplitudes.round(6)
    (array([0.  , 0.25, 0.5 , 0.75, 1.  ]), array([0., 0., 4., 0., 0.]))
    """
    signal = np.asarray(y, np.float64)
    return 2 * np.fft.rfftfreq(signal.shape[0]), np.abs(np.fft.rfft(signal, axis=0))


def grid(*sizes: int) -> Float[np.ndarray, "points d"]:
    """Coordinates in [-1, 1]^d of a grid, the last axis fastest.

    >>> grid(3).ravel().tolist(), grid(2, 2).tolist()
    ([-1.0, 0.0, 1.0], [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    """
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in sizes), indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, len(sizes))


def psnr(mean_squared_error: ArrayLike) -> np.ndarray:
    """-10 log10(MSE) in dB: peak 1, as published, although the data span [-1, 1].

    >>> float(psnr(0.01))
    20.0
    """
    return -10 * np.log10(np.maximum(np.asarray(mean_squared_error, np.float64), 1e-30))


def empirical_ntk(
    apply: Callable[[Any, Array], Array], params: Any, x: Float[Array, "n d"], *, rows: int = 64
) -> Float[Array, "n n"]:
    """K = J J^T / n^2, with J the gradient of the scalar output at each point by all parameters.

    Args:
        apply: (params, x of shape (d,)) -> output of one element.
        rows: gradients that are formed at a time; the whole J is kept, n times the parameters.

    >>> empirical_ntk(lambda w, x: w @ x, jnp.ones(1), jnp.array([[1.0], [2.0]]))  # x x^T / 4
    Array([[0.25, 0.5 ],
           [0.5 , 1.  ]], dtype=float32)
    """

    def gradient(point: Array) -> Array:
        return ravel_pytree(jax.grad(lambda p: apply(p, point).reshape(()))(params))[0]

    jacobian = jax.lax.map(gradient, x, batch_size=rows)
    return jnp.matmul(jacobian, jacobian.T, precision="highest") / x.shape[0] ** 2


def ntk_spectrum(kernel: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """How strongly the kernel acts at each frequency: sum_i lambda_i abs(FFT(v_i))^2 / n.

    That sum over the eigenpairs is the diagonal of F K F^H / n, so no eigenvectors are needed.
    Points must be equally spaced. Returns frequencies (fractions of Nyquist) and values, float64.

    >>> ntk_spectrum(np.ones((4, 4)))  # fits constants only
    (array([0. , 0.5, 1. ]), array([4., 0., 0.]))
    """
    k = np.asarray(kernel, np.float64)
    n = k.shape[0]
    rotated = np.fft.ifft(np.fft.fft(k, axis=0), axis=1) * n
    values = np.real(np.diagonal(rotated)) / n
    return 2 * np.fft.rfftfreq(n), values[: n // 2 + 1]
