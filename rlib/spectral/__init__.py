"""The spectral bottleneck: WINNER initialisation, spectra, the empirical tangent kernel."""

from rlib.spectral.analysis import (
    amplitude_spectrum,
    band_limited_noise,
    empirical_ntk,
    grid,
    ntk_spectrum,
    psnr,
)
from rlib.spectral.winner import (
    AUDIO,
    IMAGE,
    WinnerSchedule,
    noise_scales,
    spectral_centroid,
    winner_init,
)

__all__ = [
    "AUDIO",
    "IMAGE",
    "WinnerSchedule",
    "amplitude_spectrum",
    "band_limited_noise",
    "empirical_ntk",
    "grid",
    "noise_scales",
    "ntk_spectrum",
    "psnr",
    "spectral_centroid",
    "winner_init",
]
