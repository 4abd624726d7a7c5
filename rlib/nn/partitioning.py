"""Logical axis names on parameters."""

from typing import Any


def logical_axes(*names: str | None) -> dict[str, Any]:
    """Keyword arguments for `nnx.Param` that name the axes of its value.

    `rlib.parallel.sharding` maps the names to mesh axes. Construction stays free of meshes: the
    names are recorded, nothing is sharded until a step builder asks.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> nnx.Param(jnp.zeros((2, 3)), **logical_axes("embed", "mlp")).get_metadata()["out_sharding"]
    ('embed', 'mlp')
    """
    return {"out_sharding": names, "eager_sharding": False}
