"""Pallas kernels for GPUs and TPUs, one folder an operation; needs jax alone."""

from kernels_pallas.attention import flash_attention, sharded_flash_attention

__all__ = ["flash_attention", "sharded_flash_attention"]
