"""WINNER: Gaussian noise on the first two weight matrices of a SIREN, once, at initialisation.

Chandravamsi et al., "Spectral Bottleneck in Deep Neural Networks: Noise is All You Need",
arXiv 2509.09719. A sine network that starts with no energy in the band of its target stays near
the zero function; noise whose scale follows the target's spectral centroid puts energy there.
No parameter, loss or forward pass changes.

Deviations

| | paper | official code | here |
|---|---|---|---|
| rate a for sounds | 5 | 7 | 7; paper: `WinnerSchedule(3500, 5, 3)` |
| several channels | psi / C | psi / C^2 | `channel_rule="code"`, or "paper" |
| centroid of a picture | not said | one raster signal | `mode="raster"`, or "rows" |
| scales by hand | d = 3 only | overwritten for d = 1, 2 | any (s0, s1) goes into `winner_init` |
| noise divided by | hidden frequency w0 | hidden w0, never w_first | hidden w0 |
| best weights kept | yes | not copied, so the last ones | the last ones |
| PSNR | peak 1, data in [-1, 1] | last mini-batch, best epoch | whole signal, last and best step |
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Key


class WinnerSchedule(NamedTuple):
    """s0 = s0_max (1 - exp(-a u)), s1 = b u, for the channel-normalised centroid u."""

    s0_max: float
    a: float
    b: float


AUDIO = WinnerSchedule(s0_max=3500.0, a=7.0, b=3.0)
IMAGE = WinnerSchedule(s0_max=50.0, a=5.0, b=0.4)
_SCHEDULES = {"audio": AUDIO, "image": IMAGE}


def spectral_centroid(y: ArrayLike, *, mode: Literal["raster", "rows"] = "raster") -> float:
    """Mean frequency of a signal, weighted by amplitude: 0 is constant, 1 the Nyquist frequency.

    Computed on the host in float64; the mean over channels.

    Args:
        y: (N, C) samples or (H, W, C) pixels, channels last.
        mode: "raster" reads a picture's pixels row after row as one signal, as the official
            script does; "rows" averages the centroids of the rows.

    Raises:
        ValueError: for another rank, no samples, or values that are not finite.

    >>> t = np.arange(1024)[:, None]
    >>> round(spectral_centroid(np.cos(2 * np.pi * 100 * t / 1024)), 5)
    0.19531
    """
    signal = np.asarray(y, np.float64)
    if signal.ndim not in (2, 3) or signal.size == 0:
        raise ValueError(f"a signal is (N, C) or (H, W, C) and not empty; got shape {signal.shape}")
    if not np.isfinite(signal).all():
        raise ValueError("the signal holds NaN or infinite values")
    if mode not in ("raster", "rows"):
        raise ValueError(f'mode={mode!r}: choose "raster" or "rows"')
    if mode == "raster":
        signal = signal.reshape(-1, signal.shape[-1])
    amplitude = np.abs(np.fft.rfft(signal, axis=-2))
    frequency = np.fft.rfftfreq(signal.shape[-2])
    total = amplitude.sum(axis=-2)
    weighted = np.einsum("...fc,f->...c", amplitude, frequency)
    centroid = np.divide(weighted, total, out=np.zeros_like(total), where=total > 0)
    return min(1.0, float(2 * centroid.mean()))  # rounding may exceed Nyquist by an ulp


def noise_scales(
    psi: float,
    n_channels: int,
    *,
    kind: Literal["audio", "image"] | WinnerSchedule,
    channel_rule: Literal["code", "paper"] = "code",
) -> tuple[float, float]:
    """(s0, s1) for a target of spectral centroid `psi` (Eq. 11).

    Args:
        psi: from `spectral_centroid`.
        n_channels: channels C of the target.
        kind: the published schedules, or one's own.
        channel_rule: "code" uses psi / C^2, as released; "paper" psi / C. Equal for C = 1.

    Raises:
        ValueError: psi outside [0, 1], another `channel_rule` or `kind`.

    >>> s0, s1 = noise_scales(0.5, 1, kind="audio")
    >>> round(s0, 4), s1
    (3394.3092, 1.5)
    """
    if not 0 <= psi <= 1:
        raise ValueError(f"psi={psi}: a spectral centroid lies between 0 and 1 (Nyquist)")
    if channel_rule not in ("code", "paper"):
        raise ValueError(f'channel_rule={channel_rule!r}: choose "code" or "paper"')
    if isinstance(kind, str) and kind not in _SCHEDULES:
        raise ValueError(f'kind={kind!r}: choose "audio", "image" or a WinnerSchedule')
    schedule = _SCHEDULES[kind] if isinstance(kind, str) else kind
    u = psi / n_channels ** (2 if channel_rule == "code" else 1)
    return schedule.s0_max * -math.expm1(-schedule.a * u), schedule.b * u


def winner_init(params: Any, s0: ArrayLike, s1: ArrayLike, w0: ArrayLike, key: Key[Array, ""]):
    """Add (s0 / w0) N(0, 1) and (s1 / w0) N(0, 1) to the first two kernels of a `Siren`.

    Pure; all other parameters are returned as they are. Start from a fresh base draw: noise on
    noise is not the method.

    Args:
        params: the `nnx.Param` state of a `rlib.nn.Siren`.
        s0, s1: from `noise_scales`, or by hand.
        w0: the network's hidden frequency (never `w_first`).

    Raises:
        ValueError: the parameters are not those of one `Siren`, alone or inside another module.

    >>> from flax import nnx
    >>> from rlib.nn import Siren
    >>> graphdef, params, rest = nnx.split(Siren(1, 8, 1, 2, rngs=nnx.Rngs(0)), nnx.Param, ...)
    >>> noisy = winner_init(params, 3394.3, 1.5, 30.0, jax.random.key(0))
    >>> nnx.merge(graphdef, noisy, rest)(np.zeros((4, 1))).shape
    (4, 1)
    """
    scales = {"['layers'][0]['kernel']": s0, "['layers'][1]['kernel']": s1}
    keys = dict(zip(scales, jax.random.split(key), strict=True))
    perturbed = []

    def perturb(path: Any, leaf: Array) -> Array:
        where = jax.tree_util.keystr(path).removesuffix(".value")
        name = next((n for n in scales if where.endswith(n)), None)
        if name is None:
            return leaf
        perturbed.append(where)
        noise = jax.random.normal(keys[name], leaf.shape, leaf.dtype)
        return leaf + (scales[name] / w0) * noise

    noisy = jax.tree_util.tree_map_with_path(perturb, params)
    if len(perturbed) != 2:
        raise ValueError(
            f"winner_init looks for ['layers'][0]['kernel'] and ['layers'][1]['kernel'] of one "
            f"Siren and found {perturbed or 'neither'}"
        )
    return noisy
