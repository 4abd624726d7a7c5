"""Federated averaging and its relatives: FedAvg, FedProx, FedSAM, server optimisers, FedExP.

| | |
| --- | --- |
| FedAvg, FedSGD | McMahan et al., arXiv 1602.05629 |
| FedProx | Li et al., arXiv 1812.06127: mu / 2 |x - x^t|^2 is added to each client's loss |
| FedSAM | Qu et al., arXiv 2206.02618: gradients at x + rho g / |g| |
| FedAdam, FedAdagrad, FedYogi, server momentum | Reddi et al., arXiv 2003.00295: any `server` |
| FedExP | Jhunjhunwala et al., arXiv 2301.09604: a server rate from the clients' agreement |

What a client sends is x^t - x_K, so that it is subtracted like a gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from rlib.federated.clients import Batches, Grad, local_steps
from rlib.federated.engine import Algorithm, Cohort

Tree = Any


def fedavg(
    local: optax.GradientTransformation,
    server: optax.GradientTransformation | None = None,
    *,
    proximal: float = 0.0,
    ascent: float = 0.0,
    scale: Callable[[Array], Array | float] = lambda round: 1.0,
) -> Algorithm:
    """FedAvg, and with its options FedProx, FedSAM and federated optimisers.

    Args:
        local: the clients' optimiser, begun anew in every round.
        server: the optimiser that takes the mean of x^t - x_K for a gradient; None is `sgd(1.0)`,
            the plain average of the clients' models.
        proximal: mu of FedProx.
        ascent: rho of FedSAM; 0 as a number saves the second gradient.
        scale: factor of the clients' updates by round, for decaying rates.

    >>> algorithm = fedavg(optax.sgd(0.1), optax.adam(1e-2), proximal=0.01)  # FedAdam with FedProx
    >>> algorithm.init(jnp.zeros(2))[0].mu
    Array([0., 0.], dtype=float32)
    """
    tx = server or optax.sgd(1.0)
    near, uphill = not is_zero(proximal), not is_zero(ascent)

    def down(params: Tree, server: Tree, round: Array) -> tuple[Tree, Array]:
        return params, jnp.asarray(scale(round), jnp.float32)

    def work(client: Tree, down: tuple[Tree, Array], batches: Batches, grad: Grad):
        start, factor = down

        def step(carry: tuple[Tree, Tree], batch: Batches):
            x, state = carry
            loss, g = sam_gradient(grad, x, batch, ascent) if uphill else grad(x, batch)
            if near:
                g = jax.tree.map(lambda g, x, x0: g + proximal * (x - x0), g, x, start)
            updates, state = local.update(g, state, x)
            updates = jax.tree.map(lambda u: factor.astype(u.dtype) * u, updates)
            return (optax.apply_updates(x, updates), state), loss

        (x, _), loss = local_steps(step, (start, local.init(start)), batches)
        return jax.tree.map(jnp.subtract, start, x), client, {"loss": loss}

    def apply(params: Tree, state: Tree, delta: Tree, cohort: Cohort):
        updates, state = tx.update(delta, state, params)
        return optax.apply_updates(params, updates), state, {}

    return Algorithm(work, apply, down=down, init=tx.init)


def fedexp(local: optax.GradientTransformation, epsilon: float = 1e-3) -> Algorithm:
    """FedExP: the server's rate is max(1, mean |Delta_i|^2 / (2 (|mean Delta|^2 + epsilon))).

    >>> algorithm = fedexp(optax.sgd(0.1))
    >>> message = (jnp.array([1.0, 0.0]), jnp.array(6.0))  # mean Delta, mean |Delta_i|^2
    >>> cohort = Cohort(jnp.int32(4), jnp.float32(1.0), jnp.int32(0))
    >>> params, _, found = algorithm.apply(jnp.zeros(2), (), message, cohort)
    >>> round(float(found["alpha"]), 2), round(float(params[0]), 2)
    (3.0, -3.0)
    """
    plain = fedavg(local)

    def work(client: Tree, down: Tree, batches: Batches, grad: Grad):
        delta, client, scalars = plain.local(client, down, batches, grad)
        return (delta, squared_norm(delta)), client, scalars

    def apply(params: Tree, state: Tree, mixed: tuple[Tree, Array], cohort: Cohort):
        delta, mean_square = mixed
        alpha = jnp.maximum(1.0, mean_square / (2 * (squared_norm(delta) + epsilon)))
        params = jax.tree.map(lambda x, d: x - alpha.astype(d.dtype) * d, params, delta)
        return params, state, {"alpha": alpha}

    return Algorithm(work, apply, down=plain.down)


def sam_gradient(
    grad: Grad, params: Tree, batch: Batches, rho: float, *, normalize: bool = True
) -> tuple[Float[Array, ""], Tree]:
    """(loss at x, gradient at x + rho g / (|g| + 1e-7)) on one batch; |g| over all parameters.

    Args:
        grad: of the engine.
        normalize: False takes x + rho g.

    >>> grad = lambda x, batch: (x**2 / 2, x)
    >>> loss, g = sam_gradient(grad, jnp.array(3.0), None, rho=0.5)
    >>> round(float(loss), 3), round(float(g), 3)
    (4.5, 3.5)
    """
    loss, g = grad(params, batch)
    return loss, ascended_gradient(grad, params, g, batch, rho, normalize=normalize)


def ascended_gradient(
    grad: Grad, params: Tree, g: Tree, batch: Batches, rho: float, *, normalize: bool = True
) -> Tree:
    """As `sam_gradient`, where the gradient g at x is known.

    >>> grad = lambda x, batch: (x**2 / 2, x)
    >>> float(ascended_gradient(grad, jnp.array(3.0), 3.0, None, rho=0.5, normalize=False))
    4.5
    """
    scale = rho / (jnp.sqrt(squared_norm(g)) + 1e-7) if normalize else jnp.float32(rho)
    moved = jax.tree.map(lambda x, g: x + (scale * g).astype(jnp.result_type(x)), params, g)
    return grad(moved, batch)[1]


def is_zero(value: Any) -> bool:
    """Known to be 0 while tracing; an array is not, so that it can be mapped over."""
    return isinstance(value, int | float) and value == 0


def squared_norm(tree: Tree) -> Float[Array, ""]:
    """Over all leaves, in float32 at least."""
    wide = lambda x: jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
    return optax.tree.norm(jax.tree.map(wide, tree), squared=True)
