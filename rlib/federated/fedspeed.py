"""FedSpeed (Sun et al., arXiv 2302.10429): long local phases that neither drift nor over-fit.

A proximal term keeps clients near the server's model, a dual variable of each client takes away the
bias of that term, and gradients are taken after a step uphill.

| | paper | official code | here |
| --- | --- | --- | --- |
| dual part of the model | mean over the sampled | over all | `dual_average="all"` or "sampled" |
| prox strength | 1 / lambda | `lamb` = 1 / lambda | `prox` is lambda |
| quasi-gradient | (1 - alpha) g1 + alpha g2 | alpha g2 | paper |
| ascent | rho g1 in the theory | rho g1 / (norm + 1e-7) | code; `normalize=False` |
| dual | g_hat_i | h_i = -lambda g_hat_i, the sum of displacements | g_hat_i |
| clip, decay | none | clip with the dual, before prox and decay | `local` takes all but decay |
| sampling | S clients | each with probability S / m | the engine's |
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from rlib.federated.averaging import ascended_gradient, is_zero
from rlib.federated.clients import Batches, Grad, local_steps
from rlib.federated.engine import Algorithm, Cohort

Tree = Any


def fedspeed(
    local: optax.GradientTransformation,
    prox: float = 10.0,
    ascent: float = 0.1,
    mixing: float = 1.0,
    *,
    normalize: bool = True,
    dual_average: Literal["all", "sampled"] = "all",
) -> Algorithm:
    """FedSpeed. Every client keeps a dual variable as large as the model, in float32.

    Args:
        local: the clients' optimiser, begun anew in every round; `sgd(eta)` in the paper, with
            eta / lambda below 1.
        prox: lambda; the proximal term is |x - x^t|^2 / (2 lambda).
        ascent: rho, how far uphill the second gradient is taken; 0 saves it.
        mixing: alpha, the weight of the second gradient.
        normalize: go uphill by rho, not by rho times the gradient.
        dual_average: over whom the dual part of the new model is averaged. "sampled" is the
            paper's; with few clients a round it goes too far.

    Raises:
        ValueError: a prox that is not positive, a mixing outside [0, 1], another average.

    >>> algorithm = fedspeed(optax.sgd(0.1))
    >>> params, mean, _ = algorithm.apply(
    ...     jnp.array(4.0), algorithm.init(jnp.array(4.0)), jnp.array(2.0),
    ...     Cohort(jnp.int32(2), jnp.float32(1.0), jnp.int32(0)),
    ... )
    >>> float(params), float(mean)  # 4 - 2 - 2
    (0.0, 2.0)
    """
    if isinstance(prox, int | float) and not prox > 0:
        raise ValueError(f"prox={prox}: lambda must be positive")
    if isinstance(mixing, int | float) and not 0 <= mixing <= 1:
        raise ValueError(f"mixing={mixing} is outside [0, 1]")
    if dual_average not in ("all", "sampled"):
        raise ValueError(f'dual_average={dual_average!r}; it must be "all" or "sampled"')
    uphill = not is_zero(ascent)
    zeros = lambda params: optax.tree.zeros_like(params, dtype=jnp.float32)

    def work(dual: Tree, start: Tree, batches: Batches, grad: Grad):
        def step(carry: tuple[Tree, Tree], batch: Batches):
            x, state = carry
            loss, g = grad(x, batch)
            if uphill:
                second = ascended_gradient(grad, x, g, batch, ascent, normalize=normalize)
                g = jax.tree.map(lambda a, b: (1 - mixing) * a + mixing * b, g, second)
            direction = jax.tree.map(
                lambda g, dual, x, x0: g - dual.astype(g.dtype) + (x - x0) / prox,
                g, dual, x, start,
            )  # fmt: skip
            updates, state = local.update(direction, state, x)
            return (optax.apply_updates(x, updates), state), loss

        (x, _), loss = local_steps(step, (start, local.init(start)), batches)
        moved = jax.tree.map(lambda x0, x: (x0 - x).astype(jnp.float32), start, x)
        dual = jax.tree.map(lambda dual, m: dual + m / prox, dual, moved)
        found = {"loss": loss, "dual norm": optax.tree.norm(dual)}
        if dual_average == "sampled":
            moved = jax.tree.map(lambda m, dual: m + prox * dual, moved, dual)
        return moved, dual, found

    def init(params: Tree) -> Tree:
        """The mean over all clients of lambda g_hat_i, what they have moved in all rounds."""
        return zeros(params) if dual_average == "all" else ()

    def apply(params: Tree, mean: Tree, moved: Tree, cohort: Cohort):
        if dual_average == "all":
            mean = jax.tree.map(lambda h, m: h + cohort.share * m, mean, moved)
            moved = jax.tree.map(jnp.add, moved, mean)
        params = jax.tree.map(lambda x, m: x - m.astype(jnp.result_type(x)), params, moved)
        return params, mean, {}

    return Algorithm(work, apply, init=init, client=zeros)
