"""FedHyper (Wang et al., arXiv 2310.03156): global and local rates that adapt during training.

The rates are `optim.fedhyper_g`, `fedhyper_sl` and `scale_by_fedhyper_cl`, whose module has the
equations and the table of deviations; here they meet clients and server.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from rlib import optim
from rlib.federated.clients import Batches, Grad, local_steps
from rlib.federated.engine import Algorithm, Cohort

Tree = Any


class FedHyperServer(NamedTuple):
    """What FedHyper's server keeps.

    Fields:
        previous: the last mean of x^t - x_K, which FedHyper-CL's clients get.
        alpha: state of the global rate, or ().
        beta: state of the rate that the server decides for its clients, or ().
        optimizer: state of the server's optimiser.
    """

    previous: Tree
    alpha: Tree
    beta: Tree
    optimizer: Tree


def fedhyper(
    beta: float,
    *,
    server: bool = True,
    client: Literal["constant", "sl", "cl"] = "constant",
    alpha: float = 1.0,
    gamma_alpha: optim.FedHyperBounds = 3.0,
    gamma_beta: optim.FedHyperBounds = 10.0,
    global_coef: float | None = None,
    momentum: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    variant: Literal["paper", "official"] = "paper",
) -> Algorithm:
    """FedHyper-G (`server`), -SL and -CL (`client`), and G + CL, on clients that do SGD.

    Args:
        beta: the clients' rate, with "sl" and "cl" the first one.
        server: schedule the global rate (G); otherwise it stays `alpha`.
        client: "constant"; "sl": the server schedules the rate, between rounds; "cl": every client
            does, within each round.
        alpha: the global rate, with `server` the first one.
        gamma_alpha, gamma_beta: bounds, relative to the first rates.
        global_coef: weight of the last round in "cl"; None is 1 / K, K the steps of the client.
        momentum: of the server, with G.
        optimizer: takes what G scaled for a gradient, for example Adam; None subtracts it.
        variant: "official": the rules of the table in `optim.fedhyper`; its bounds and its
            global_coef, 0.1 over the sampled clients, are yours to give.

    Raises:
        ValueError: another `client`; as the transforms.

    >>> algorithm = fedhyper(0.05, client="cl")  # G + CL
    >>> float(algorithm.init(jnp.zeros(3)).alpha.rate)
    1.0
    """
    if client not in ("constant", "sl", "cl"):
        raise ValueError(f'client={client!r}; it must be "constant", "sl" or "cl"')
    scale = optim.scale_by_fedhyper_g(alpha, gamma_alpha, momentum, variant=variant)
    schedule = optim.fedhyper_sl(beta, gamma_beta, variant=variant)

    def client_rule(weight: Any) -> optax.GradientTransformationExtraArgs:
        return optim.scale_by_fedhyper_cl(beta, gamma_beta, global_coef=weight, variant=variant)

    client_rule(0.0)  # checks
    take = optimizer or optax.scale(-1.0)

    def init(params: Tree) -> FedHyperServer:
        zeros = jax.tree.map(jnp.zeros_like, params) if client == "cl" else ()
        global_rate = scale.init(params) if server else ()
        local_rate = schedule.init(params) if client == "sl" else ()
        return FedHyperServer(zeros, global_rate, local_rate, take.init(params))

    def down(params: Tree, kept: FedHyperServer, round: Array):
        return params, kept.beta.rate if client == "sl" else (), kept.previous

    def local(_: Tree, down: Tree, batches: Batches, grad: Grad):
        start, rate, previous = down
        rule = client_rule(1 / batches.steps if global_coef is None else global_coef)

        def step(carry: tuple[Tree, Tree], batch: Batches):
            x, state = carry
            loss, g = grad(x, batch)
            if client == "cl":
                g, state = rule.update(g, state, x, previous_delta=previous)
            else:
                g = jax.tree.map(lambda g: (rate if client == "sl" else beta) * g, g)
            return (jax.tree.map(lambda x, g: (x - g).astype(x.dtype), x, g), state), loss

        state = rule.init(start) if client == "cl" else ()
        (x, state), loss = local_steps(step, (start, state), batches)
        last = state.rate if client == "cl" else rate if client == "sl" else beta
        found = {"loss": loss, "beta": jnp.asarray(last, jnp.float32)}
        return jax.tree.map(jnp.subtract, start, x), (), found

    def apply(params: Tree, kept: FedHyperServer, delta: Tree, cohort: Cohort):
        found = {}
        previous = delta if client == "cl" else ()
        global_rate, local_rate = kept.alpha, kept.beta
        if client == "sl":
            _, local_rate = schedule.update(delta, kept.beta)
            found["beta clipped"] = local_rate.clipped
        if server:
            delta, global_rate = scale.update(delta, kept.alpha)
            found |= {"alpha": global_rate.rate, "alpha clipped": global_rate.clipped}
            found["inner"] = global_rate.inner
        else:
            delta = jax.tree.map(lambda d: alpha * d, delta)
        updates, slots = take.update(delta, kept.optimizer, params)
        kept = FedHyperServer(previous, global_rate, local_rate, slots)
        return optax.apply_updates(params, updates), kept, found

    return Algorithm(local, apply, down=down, init=init)
