"""The information bottleneck of a known distribution: self-consistent encoders, the bound, a fit.

Tishby, Pereira and Bialek, "The information bottleneck method" (arXiv physics/0004057): among all
encoders p(t|x), minimise I(X;T) - beta I(T;Y). A minimum satisfies

    p(t|x) = p(t) / Z(x) exp(-beta KL[p(y|x) || p(y|t)])
    p(t) = sum_x p(x) p(t|x),   p(y|t) = sum_x p(y|x) p(x|t)

and repeating these assignments never raises the functional. Informations are in bits; beta has no
unit. Inputs of equal p(y|x) can be merged first: the bound depends on p(y|x) alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import xlogy
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp


class IBState(NamedTuple):
    """An encoder and its place in the information plane.

    Fields:
        p_t_x: p(t|x), rows sum to 1.
        p_t: p(t).
        p_y_t: p(y|t), rows sum to 1; of an empty t, p(y).
        ixt, ity: I(X;T) and I(T;Y) in bits.
        functional: I(X;T) - beta I(T;Y) in bits, after each iteration.
    """

    p_t_x: Float[Array, "x t"]
    p_t: Float[Array, " t"]
    p_y_t: Float[Array, "t y"]
    ixt: Float[Array, ""]
    ity: Float[Array, ""]
    functional: Float[Array, " iterations"]


def _kl(p: Array, q: Array) -> Array:
    """KL[p_i || q_j] in nats, (i, j); infinite where q lacks a value that p has."""
    cross = -jnp.sum(xlogy(p[:, None, :], q[None, :, :]), axis=-1)
    return jnp.maximum(cross + jnp.sum(xlogy(p, p), axis=-1)[:, None], 0.0)


def _marginals(p_t_x: Array, p_x: Array, p_y_x: Array) -> tuple[Array, Array]:
    p_t = p_x @ p_t_x
    joint = (p_t_x * p_x[:, None]).T @ p_y_x
    empty = (p_t <= 0)[:, None]
    p_y_t = jnp.where(empty, p_x @ p_y_x, joint / jnp.where(empty, 1.0, p_t[:, None]))
    return p_t, p_y_t / jnp.sum(p_y_t, axis=1, keepdims=True)


def _informations(p_t_x: Array, p_t: Array, p_y_t: Array, p_x: Array, p_y_x: Array) -> Array:
    """(I(X;T), I(T;Y)) in bits."""
    p_y = p_x @ p_y_x
    ixt = jnp.sum(p_x[:, None] * (xlogy(p_t_x, p_t_x) - xlogy(p_t_x, p_t[None, :])))
    ity = jnp.sum(p_t[:, None] * (xlogy(p_y_t, p_y_t) - xlogy(p_y_t, p_y[None, :])))
    return jnp.maximum(jnp.stack([ixt, ity]), 0.0) / jnp.log(2.0)


@functools.partial(jax.jit, static_argnames="iterations")
def _iterate(p_xy: Array, beta: Array, p_t_x: Array, iterations: int) -> IBState:
    p_x = jnp.sum(p_xy, axis=1)
    # An input of probability 0 has no p(y|x): any row will do, and it weighs nothing.
    p_y_x = jnp.where(p_x[:, None] > 0, p_xy, 1.0)
    p_y_x = p_y_x / jnp.sum(p_y_x, axis=1, keepdims=True)

    def step(p_t_x: Array, _: None) -> tuple[Array, Array]:
        p_t, p_y_t = _marginals(p_t_x, p_x, p_y_x)
        # Every t may lack a y that the row of such an input has.
        kl = jnp.where(p_x[:, None] > 0, _kl(p_y_x, p_y_t), 0.0)
        log_weights = jnp.log(p_t) - beta * kl
        p_t_x = jax.nn.softmax(log_weights, axis=1)
        ixt, ity = _informations(p_t_x, *_marginals(p_t_x, p_x, p_y_x), p_x, p_y_x)
        return p_t_x, ixt - beta * ity

    p_t_x, functional = lax.scan(step, p_t_x, length=iterations)
    p_t, p_y_t = _marginals(p_t_x, p_x, p_y_x)
    ixt, ity = _informations(p_t_x, p_t, p_y_t, p_x, p_y_x)
    return IBState(p_t_x, p_t, p_y_t, ixt, ity, functional)


def _checked(p_xy: ArrayLike) -> Array:
    given = np.asarray(p_xy)
    if given.ndim != 2 or given.size == 0:
        raise ValueError(f"p(x, y) is (x, y) and not empty; got shape {given.shape}")
    if not np.isfinite(given).all() or (given < 0).any() or not given.sum() > 0:
        raise ValueError("p(x, y) needs finite probabilities that are not negative nor all 0")
    return jnp.asarray(given / given.sum(), jnp.result_type(float))


def information_bottleneck(
    p_xy: ArrayLike,
    beta: float,
    num_t: int,
    key: Key[Array, ""],
    *,
    iterations: int = 500,
) -> IBState:
    """Self-consistent equations from a random encoder: a local minimum of I(X;T) - beta I(T;Y).

    Args:
        p_xy: joint distribution (x, y), normalised here.
        beta: weight of I(T;Y), above 0 and finite; up to 1 the minimum is the trivial encoder.
        num_t: values of T; two or more for each value of Y avoid poor local minima.

    Raises:
        ValueError: `beta` or `num_t` out of range.

    >>> state = information_bottleneck(jnp.eye(2) / 2, 20.0, 4, jax.random.key(0))
    >>> round(float(state.ixt), 3), round(float(state.ity), 3)
    (1.0, 1.0)
    """
    if not 0 < beta < np.inf:
        raise ValueError(f"beta={beta}: above 0 and finite")
    if num_t < 1:
        raise ValueError(f"num_t={num_t}: at least one value of T")
    joint = _checked(p_xy)
    # Uniform among distributions, each row by itself.
    start = jax.random.exponential(key, (joint.shape[0], num_t), joint.dtype)
    start = start / jnp.sum(start, axis=1, keepdims=True)
    return _iterate(joint, jnp.asarray(beta, joint.dtype), start, iterations=iterations)


def information_bound(
    p_xy: ArrayLike, betas: ArrayLike, *, iterations: int = 200
) -> Float[np.ndarray, "betas 2"]:
    """(I(X;T), I(T;Y)) in bits along the bound, for each beta.

    Follows the minimum from large beta, where T = X is nearly optimal, to small: each beta starts
    from the encoder of the one above, which avoids the poor minima of random starts.

    Args:
        p_xy: joint distribution (x, y); merge inputs of equal p(y|x) first.
        betas: above 0 and finite, in any order; a dense grid follows the bound better.

    Raises:
        ValueError: no betas, or some out of range.

    >>> bound = information_bound(jnp.eye(2) / 2, [0.5, 20.0])
    >>> bound.round(3).tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """
    joint, grid = _checked(p_xy), np.asarray(betas, np.float64)
    if grid.ndim != 1 or grid.size == 0 or not ((grid > 0) & (grid < np.inf)).all():
        raise ValueError("betas: a list of at least one, all above 0 and finite")
    order = np.argsort(-grid)
    found = np.empty((len(grid), 2))
    found[order] = _follow(joint, jnp.asarray(grid[order], joint.dtype), iterations=iterations)
    return found


@functools.partial(jax.jit, static_argnames="iterations")
def _follow(joint: Array, ordered: Array, iterations: int) -> Array:
    def one(p_t_x: Array, beta: Array) -> tuple[Array, Array]:
        state = _iterate(joint, beta, p_t_x, iterations=iterations)
        # Encoders that died out at one beta must be able to move at the next.
        mixed = 0.999 * state.p_t_x + 0.001 / state.p_t_x.shape[1]
        return mixed, jnp.stack([state.ixt, state.ity])

    n = joint.shape[0]
    start = 0.9 * jnp.eye(n, dtype=joint.dtype) + 0.1 / n
    return lax.scan(one, start, ordered)[1]


class LayerFit(NamedTuple):
    """The optimal encoder nearest to a layer.

    Fields:
        beta: beta*; nan where it is undefined, as for cells that are all pure; the largest that
            was tried where the divergence still falls there, as for cells that tell all inputs.
        divergence: E_x KL[p(t|x) || p_beta*(t|x)] in bits.
        ixt, ity: the layer's own I(X;T) and I(T;Y) in bits.
    """

    beta: float
    divergence: float
    ixt: float
    ity: float


def layer_beta(
    cells: Int[np.ndarray, " rows"],
    p_y_x: Float[np.ndarray, "rows classes"],
    *,
    largest: float = 1e4,
) -> LayerFit:
    """beta* = argmin E_x KL[p(t|x) || p_beta(t|x)] of a deterministic layer (arXiv 1703.00810).

    p_beta is the self-consistent encoder with the layer's own p(t) and p(y|t). The mean divergence
    is convex in beta. beta* is chosen to bring the layer near the bound: "on the bound" says no
    more than that its divergence there is small. On the host, in float64.

    Args:
        cells: the value of T of each of the equiprobable inputs, for example `hash_rows`.
        p_y_x: p(y|x), rows sum to 1.
        largest: of the betas searched.

    Raises:
        ValueError: p(y|x) that is not one distribution a row.

    >>> soft = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9]])
    >>> fit = layer_beta(np.array([0, 0, 1, 1]), soft)
    >>> round(fit.ixt, 3), fit.beta > 1
    (1.0, True)
    """
    given = np.asarray(p_y_x, np.float64)
    if given.ndim != 2 or given.shape[0] != len(cells) or len(cells) == 0:
        raise ValueError(f"one p(y|x) a row: cells {np.shape(cells)}, p_y_x {given.shape}")
    if not np.isfinite(given).all() or (given < 0).any():
        raise ValueError("p(y|x) needs finite probabilities that are not negative")
    if not np.allclose(given.sum(axis=1), 1, atol=1e-5):
        raise ValueError("p(y|x): every row sums to 1")
    n = len(cells)
    _, t, counts = np.unique(cells, return_inverse=True, return_counts=True)
    levels, level, members = np.unique(given, axis=0, return_inverse=True, return_counts=True)
    level = level.reshape(-1)
    p_t = counts / n
    p_y_t = np.stack([np.bincount(t, column) for column in given.T], axis=1) / counts[:, None]
    p_y = given.mean(axis=0)

    def entropy(p: np.ndarray) -> np.ndarray:
        logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
        return -(p * logs).sum(axis=-1)

    ixt, ity = float(entropy(p_t)), float(entropy(p_y) - p_t @ entropy(p_y_t))
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = levels[:, None] * (np.log(levels[:, None]) - np.log(p_y_t[None]))
    kl = np.maximum(np.where(levels[:, None] > 0, terms, 0.0).sum(axis=-1), 0.0)
    own = kl[level, t].mean()

    def divergence(beta: float) -> float:
        """E_x of -log p_beta(t(x)|x), in bits."""
        log_z = logsumexp(-beta * kl, axis=1, b=p_t)
        return float((members @ log_z / n + beta * own) / np.log(2)) + ixt

    flat = np.isclose(divergence(1e-3), divergence(largest), rtol=1e-9, atol=1e-9)
    if flat and np.isclose(divergence(1.0), divergence(largest), rtol=1e-9, atol=1e-9):
        return LayerFit(float("nan"), divergence(1.0), ixt, ity)
    found = minimize_scalar(
        lambda log_beta: divergence(np.exp(log_beta)),
        bounds=(np.log(1e-3), np.log(largest)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return LayerFit(float(np.exp(found.x)), float(found.fun), ixt, ity)
