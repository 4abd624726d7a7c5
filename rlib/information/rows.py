"""Samples as rows: what is asked of them, blocks of them, and those of other devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from rlib.collectives import all_gather

#: More pairs of samples than the square of it are made in blocks, of so many, to save memory.
BLOCKED_ABOVE = 4096
PAIRS_AT_ONCE = 2**20


def by_rows(one: Callable[[Any], Any], rows: Any, block: int | None) -> Any:
    """one(row) of every row, all at once, or `block` at a time and again for the gradient."""
    if block is None or block >= len(jax.tree.leaves(rows)[0]):
        return jax.vmap(one)(rows)
    return lax.map(jax.checkpoint(one), rows, batch_size=block)


def of_each(one: Callable[[Any], Any], rows: Any, others: int) -> Any:
    """one(row) of every row, each compared with so many others; in blocks if the pairs are many."""
    few = len(jax.tree.leaves(rows)[0]) * others <= BLOCKED_ABOVE**2
    return by_rows(one, rows, None if few else max(1, PAIRS_AT_ONCE // others))


def workers(axis_name: str | None) -> int:
    return 1 if axis_name is None else lax.axis_size(axis_name)


def gathered(tree: Any, axis_name: str | None) -> Any:
    """The rows of all devices, in order."""
    if axis_name is None:
        return tree
    join = lambda x: all_gather(x, axis_name).reshape(-1, *x.shape[1:])
    return jax.tree.map(join, tree)


def places(count: int, axis_name: str | None) -> Int[Array, " count"]:
    """Where this device's rows, so many, stand among those of all."""
    first = 0 if axis_name is None else lax.axis_index(axis_name) * count
    return first + jnp.arange(count)


def summed(x: Array, axis_name: str | None) -> Array:
    """Sum over the rows of all devices."""
    x = jnp.sum(x, axis=0)
    return x if axis_name is None else lax.psum(x, axis_name)


def matrices(who: str, **arrays: Any) -> list[Array]:
    """As float32 or float64 matrices of at least one row; finite, where values can be looked at."""
    made = []
    for name, given in arrays.items():
        x = jnp.asarray(given)
        if x.ndim != 2:
            hint = f": one sample or {x.size} of them? Numbers are {name}[:, None]" * (x.ndim == 1)
            raise ValueError(f"{who}: {name} is (samples, features); got shape {x.shape}{hint}")
        if 0 in x.shape:
            raise ValueError(f"{who}: {name} is empty: shape {x.shape}")
        x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
        traced = isinstance(given, jax.core.Tracer)
        known = not traced and getattr(given, "is_fully_addressable", True)
        if known:
            with np.errstate(over="ignore"):
                values = np.asarray(given).astype(x.dtype)
            if not np.isfinite(values).all():
                raise ValueError(f"{who}: {name} holds NaN or infinite values (as {x.dtype})")
        made.append(x)
    if len({x.dtype for x in made}) > 1:
        made = [x.astype(jnp.float64) for x in made]
    return made


def positive(who: str, **numbers: Any) -> None:
    """Refuse widths, where they can be looked at, whose square is 0 or infinite in float32."""
    for name, value in numbers.items():
        if not isinstance(value, jax.core.Tracer) and not 1e-18 <= float(value) <= 1e18:
            raise ValueError(f"{who}: {name}={value}: a positive number is needed, 1e-18 to 1e18")


def at_least_float32(*arrays: Array) -> tuple[Array, ...]:
    """float16 does not hold the floor of the sd, and densities of many dimensions overflow it."""
    return tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays)
