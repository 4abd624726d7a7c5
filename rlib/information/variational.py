"""Lower bounds of mutual information from a learnt critic f(x, y). All in nats.

A critic scores every pair of a batch; the matrix of scores has the pairs of the joint distribution
on its diagonal and pairs of the product of marginals off it. The bounds are pure functions of such
a matrix, as Poole et al. (2019, arXiv 1905.06922) write them:

    NWJ        E[f] - E'[exp(f - 1)]                          Nguyen, Wainwright, Jordan 2010
    DV         E[f] - log E'[exp f]                           Donsker, Varadhan 1983
    InfoNCE    E[f_ii - log mean_j exp f_ij] <= log batch     van den Oord et al., 1807.03748
    SMILE      DV with exp f clipped to exp(+-tau) in E'      Song, Ermon, 1910.06222
    JS         -E[softplus(-f)] - E'[softplus f], which trains SMILE's critic; no bound of I itself

MINE (Belghazi et al., 1801.04062) is DV, its gradient with a moving average for E'[exp f].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from rlib import nn, optim
from rlib.information.rows import matrices
from rlib.training import descend

Scores = Float[Array, "b b"]

#: Pairs that are read as one batch: its matrix of scores is of 64 MB.
MOST_HELD_OUT = 4096
_SCORES_AT_ONCE = 2**16  # of a critic whose network each pair passes

# Bounds


def _pairs(scores: Scores) -> int:
    """Number of pairs off the diagonal."""
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 2:
        raise ValueError(
            f"scores of shape {scores.shape}: (b, b) with b of at least 2 is needed, since pairs "
            "off the diagonal stand for independent ones"
        )
    return scores.size - len(scores)


def _joint(scores: Scores) -> Array:
    return jnp.mean(jnp.diagonal(scores))


def _log_mean_exp(scores: Scores) -> Array:
    """log E'[exp f], off the diagonal."""
    pairs = _pairs(scores)
    off = jnp.where(jnp.eye(len(scores), dtype=bool), -jnp.inf, scores)
    return logsumexp(off) - np.log(pairs)


def nwj(scores: Scores) -> Float[Array, ""]:
    """E[f] - E'[exp(f - 1)]; unbiased, and its variance grows as exp I.

    Overflows to -inf in float32 where scores pass 89.

    >>> float(nwj(jnp.ones((3, 3))))  # f = 1 + log of the density ratio, here 1
    0.0
    """
    return _joint(scores) - jnp.exp(_log_mean_exp(scores) - 1)


def donsker_varadhan(scores: Scores) -> Float[Array, ""]:
    """E[f] - log E'[exp f]; biased upwards in a finite batch.

    >>> float(donsker_varadhan(jnp.full((3, 3), 7.0)))
    0.0
    """
    return _joint(scores) - _log_mean_exp(scores)


def infonce(scores: Scores) -> Float[Array, ""]:
    """E[f_ii - log mean_j exp f_ij]; at most log b.

    >>> round(float(infonce(100 * jnp.eye(8))), 4)  # log 8
    2.0794
    """
    _pairs(scores)
    return _joint(scores - logsumexp(scores, axis=1, keepdims=True)) + np.log(len(scores))


def smile(scores: Scores, clip: float = 5.0) -> Float[Array, ""]:
    """E[f] - log E'[exp of f clipped to +-`clip`]; no bound any more, of smaller variance.

    >>> round(float(smile(jnp.full((3, 3), 7.0))), 4)
    2.0
    """
    return _joint(scores) - _log_mean_exp(jnp.clip(scores, -clip, clip))


def jensen_shannon(scores: Scores) -> Float[Array, ""]:
    """-E[softplus(-f)] - E'[softplus f]: its best f is the log-ratio of the densities.

    >>> round(float(jensen_shannon(jnp.zeros((2, 2)))), 4)  # -2 log 2
    -1.3863
    """
    pairs = _pairs(scores)
    marginal = jnp.sum(jax.nn.softplus(scores)) - jnp.sum(jax.nn.softplus(jnp.diagonal(scores)))
    return -jnp.mean(jax.nn.softplus(-jnp.diagonal(scores))) - marginal / pairs


def mine(
    scores: Scores, log_average: Float[Array, ""], rate: float = 0.01
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What MINE ascends, E[f] - E'[exp f] / a, and the new logarithm of its moving average a.

    Its gradient is DV's with a in place of the batch's own mean, which takes away most of the bias
    of a ratio of small samples (1801.04062, section 3.2). Its value means nothing.

    Args:
        log_average: log a; -inf before the first batch.
        rate: of the moving average.

    >>> float(mine(jnp.zeros((2, 2)), -jnp.inf)[1])
    0.0
    """
    log_mean = _log_mean_exp(scores)
    now = lax.stop_gradient(log_mean)
    moved = jnp.logaddexp(np.log1p(-rate) + log_average, np.log(rate) + now)
    log_average = jnp.where(jnp.isneginf(log_average), now, moved)
    return _joint(scores) - jnp.exp(log_mean - log_average), log_average


class Bound(NamedTuple):
    """How a critic is trained and read.

    Fields:
        ascend: (scores, log of a moving average) -> what to maximise, the new one.
        estimate: scores -> mutual information in nats.
    """

    ascend: Callable[[Array, Array], tuple[Array, Array]]
    estimate: Callable[[Array], Array]


def _plain(objective: Callable[[Array], Array]) -> Callable[[Array, Array], tuple[Array, Array]]:
    return lambda scores, log_average: (objective(scores), log_average)


BOUNDS = {
    "nwj": Bound(_plain(nwj), nwj),
    "infonce": Bound(_plain(infonce), infonce),
    "mine": Bound(mine, donsker_varadhan),
    "smile": Bound(_plain(jensen_shannon), smile),
}

# Critics


class SeparableCritic(nnx.Module):
    """f(x, y) = g(x) . h(y): all pairs of a batch for the price of one product.

    >>> critic = SeparableCritic(2, 3, rngs=nnx.Rngs(0))
    >>> critic(jnp.ones((5, 2)), jnp.ones((5, 3))).shape
    (5, 5)
    """

    def __init__(
        self,
        inputs_x: int,
        inputs_y: int,
        *,
        widths: tuple[int, ...] = (64, 64),
        features: int = 32,
        rngs: nnx.Rngs,
    ):
        self.g = nn.Perceptron((inputs_x, *widths, features), rngs=rngs)
        self.h = nn.Perceptron((inputs_y, *widths, features), rngs=rngs)

    def __call__(self, x: Float[Array, "b dx"], y: Float[Array, "b dy"]) -> Scores:
        return self.g(x) @ self.h(y).T


class ConcatenatedCritic(nnx.Module):
    """f(x, y) = g([x, y]): b^2 passes through the network.

    >>> critic = ConcatenatedCritic(2, 3, rngs=nnx.Rngs(0))
    >>> critic(jnp.ones((5, 2)), jnp.ones((5, 3))).shape
    (5, 5)
    """

    def __init__(
        self, inputs_x: int, inputs_y: int, *, widths: tuple[int, ...] = (64, 64), rngs: nnx.Rngs
    ):
        self.g = nn.Perceptron((inputs_x + inputs_y, *widths, 1), rngs=rngs)

    def __call__(self, x: Float[Array, "b dx"], y: Float[Array, "b dy"]) -> Scores:
        def of_row(row):
            left = jnp.broadcast_to(row, (len(y), len(row)))
            return self.g(jnp.concatenate([left, y], axis=-1))[:, 0]

        rows = max(1, _SCORES_AT_ONCE // len(y))
        return jax.vmap(of_row)(x) if rows >= len(x) else lax.map(of_row, x, batch_size=rows)


# Training


def fit_critic(
    key: jax.Array,
    x: Float[Array, "n dx"],
    y: Float[Array, "n dy"],
    bound: str,
    *,
    critic: Callable[..., nnx.Module] = SeparableCritic,
    learning_rate: float | Array = 1e-3,
    steps: int = 1000,
    batch: int = 128,
    looks: int = 1,
    held_out: float = 0.5,
) -> Float[Array, " looks"]:
    """Estimates of I(X; Y) in nats along the training of a critic, by Adam.

    The critic learns from a part of the pairs, standardised, and is read on the others: on pairs
    that it has seen, the bounds are not valid, and far too high. They are read as one batch, or in
    batches of at most 4096 whose mean it is (log 4096, InfoNCE's limit, is 8.3 nats; a remainder of
    fewer pairs than batches is left out), so that memory does not grow with the square of n.
    Works under `vmap`, over learning rates as well; NaN in traced samples gives NaN. A step whose
    gradient is not finite is skipped: a critic whose scores overflow stays as it is, and is read.

    Args:
        x, y: pairs, as rows; computed with in float32.
        bound: "nwj", "infonce", "mine" or "smile".
        critic: SeparableCritic, ConcatenatedCritic or alike.
        steps: a multiple of `looks`.
        batch: pairs of a step, drawn with replacement.
        held_out: the fraction of pairs that estimate.

    Raises:
        ValueError: an unknown bound, X and Y of different lengths, fewer than two pairs in a part
            or a batch, samples that are not matrices or hold NaN or infinite values.

    >>> estimates = lambda key, x: fit_critic(key, x, x, "smile", steps=4, batch=8, looks=2)
    >>> jax.eval_shape(estimates, jax.random.key(0), jnp.zeros((32, 1))).shape
    (2,)
    """
    if bound not in BOUNDS:
        raise ValueError(f"bound={bound!r}: choose from {', '.join(BOUNDS)}")
    x, y = (v.astype(jnp.float32) for v in matrices("fit_critic", x=x, y=y))
    if len(x) != len(y):
        raise ValueError(f"{len(x)} samples of X and {len(y)} of Y do not make pairs")
    learnt = len(x) - int(len(x) * held_out)
    if min(learnt, len(x) - learnt, batch) < 2:
        raise ValueError(
            f"{learnt} pairs to learn from in batches of {batch} and {len(x) - learnt} held out: "
            "each must be at least 2"
        )
    ascend, estimate = BOUNDS[bound]
    first, second = jax.random.split(key)
    model = critic(x.shape[1], y.shape[1], rngs=nnx.Rngs(first))
    graphdef, params = nnx.split(model)

    def standardised(v):
        width = jnp.std(v[:learnt], axis=0)
        return (v - jnp.mean(v[:learnt], axis=0)) / jnp.where(width > 0, width, 1)

    x, y = standardised(x), standardised(y)

    def loss(params, key, log_average):
        rows = jax.random.randint(key, (batch,), 0, learnt)
        value, log_average = ascend(nnx.merge(graphdef, params)(x[rows], y[rows]), log_average)
        return -value, log_average

    groups = -(-(len(x) - learnt) // MOST_HELD_OUT)
    held = [v[learnt:][: (len(x) - learnt) // groups * groups] for v in (x, y)]
    held = [v.reshape(groups, -1, v.shape[1]) for v in held]

    def look(params):
        read = lambda pair: estimate(nnx.merge(graphdef, params)(*pair))
        return jnp.mean(lax.map(read, tuple(held)))

    keys = jax.random.split(second, steps)
    start = jnp.float32(-jnp.inf)
    optimizer = optim.skip_nonfinite(optax.adam(learning_rate))
    return descend(loss, params, optimizer, keys, start, looks=looks, look=look).seen
