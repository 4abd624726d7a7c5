"""Guards of a distributed step, decided by all workers together."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int

from rlib.collectives import require_axis, varying_axes

Tree = Any


def sum_over_shards(parts: list[Array], axis_name: str | None) -> Array:
    """Sum of scalars, each over the mesh axes that its tensor is split over (not the workers')."""
    groups: dict[tuple[str, ...], Array] = {}
    for part in parts:
        axes = tuple(sorted(varying_axes(part) - {axis_name}))
        groups[axes] = groups[axes] + part if axes in groups else part
    sums = [lax.psum(part, axes) if axes else part for axes, part in groups.items()]
    return sum(sums[1:], sums[0])


def clip_by_global_norm(
    max_norm: float, axis_name: str | None = None
) -> optax.GradientTransformation:
    """Scale local gradients so that their root mean square norm over workers is at most `max_norm`.

    All workers scale by the same number, so the mean gradient keeps its direction. Its own norm is
    at most the root mean square of the workers'; it cannot be had without exchanging gradients.
    With `axis_name=None` it is `optax.clip_by_global_norm`.

    >>> tx = clip_by_global_norm(1.0)
    >>> tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0]
    Array([0.6, 0.8], dtype=float32)
    """

    def init(params: Tree) -> optax.EmptyState:
        return optax.EmptyState()

    def update(updates: Tree, state: optax.EmptyState, params: Tree = None):
        require_axis(axis_name, "clip_by_global_norm")
        squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(updates)]
        total = sum_over_shards(squares, axis_name)
        norm = jnp.sqrt(total if axis_name is None else lax.pmean(total, axis_name))
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformation(init, update)


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`.

    Fields:
        skipped: steps that were skipped so far.
        inner: the wrapped optimiser's state.
    """

    skipped: Int[Array, ""]
    inner: Tree


def skip_nonfinite(
    inner: optax.GradientTransformation, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Skip a step, on all workers, in which a gradient of any worker is not finite.

    A skipped step changes nothing but the count: no update, no state, no error memory.

    >>> tx = skip_nonfinite(optax.sgd(1.0))
    >>> update, state = tx.update(jnp.array([1.0, jnp.nan]), tx.init(jnp.zeros(2)))
    >>> update.tolist(), int(state.skipped)
    ([0.0, 0.0], 1)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> SkipNonfiniteState:
        return SkipNonfiniteState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Tree, state: SkipNonfiniteState, params: Tree = None, **extra: Any):
        require_axis(axis_name, "skip_nonfinite")
        bad = [jnp.sum(~jnp.isfinite(g), dtype=jnp.int32) for g in jax.tree.leaves(updates)]
        count = sum_over_shards(bad, axis_name)
        count = count if axis_name is None else lax.psum(count, axis_name)
        clean = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), updates)
        new, new_inner = inner.update(clean, state.inner, params, **extra)
        keep = lambda a, b: jax.tree.map(lambda x, y: jnp.where(count == 0, x, y), a, b)
        new = jax.tree.map(lambda x: jnp.where(count == 0, x, 0), new)
        skipped = state.skipped + (count > 0).astype(jnp.int32)
        return new, SkipNonfiniteState(skipped, keep(new_inner, state.inner))

    return optax.GradientTransformationExtraArgs(init, update)
