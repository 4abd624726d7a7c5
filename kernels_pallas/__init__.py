"""Pallas kernels for GPUs and TPUs, one folder an operation; needs jax alone."""
