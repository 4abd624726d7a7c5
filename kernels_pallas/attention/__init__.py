"""Attention: exact, without storing the matrix of scores, and how many words it has to move.

`flash_attention` is the function to call; `transfers` the model of a memory and a cache.
"""

from kernels_pallas.attention import transfers
from kernels_pallas.attention.api import (
    IMPLEMENTATIONS,
    flash_attention,
    implementations,
    sharded_flash_attention,
)

__all__ = [
    "IMPLEMENTATIONS",
    "flash_attention",
    "implementations",
    "sharded_flash_attention",
    "transfers",
]
