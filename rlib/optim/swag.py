"""SWAG: a Gaussian posterior of the weights from the path of SGD, recorded by an optax transform.

Maddox et al., "A Simple Baseline for Bayesian Uncertainty in Deep Learning", arXiv 1902.02476.
Once an epoch, from some step on, the weights theta update a running mean and a running variance v;
the last K deviations D of theta from the mean are kept. The posterior is

    N(mean, diag(v) / 2 + D' D / (2 (K - 1))).

Deviations

| | paper | official code | here |
|---|---|---|---|
| v | second moment less squared mean | the same, at least 1e-30 | Welford's, at least `floor` |
| deviation of theta from | the mean so far | the mean that theta has updated | as the code |
| fewer than K deviations | not said | K - 1 still divides | as the code: empty slots are zero |
| sampler's covariance | half of each part | no halves in 2305.18887's copy | `scale`: 1/2, or 1 |

The difference of moments cancels in float32: late weights move by 1e-4 of themselves, and the
variance then lies at the rounding error of the square. Welford's update has the same limit without.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

Tree = Any


class SwagState(NamedTuple):
    """State of `record_swag`, and the posterior that `swag_sample` and `swag_log_density` read.

    Fields:
        count: steps done.
        recorded: weights recorded so far.
        mean: their mean, float32 as the rest.
        variance: their population variance, elementwise.
        deviations: the last K of them minus the mean of their time, axis K first, in no order.
    """

    count: Int[Array, ""]  # type: ignore[assignment]
    recorded: Int[Array, ""]
    mean: Tree
    variance: Tree
    deviations: Tree


def record_swag(start: int, every: int, rank: int = 10) -> optax.GradientTransformationExtraArgs:
    """Pass updates through and record the weights that they lead to.

    Last in a chain, where updates are what is added to the parameters; a transform after it would
    change the weights unseen. Under `optax.MultiSteps` steps are those of the wrapped optimiser.

    Args:
        start: steps before the first recorded epoch.
        every: steps an epoch: weights are recorded after steps start + every, start + 2 every, ...
        rank: K, deviations kept; 2 or more.

    Raises:
        ValueError: `start`, `every` or `rank` too small; an update without parameters.

    Example:
        >>> tx = optax.chain(optax.sgd(0.5), record_swag(start=0, every=1, rank=2))
        >>> x = jnp.array([4.0])
        >>> state = tx.init(x)
        >>> for _ in range(2):
        ...     updates, state = tx.update(x, state, x)
        ...     x = optax.apply_updates(x, updates)  # 2, 1
        >>> state[-1].mean, state[-1].variance
        (Array([1.5], dtype=float32), Array([0.25], dtype=float32))
    """
    if start < 0 or every < 1 or rank < 2:
        raise ValueError(
            f"record_swag: start={start}, every={every}, rank={rank}: at least 0, 1 and 2"
        )

    def init_fn(params: Tree) -> SwagState:
        zeros = lambda *lead: jax.tree.map(
            lambda p: jnp.zeros((*lead, *jnp.shape(p)), jnp.float32), params
        )
        zero = jnp.zeros((), jnp.int32)
        return SwagState(zero, zero, zeros(), zeros(), zeros(rank))

    def update_fn(updates: Tree, state: SwagState, params: Tree = None, **_: Any):
        if params is None:
            raise ValueError("record_swag: update(updates, state, params) needs the parameters")
        count = state.count + 1
        due = (count > start) & ((count - start) % every == 0)
        recorded = state.recorded + due
        weight = jnp.where(due, 1 / jnp.maximum(recorded, 1), 0.0)  # 0 leaves all as it was
        slot = (recorded - 1) % rank
        theta = optax.apply_updates(params, updates)
        from_old = jax.tree.map(lambda t, m: t.astype(jnp.float32) - m, theta, state.mean)
        mean = jax.tree.map(lambda m, d: m + weight * d, state.mean, from_old)
        from_new = jax.tree.map(lambda t, m: t.astype(jnp.float32) - m, theta, mean)
        variance = jax.tree.map(
            lambda v, old, new: v + weight * (old * new - v), state.variance, from_old, from_new
        )
        deviations = jax.tree.map(
            lambda kept, new: kept.at[slot].set(jnp.where(due, new, kept[slot])),
            state.deviations,
            from_new,
        )
        return updates, SwagState(count, recorded, mean, variance, deviations)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def swag_restrict(state: SwagState, select: Callable[[Tree], Tree]) -> SwagState:
    """The posterior of some parameters, the others integrated out.

    Args:
        select: from a tree shaped like the parameters to the part of it that stays.

    >>> tx = record_swag(0, 1)
    >>> swag_restrict(tx.init({"a": jnp.ones(2), "b": jnp.ones(3)}), lambda tree: tree["a"]).mean
    Array([0., 0.], dtype=float32)
    """
    return state._replace(
        mean=select(state.mean),
        variance=select(state.variance),
        deviations=select(state.deviations),
    )


def swag_sample(
    key: Key[Array, ""], state: SwagState, *, scale: float = 0.5, floor: float = 1e-30
) -> Tree:
    """One draw of the parameters, float32.

    Args:
        state: of `record_swag`.
        scale: of both parts of the covariance; SWAG's is 1/2.
        floor: least elementwise variance v.

    >>> tree = jax.tree.map(jnp.ones_like, record_swag(0, 1, rank=2).init(jnp.zeros(3)))
    >>> swag_sample(jax.random.key(0), tree).shape
    (3,)
    """
    leaves, treedef = jax.tree.flatten(state.mean)
    first, *keys = jax.random.split(key, len(leaves) + 1)
    deviations = jax.tree.leaves(state.deviations)
    rank = len(deviations[0])
    along = jax.random.normal(first, (rank,)) * math.sqrt(scale / (rank - 1))
    drawn = [
        m + jnp.sqrt(scale * jnp.maximum(v, floor)) * jax.random.normal(k, m.shape)
        + jnp.tensordot(along, d, axes=1)
        for k, m, v, d in zip(keys, leaves, jax.tree.leaves(state.variance), deviations,
                              strict=True)
    ]  # fmt: skip
    return jax.tree.unflatten(treedef, drawn)


def swag_log_density(
    state: SwagState, params: Tree, *, scale: float = 0.5, floor: float = 1e-30
) -> Float[Array, ""]:
    """Log density of parameters under the posterior, in nats.

    By Woodbury's identity on the K deviations, whitened by the diagonal part: no matrix larger
    than K by K is made. Weights that never moved have variance `floor`, and a distance of 1e-3 from
    such a mean costs 1e24 nats: raise the floor where that is not meant.

    Args:
        params: shaped like the recorded ones.
        scale, floor: as for `swag_sample`; the density of what it draws needs the same.

    Raises:
        ValueError: parameters of other shapes than the posterior's.

    >>> state = record_swag(0, 1, rank=2).init(jnp.zeros(1))._replace(variance=2 * jnp.ones(1))
    >>> float(swag_log_density(state, jnp.zeros(1)))
    -0.918938...
    """
    told = lambda tree: f"{jax.tree.structure(tree)}, {[*map(jnp.shape, jax.tree.leaves(tree))]}"
    given, known = told(params), told(state.mean)
    if given != known:
        raise ValueError(f"swag_log_density: parameters {given} of a posterior of {known}")
    rank = len(jax.tree.leaves(state.deviations)[0])

    def parts(p, mean, v, d):
        """Of one tensor: log sd, |w|^2, B w, B B' with w and B whitened by the diagonal."""
        sd = jnp.sqrt(scale * jnp.maximum(v, floor))
        w = ((p.astype(jnp.float32) - mean) / sd).ravel()
        b = (d / sd).reshape(rank, -1) * math.sqrt(scale / (rank - 1))
        gram = jnp.matmul(b, b.T, precision="highest")
        log_sd = jnp.sum(jnp.log(sd)) + 0.5 * math.log(2 * math.pi) * w.size
        return log_sd, jnp.sum(jnp.square(w)), jnp.matmul(b, w, precision="highest"), gram

    trees = (params, state.mean, state.variance, state.deviations)
    made = [parts(*leaves) for leaves in zip(*map(jax.tree.leaves, trees), strict=True)]
    log_sd, squares, bw, gram = (sum(part[1:], part[0]) for part in zip(*made, strict=True))
    factor = jnp.linalg.cholesky(jnp.eye(rank) + gram)
    within = jax.scipy.linalg.solve_triangular(factor, bw, lower=True)
    half_log_det = log_sd + jnp.sum(jnp.log(jnp.diagonal(factor)))
    return -half_log_det - 0.5 * (squares - jnp.sum(jnp.square(within)))
