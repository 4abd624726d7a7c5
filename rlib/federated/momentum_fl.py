"""FedAvg-M, SCAFFOLD-M and their variance-reduced forms (Cheng et al., arXiv 2306.16504).

No code was published; FedAvg-M is FedCM (arXiv 2106.10874), for which FL-Simulator has code.

| | paper | FL-Simulator | here |
| --- | --- | --- | --- |
| beta | weighs the fresh gradient | as FedCM's alpha, the same | paper |
| clip | none | momentum and correction are clipped with the gradient | none |
| K | equal | that of client 0, from its size | steps that a client made |
| unit of g | a gradient | rescaled by the last round's decayed rate | a gradient |
| c_i | mean of raw gradients | c_i - c + (x - y) / (K eta), right for beta = 1 only | paper |
| server step | x - gamma g | rate 1, gamma = eta K | `gamma` |
| c | moves by 1/N of the sum over the sampled | the same | by the clients' weights p_i |
| g^0 of the variance-reduced forms | a gradient at x^0 | - | round 0 takes beta = 1, or `g0` |
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from rlib import optim
from rlib.federated.clients import Batches, Grad, local_steps
from rlib.federated.engine import Algorithm, Cohort

Tree = Any


class MomentumServer(NamedTuple):
    """What the server keeps.

    Fields:
        g: the running estimate of the global gradient, or () where it is not used.
        c: the mean of the clients' control variates, or ().
        previous: the model before the last round, or ().
        started: whether g means something, for the variance-reduced forms.
    """

    g: Tree
    c: Tree
    previous: Tree
    started: Tree


def fedavg_m(
    eta: float,
    gamma: float,
    beta: float,
    *,
    variance_reduced: bool = False,
    g0: Tree | None = None,
) -> Algorithm:
    """FedAvg-M: every local step mixes the fresh gradient with the last round's mean direction.

    At a fixed step it ends where FedAvg of step beta eta would, so the drift is smaller, not gone.
    With beta = 1 and gamma = eta K it is FedAvg.

    Args:
        eta: rate of the local steps.
        gamma: rate of the server's step along g; eta K goes to the mean of the clients' models.
        beta: weight of the fresh gradient, in (0, 1].
        variance_reduced: FedAvg-M-VR, which takes two gradients of the same examples a step, the
            other one at the previous global model. Fragile where eta L is not small.
        g0: the first g; zeros, and with `variance_reduced` beta = 1 in round 0, if None.

    >>> algorithm = fedavg_m(0.1, gamma=1.0, beta=0.1)
    >>> algorithm.apply(jnp.array(4.0), algorithm.init(jnp.array(4.0)), jnp.array(0.5), None)[0]
    Array(3.5, dtype=float32)
    """
    return _momentum(eta, gamma, beta, variance_reduced, g0, control=False, anchored=True)


def scaffold(eta: float, gamma: float) -> Algorithm:
    """SCAFFOLD (Karimireddy et al., arXiv 1910.06378), with mean gradients for control variates.

    Args:
        eta: rate of the local steps.
        gamma: rate of the server's step along the mean direction; eta K goes to the mean of the
            clients' models.

    >>> algorithm = scaffold(0.1, gamma=1.0)
    >>> algorithm.client(jnp.zeros(2)).tolist()
    [0.0, 0.0]
    """
    return _momentum(eta, gamma, 1.0, False, None, control=True, anchored=False)


def scaffold_m(
    eta: float,
    gamma: float,
    beta: float,
    *,
    variance_reduced: bool = False,
    g0: Tree | None = None,
) -> Algorithm:
    """SCAFFOLD-M: SCAFFOLD whose local steps mix in the last round's mean direction.

    Unbiased at fixed steps. Every client keeps a control variate as large as the model.

    Args:
        eta, gamma, beta, variance_reduced, g0: as `fedavg_m`.

    >>> algorithm = scaffold_m(0.1, gamma=1.0, beta=0.1)
    >>> [jnp.shape(part) for part in algorithm.init(jnp.zeros(2))[:2]]
    [(2,), (2,)]
    """
    return _momentum(eta, gamma, beta, variance_reduced, g0, control=True, anchored=True)


def _momentum(eta, gamma, beta, variance_reduced: bool, g0, *, control: bool, anchored: bool):
    zeros = lambda params: optax.tree.zeros_like(params, dtype=jnp.float32)
    optim.scale_by_global_momentum(beta)  # checks it

    def init(params: Tree) -> MomentumServer:
        g = zeros(params)
        if g0 is not None:
            g = jax.tree.map(lambda zero, x: zero + jnp.asarray(x, jnp.float32), g, g0)
        return MomentumServer(
            g=g if anchored else (),
            c=zeros(params) if control else (),
            previous=params if variance_reduced else (),
            started=jnp.asarray(g0 is not None),
        )

    def down(params: Tree, server: MomentumServer, round: Array):
        weight = jnp.float32(beta)
        if variance_reduced:
            weight = jnp.where(server.started, weight, 1.0)
        return params, server._replace(started=()), weight

    def local(own: Tree, down: tuple[Tree, MomentumServer, Array], batches: Batches, grad: Grad):
        start, server, weight = down
        direction = optim.scale_by_global_momentum(weight, variance_reduced=variance_reduced)
        shift = jax.tree.map(jnp.subtract, own, server.c) if control else None
        anchor = server.g if anchored else zeros(start)

        def step(x: Tree, batch: Batches):
            loss, fresh = grad(x, batch)
            old = grad(server.previous, batch)[1] if variance_reduced else None
            d, _ = direction.update(
                fresh, direction.init(x), g=anchor, control=shift, previous_grad=old
            )
            x = jax.tree.map(lambda x, d: x - (eta * d).astype(x.dtype), x, d)
            return x, (loss, fresh if control else ())

        x, (loss, mean_gradient) = local_steps(step, start, batches)
        per = eta * batches.steps
        moved = jax.tree.map(lambda a, b: (a - b).astype(jnp.float32) / per, start, x)
        if not control:
            return moved, own, {"loss": loss}
        change = jax.tree.map(jnp.subtract, mean_gradient, own)
        return (moved, change), mean_gradient, {"loss": loss}

    def apply(params: Tree, server: MomentumServer, mixed: Tree, cohort: Cohort):
        g, c = mixed if control else (mixed, ())
        if control:
            c = jax.tree.map(lambda old, change: old + cohort.share * change, server.c, c)
        new = jax.tree.map(lambda x, g: x - (gamma * g).astype(x.dtype), params, g)
        previous = params if variance_reduced else ()
        return new, MomentumServer(g if anchored else (), c, previous, jnp.asarray(True)), {}

    client = zeros if control else (lambda params: ())
    return Algorithm(local, apply, down=down, init=init, client=client)
