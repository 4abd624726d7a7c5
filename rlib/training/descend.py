"""A small training: one compiled loop without mesh or checkpoints, to be mapped over settings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax import lax
from jaxtyping import Array

Tree = Any


class Descent(NamedTuple):
    """What `descend` gives.

    Fields:
        params: the last parameters.
        state: the optimiser's, for example with the number of skipped steps.
        carry: the last one.
        seen: what `look` gave, stacked.
    """

    params: Tree
    state: Tree
    carry: Tree
    seen: Tree


def descend(
    loss: Callable[[Tree, Tree, Tree], tuple[Array, Tree]],
    params: Tree,
    optimizer: optax.GradientTransformation,
    inputs: Tree,
    carry: Tree = None,
    *,
    looks: int = 1,
    look: Callable[[Tree], Tree] = lambda params: None,
    before: bool = False,
) -> Descent:
    """One gradient step for each of `inputs`, in one loop; pure, so it works under `vmap`.

    Nothing guards it: with `optim.skip_nonfinite(optimizer)` steps whose gradient is not finite
    are left out, and `state.skipped` counts them.

    Args:
        loss: (parameters, input, carry) -> value to minimise, new carry.
        inputs: keys, batches or both, with a leading axis over steps.
        carry: the first one.
        look: what to compute of the parameters, `looks` times at equal distances.
        before: look before the steps of each distance, not after.

    Raises:
        ValueError: `looks` does not divide the steps.

    >>> import jax.numpy as jnp
    >>> loss = lambda x, target, carry: ((x - target) ** 2, carry)
    >>> found = descend(
    ...     loss, jnp.zeros(()), optax.sgd(0.25), jnp.full(4, 8.0), looks=2, look=lambda x: x
    ... )
    >>> float(found.params), found.seen.tolist()
    (7.5, [6.0, 7.5])
    """
    steps = len(jax.tree.leaves(inputs)[0])
    if looks < 1 or steps % looks:
        raise ValueError(f"{steps} steps are not divisible into {looks} looks")

    def step(state: tuple[Tree, Tree, Tree], given: Tree) -> tuple[tuple[Tree, Tree, Tree], None]:
        params, slots, carry = state
        grads, carry = jax.grad(loss, has_aux=True)(params, given, carry)
        updates, slots = optimizer.update(grads, slots, params)
        return (optax.apply_updates(params, updates), slots, carry), None

    def stretch(state: tuple[Tree, Tree, Tree], given: Tree) -> tuple[Any, Tree]:
        old = state
        state, _ = lax.scan(step, state, given)
        return state, look(old[0] if before else state[0])

    stretches = jax.tree.map(lambda x: x.reshape(looks, steps // looks, *x.shape[1:]), inputs)
    last, seen = lax.scan(stretch, (params, optimizer.init(params), carry), stretches)
    return Descent(*last, seen)
