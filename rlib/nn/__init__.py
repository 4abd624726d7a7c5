"""Flax NNX layers and architectures that more than one method uses."""

from rlib.nn.coordinate import (
    Affine,
    Constant,
    CoordinateNetwork,
    Finer,
    FourierMLP,
    Gaussian,
    Siren,
    Wire,
    symmetric_uniform,
)
from rlib.nn.functional import affine, cosine, sine
from rlib.nn.partitioning import logical_axes

__all__ = [
    "Affine",
    "Constant",
    "CoordinateNetwork",
    "Finer",
    "FourierMLP",
    "Gaussian",
    "Siren",
    "Wire",
    "affine",
    "cosine",
    "logical_axes",
    "sine",
    "symmetric_uniform",
]
