"""Attention: kernels, and how many words they have to move (`transfers`)."""
