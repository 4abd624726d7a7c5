"""Collectives that JAX does not have: means over workers that send compressed messages."""

from rlib.collectives.axes import (
    all_gather,
    require_axis,
    require_local,
    vary,
    varying_axes,
)
from rlib.collectives.mean import (
    ChunkedMean,
    chunk_length,
    compressed_mean,
    gathered_mean,
    rounded_mean,
)

__all__ = [
    "ChunkedMean",
    "all_gather",
    "chunk_length",
    "compressed_mean",
    "gathered_mean",
    "require_axis",
    "require_local",
    "rounded_mean",
    "vary",
    "varying_axes",
]
