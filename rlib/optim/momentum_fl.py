"""Directions of local steps with a global momentum (Cheng et al., arXiv 2306.16504).

One vector that travels down with the model, the running estimate g of the global gradient, anchors
every local step. beta weighs the fresh gradient, where most frameworks weigh the old one.
"""

from typing import Any

import jax
import optax

Tree = Any


def scale_by_global_momentum(
    beta: Any, *, variance_reduced: bool = False
) -> optax.GradientTransformationExtraArgs:
    """beta (grad - c_i + c) + (1 - beta) g, the local direction of FedAvg-M and SCAFFOLD-M.

    Variance-reduced: grad - beta (c_i - c) + (1 - beta) (g - previous_grad), where previous_grad is
    the gradient of the same examples at the previous global model. With beta = 1 both are
    SCAFFOLD's, without control variates FedAvg's; with one local step they are SGD with momentum
    and STORM.

    Args:
        beta: in (0, 1], the weight of the fresh gradient; a number or an array.

    The update takes, by name:
        g: the global gradient's estimate, like the gradient.
        control: c_i - c, or None.
        previous_grad: with `variance_reduced`.

    Raises:
        ValueError: beta outside (0, 1]; `previous_grad` missing.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_global_momentum(0.25)
    >>> float(tx.update(jnp.array(8.0), tx.init(None), g=jnp.array(4.0))[0])
    5.0
    """
    if isinstance(beta, int | float) and not 0 < beta <= 1:
        raise ValueError(f"beta={beta} is the weight of the fresh gradient, in (0, 1]")

    def update(grads, state, params=None, *, g, control=None, previous_grad=None, **extra):
        if control is not None:
            shift = 1.0 if not variance_reduced else beta
            grads = jax.tree.map(lambda x, c: x - shift * c, grads, control)
        if not variance_reduced:
            return jax.tree.map(lambda x, g: beta * x + (1 - beta) * g, grads, g), state
        if previous_grad is None:
            raise ValueError("variance_reduced: update(..., previous_grad=) is missing")
        mixed = lambda x, g, old: x + (1 - beta) * (g - old)
        return jax.tree.map(mixed, grads, g, previous_grad), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
