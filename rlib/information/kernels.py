"""Kernel estimators of divergence, dependence and entropy: Cauchy-Schwarz, HSIC, MMD, Renyi.

All take samples as rows, (N, d), Gaussian kernels exp(-|a - b|^2 / (2 sigma^2)), and return a
scalar; logarithms are natural, so units are nats. All are plug-in estimators: sums over all pairs,
the diagonal included, hence biased. Those of a divergence or of entropies estimate the quantity of
densities smoothed by the kernel; the diagonal adds a bias that falls as 1/N.

| | estimates | sign |
|---|---|---|
| `cs_divergence` | log of the cosine between two densities, times -2 | >= 0 |
| `conditional_cs_divergence` | the same between p(y given x) and q(y given x) | nearly >= 0 |
| `cs_mutual_information` | `cs_divergence` between p(x, t) and p(x) p(t) | >= 0 |
| `mmd` | squared distance of mean embeddings | >= 0 |
| `hsic` | `mmd` between p(x, t) and p(x) p(t) | >= 0 |
| `renyi_entropy`, `renyi_mutual_information` | entropies of the Gram matrix's spectrum | >= 0 |

Where a sign is given, rounding may leave a value of the order of the dtype's epsilon beyond it.

Two arguments are common to all:

- `block`: rows of the Gram matrices that exist at a time, so that memory is of order block x N,
  forward and backward (blocks are computed again for the gradient); None holds them whole. On a CPU
  blocks of 64 to 256 rows are several times as fast as whole matrices of 4,000.
- `axis_name`: the rows are one device's part of the samples; columns are gathered, sums added up
  over the devices, and all get the same scalar: that of the whole, not a mean of the parts'.
  Differentiate under `shard_map`, inside or outside; under `vmap` outside only (inside, JAX would
  return the gradient of the sum over the devices' equal values).

Computation is in float32, in float64 for float64 samples. Outside `jit`, samples that hold NaN or
infinite values raise; inside, where no value can be looked at, NaN comes out as NaN. Finite samples
give finite values and gradients: constant or repeated ones, a single one, and ones so far apart
that all kernels between them are 0 in floating point (up to distances of 1e18 in float32, whose
squares still exist).
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from rlib.collectives import all_gather
from rlib.information.rows import by_rows, gathered, matrices, positive, summed

Scalar = Float[Array, ""]
Samples = Float[Array, "n d"]
Denominator = Literal["sum_of_squares", "square_of_sum"]

_DIRECT = 4  # up to so many features, distances are sums of squared differences, without cancelling


# Bandwidths


def median_distance(x: Samples, *, most: int = 1000, axis_name: str | None = None) -> Scalar:
    """Median distance between samples that differ: the usual width of a kernel on them.

    Equal samples are left out, so that a table with many repeated rows keeps a useful width. 1
    where no two samples differ: any width serves there. The gradient is stopped.

    Args:
        x: samples as rows.
        most: of more samples, so many, evenly spaced in their order, stand for all.

    Raises:
        ValueError: `most` below 2.

    >>> float(median_distance(jnp.array([[0.0], [0.0], [1.0], [3.0]])))
    2.0
    """
    (x,) = matrices("median_distance", x=x)
    if most < 2:
        raise ValueError(f"median_distance: most={most}: a distance takes 2 samples")
    return _median_distance(lax.stop_gradient(x), most, axis_name)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _median_distance(x: Array, most: int, axis_name: str | None) -> Array:
    x = gathered(x, axis_name)
    x = x[:: -(-x.shape[0] // most)]
    n = x.shape[0]
    if n == 1:
        return jnp.ones((), x.dtype)
    (x,) = _centred(x, x)
    i, j = jnp.triu_indices(n, 1)
    squared = jax.vmap(lambda row: _squared_distances(row, x))(x)[i, j]
    # Positive floats are ordered as their bits are, and integers sort several times faster.
    bits = jnp.int32 if x.dtype == jnp.float32 else jnp.int64
    ordered = jnp.sort(lax.bitcast_convert_type(squared, bits))
    positive = jnp.sum(squared > 0)
    first = ordered.size - positive
    middle = jnp.stack([first + (positive - 1) // 2, first + positive // 2])
    values = lax.bitcast_convert_type(ordered[jnp.minimum(middle, ordered.size - 1)], x.dtype)
    median = jnp.where(positive > 0, jnp.mean(jnp.sqrt(values)), 1)
    return jnp.where(jnp.any(jnp.isnan(squared)), jnp.nan, median)


# Divergences


def cs_divergence(
    xp: Float[Array, "m d"],
    xq: Float[Array, "n d"],
    sigma: float | Scalar,
    *,
    block: int | None = 256,
    axis_name: str | None = None,
) -> Scalar:
    """Cauchy-Schwarz divergence of two samples in nats: log int p^2 + log int q^2 - 2 log int pq.

    Zero if and only if the mean embeddings are parallel; the ratio form of `mmd`. Of Gaussians
    N(0, v) and N(d, v) it tends to d^2 / (2 v + sigma^2) (arXiv 2404.17951).

    Args:
        xp, xq: samples of p and of q.
        sigma: width of the kernel.
        block, axis_name: see the module.

    >>> x = jnp.array([[0.0], [1.0]])
    >>> round(float(cs_divergence(x, x + 2, 1.0)), 4)
    2.5713
    """
    xp, xq = matrices("cs_divergence", xp=xp, xq=xq)
    _same_features("cs_divergence", xp, xq)
    positive("cs_divergence", sigma=sigma)
    pp, qq, pq = _log_means(xp, xq, sigma, _block(block), axis_name)
    return pp + qq - 2 * pq


def mmd(
    xp: Float[Array, "m d"],
    xq: Float[Array, "n d"],
    sigma: float | Scalar,
    *,
    block: int | None = 256,
    axis_name: str | None = None,
) -> Scalar:
    """Squared maximum mean discrepancy (no unit), the V-statistic of Gretton et al. 2012.

    Biased upwards, by (1 - mean kernel) (1/m + 1/n) for samples of one density. Arguments as
    `cs_divergence`.

    >>> x = jnp.array([[0.0], [1.0]])
    >>> round(float(mmd(x, x + 9, 1.0)), 4)
    1.6065
    """
    xp, xq = matrices("mmd", xp=xp, xq=xq)
    _same_features("mmd", xp, xq)
    positive("mmd", sigma=sigma)
    pp, qq, pq = _log_means(xp, xq, sigma, _block(block), axis_name)
    return jnp.exp(pp) + jnp.exp(qq) - 2 * jnp.exp(pq)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _log_means(xp, xq, sigma, block, axis_name) -> tuple[Array, Array, Array]:
    """Logarithms of the mean kernel within p, within q and between them."""
    p, q = gathered(xp, axis_name), gathered(xq, axis_name)
    xp, xq, p, q = _centred(q, xp, xq, p, q)

    def of_p(row):
        # Between far samples every kernel underflows: only logarithms of the sums survive.
        return logsumexp(_log_kernel(row, p, sigma)), logsumexp(_log_kernel(row, q, sigma))

    pp, pq = by_rows(of_p, xp, block)
    qq = by_rows(lambda row: logsumexp(_log_kernel(row, q, sigma)), xq, block)
    m, n = (jnp.log(jnp.asarray(x.shape[0], x.dtype)) for x in (p, q))
    total = functools.partial(_log_total, axis_name=axis_name)
    return total(pp) - 2 * m, total(qq) - 2 * n, total(pq) - m - n


def conditional_cs_divergence(
    x: Float[Array, "n d"],
    y: Float[Array, "n c"],
    yhat: Float[Array, "n c"],
    sigma_x: float | Scalar,
    sigma_y: float | Scalar,
    *,
    denominator: Denominator = "sum_of_squares",
    block: int | None = 256,
    axis_name: str | None = None,
) -> Scalar:
    """Cauchy-Schwarz divergence in nats of p(y given x) and q(yhat given x) (2404.17951, Prop. 1).

    With K, L1, L2, L21 the kernels of x, of y, of yhat, and of yhat (rows) against y (columns), it
    is log S(L1) + log S(L2) - 2 log S(L21), S(L) = sum_j sum_i K_ji L_ji / sum_i K_ji^2. Zero where
    yhat = y. Not symmetric, and not an exact cosine: on a few samples it can fall slightly below
    zero. Depends on n; compare values of equal n only.

    Args:
        x: inputs.
        y, yhat: targets and predictions, as columns: (n, 1) for numbers.
        sigma_x, sigma_y: widths of the kernels on x, and on y and yhat.
        denominator: "sum_of_squares" as published: tends to -2 log of the cosine weighted by p(x);
            "square_of_sum", (sum_i K_ji)^2, weights all x alike.

    Raises:
        ValueError: for vectors. The official code, given y of shape (n,), takes the whole batch
            for one sample, and its loss becomes a sum of squared errors (`rlib.information.cs_ib`).

    >>> y = jnp.array([[0.0], [1.0]])
    >>> round(float(conditional_cs_divergence(y, y, y[::-1], 1.0, 1.0)), 5)
    0.24023
    """
    who = "conditional_cs_divergence"
    x, y, yhat = matrices(who, x=x, y=y, yhat=yhat)
    _paired(who, x, y)
    _paired(who, y, yhat)
    _same_features(who, y, yhat)
    positive(who, sigma_x=sigma_x, sigma_y=sigma_y)
    if denominator not in ("sum_of_squares", "square_of_sum"):
        raise ValueError(
            f'{who}: denominator={denominator!r}: choose "sum_of_squares" or "square_of_sum"'
        )
    return _conditional(x, y, yhat, sigma_x, sigma_y, denominator, _block(block), axis_name)


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _conditional(x, y, yhat, sigma_x, sigma_y, denominator, block, axis_name) -> Array:
    rows = (x, y, yhat)
    columns = tuple(gathered(part, axis_name) for part in rows)
    x, xs = _centred(columns[0], x, columns[0])
    y, yhat, ys, yhats = _centred(columns[1], y, yhat, *columns[1:])

    def one(row):
        x_j, y_j, yhat_j = row
        log_k = _log_kernel(x_j, xs, sigma_x)
        k = jnp.exp(log_k)
        divisor = jnp.sum(k * k) if denominator == "sum_of_squares" else jnp.square(jnp.sum(k))
        # Row j of K, L1 and L2 holds a 1, so that their sums cannot underflow; L21's can.
        within = [
            jnp.sum(k * jnp.exp(_log_kernel(a, b, sigma_y))) / divisor
            for a, b in ((y_j, ys), (yhat_j, yhats))
        ]
        between = logsumexp(log_k + _log_kernel(yhat_j, ys, sigma_y)) - jnp.log(divisor)
        return *within, between

    l1, l2, l21 = by_rows(one, (x, y, yhat), block)
    within = jnp.log(summed(l1, axis_name)) + jnp.log(summed(l2, axis_name))
    return within - 2 * _log_total(l21, axis_name)


# Dependence


def cs_mutual_information(
    x: Float[Array, "n d"],
    t: Float[Array, "n k"],
    sigma_x: float | Scalar,
    sigma_t: float | Scalar,
    *,
    normalized: bool = False,
    block: int | None = 256,
    axis_name: str | None = None,
) -> Scalar:
    """Cauchy-Schwarz quadratic mutual information in nats (arXiv 2404.17951, Proposition 2).

    I = log(sum KQ / n^2) + log(1'K1 1'Q1 / n^4) - 2 log(1'KQ1 / n^3), with the Gram matrices K of x
    and Q of t. For normal x, t of correlation r: -ln(1 - r^2) / 2 + ln(1 - r^2 / 4), unit variances
    replaced by 1 + sigma^2 / 2. Invariant to joint permutations and to motions of x or t.

    Args:
        x, t: paired samples.
        normalized: I(x, t) / sqrt(I(x, x) I(t, t)), no unit: 1 for t = x, usually (not always) at
            most 1; 0 where x or t is constant. Where samples lie much closer together than sigma,
            I(t, t) is near its rounding error (1e-7 in float32): choose sigma by their distances.

    >>> x = jnp.array([[0.0], [1.0]])
    >>> round(float(cs_mutual_information(x, x[::-1], 1.0, 1.0)), 5)
    0.05825
    """
    who = "cs_mutual_information"
    x, t = matrices(who, x=x, t=t)
    _paired(who, x, t)
    positive(who, sigma_x=sigma_x, sigma_t=sigma_t)
    sums = _pair_sums(x, t, sigma_x, sigma_t, normalized, _block(block), axis_name)
    cross, x_mean, t_mean, product, xx, tt, x_square, t_square = sums

    def information(joint, first, second, rows):
        return jnp.log(joint) + jnp.log(first) + jnp.log(second) - 2 * jnp.log(rows)

    value = information(cross, x_mean, t_mean, product)
    if not normalized:
        return value
    own_x = information(xx, x_mean, x_mean, x_square)
    own_t = information(tt, t_mean, t_mean, t_square)
    return _ratio(value, own_x, own_t)


def hsic(
    x: Float[Array, "n d"],
    t: Float[Array, "n k"],
    sigma_x: float | Scalar,
    sigma_t: float | Scalar,
    *,
    normalized: bool = False,
    block: int | None = 256,
    axis_name: str | None = None,
) -> Scalar:
    """Hilbert-Schmidt independence criterion tr(K H Q H) / n^2 (no unit), H the centring matrix.

    The V-statistic of Gretton et al. 2005, who divide by (n - 1)^2; biased upwards by order 1/n.

    Args:
        x, t: paired samples.
        normalized: HSIC(x, t) / sqrt(HSIC(x, x) HSIC(t, t)), in [0, 1] (centred kernel alignment);
            0 where x or t is constant.

    >>> x = jnp.array([[0.0], [1.0]])
    >>> round(float(hsic(x, x, 1.0, 1.0)), 4), float(hsic(x, x, 1.0, 1.0, normalized=True))
    (0.0387, 1.0)
    """
    who = "hsic"
    x, t = matrices(who, x=x, t=t)
    _paired(who, x, t)
    positive(who, sigma_x=sigma_x, sigma_t=sigma_t)
    sums = _pair_sums(x, t, sigma_x, sigma_t, normalized, _block(block), axis_name)
    cross, x_mean, t_mean, product, xx, tt, x_square, t_square = sums
    value = cross - 2 * product + x_mean * t_mean
    if not normalized:
        return value
    own_x = xx - 2 * x_square + x_mean * x_mean
    own_t = tt - 2 * t_square + t_mean * t_mean
    return _ratio(value, own_x, own_t)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _pair_sums(x, t, sigma_x, sigma_t, own, block, axis_name) -> tuple[Array, ...]:
    """Means of KQ, K, Q and of the row means' product; and of KK, QQ, squared row means if `own`.

    Means are over all pairs, or rows; they lie between 1/n^2 and 1, whatever n is.
    """
    xs, ts = gathered(x, axis_name), gathered(t, axis_name)
    n = xs.shape[0]
    (x, xs), (t, ts) = _centred(xs, x, xs), _centred(ts, t, ts)

    def one(row):
        k = jnp.exp(_log_kernel(row[0], xs, sigma_x))
        q = jnp.exp(_log_kernel(row[1], ts, sigma_t))
        squares = (jnp.mean(k * k), jnp.mean(q * q)) if own else ()
        return jnp.mean(k * q), jnp.mean(k), jnp.mean(q), *squares

    kq, k, q, *squares = by_rows(one, (x, t), block)
    parts = [kq, k, q, k * q, *squares]
    if own:
        parts += [k * k, q * q]
    sums = tuple(summed(part, axis_name) / n for part in parts)
    return sums if own else (*sums, *(jnp.ones((), x.dtype),) * 4)


def _ratio(value: Array, own_x: Array, own_t: Array) -> Array:
    """value / sqrt(own_x own_t), or 0 where one of them is nothing but rounding."""
    least = 16 * jnp.finfo(value.dtype).eps
    constant = (own_x <= least) | (own_t <= least)
    safe = jnp.where(constant, 1, own_x) * jnp.where(constant, 1, own_t)
    return value * jnp.where(constant, 0, 1 / jnp.sqrt(safe))  # a product: NaN stays NaN


# Matrix-based Renyi entropies


def renyi_entropy(
    x: Samples,
    sigma: float | Scalar,
    *,
    alpha: float = 2.0,
    block: int | None = 256,
    axis_name: str | None = None,
) -> Scalar:
    """Matrix-based Renyi entropy in nats: log(tr A^alpha) / (1 - alpha), A = K / n.

    Sanchez Giraldo, Rao and Principe, arXiv 1211.2459. From 0 (all samples equal) to log n (all far
    apart): at most log n, so that it is biased downwards where the entropy is near that.

    Args:
        x: samples.
        sigma: width of the kernel.
        alpha: order, > 0; 1 is von Neumann's entropy. Orders other than 2 need the eigenvalues of
            the whole Gram matrix: n x n memory, n^3 time, no `axis_name`.

    >>> float(renyi_entropy(jnp.zeros((4, 1)), 1.0)), float(jnp.exp(
    ...     renyi_entropy(100.0 * jnp.arange(4)[:, None], 1.0)))
    (0.0, 4.0)
    """
    who = "renyi_entropy"
    (x,) = matrices(who, x=x)
    positive(who, sigma=sigma, alpha=alpha)
    return _spectral_entropy(who, [(x, sigma)], alpha, block, axis_name)


def renyi_mutual_information(
    x: Float[Array, "n d"],
    t: Float[Array, "n k"],
    sigma_x: float | Scalar,
    sigma_t: float | Scalar,
    *,
    alpha: float = 2.0,
    block: int | None = 256,
    axis_name: str | None = None,
) -> Scalar:
    """Matrix-based mutual information in nats: S(A) + S(B) - S(n A * B), * elementwise.

    Arguments as `renyi_entropy`; the same paper. At most log n.

    >>> x = 100.0 * jnp.arange(4)[:, None]
    >>> round(float(jnp.exp(renyi_mutual_information(x, x, 1.0, 1.0))), 4)
    4.0
    """
    who = "renyi_mutual_information"
    x, t = matrices(who, x=x, t=t)
    _paired(who, x, t)
    positive(who, sigma_x=sigma_x, sigma_t=sigma_t, alpha=alpha)
    first, second = (x, sigma_x), (t, sigma_t)
    entropy = lambda *parts: _spectral_entropy(who, list(parts), alpha, block, axis_name)
    return entropy(first) + entropy(second) - entropy(first, second)


def _spectral_entropy(who: str, parts: list, alpha: float, block, axis_name) -> Array:
    """Of the elementwise product of the parts' Gram matrices, divided by n: its trace is 1."""
    if alpha == 2:
        return jnp.log(1 / _mean_square(parts, _block(block), axis_name))
    if axis_name is not None:
        raise ValueError(
            f"{who}: alpha={alpha:g} needs the eigenvalues of the whole Gram matrix, on one "
            "device; use alpha=2 with axis_name"
        )
    return _entropy_of_eigenvalues(parts, alpha)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mean_square(parts, block, axis_name) -> Array:
    columns = [gathered(x, axis_name) for x, _ in parts]
    pairs = [_centred(b, x, b) for (x, _), b in zip(parts, columns, strict=True)]

    def one(rows):
        log_k = sum(
            _log_kernel(row, b, sigma)
            for row, (_, b), (_, sigma) in zip(rows, pairs, parts, strict=True)
        )
        return jnp.mean(jnp.exp(2 * log_k))

    means = by_rows(one, tuple(rows for rows, _ in pairs), block)
    return summed(means, axis_name) / columns[0].shape[0]


@jax.jit
def _entropy_of_eigenvalues(parts, alpha) -> Array:
    gram = jnp.exp(sum(jax.vmap(lambda row, x=x, s=s: _log_kernel(row, x, s))(x) for x, s in parts))
    w = jnp.linalg.eigvalsh((gram + gram.T) / (2 * gram.shape[0]))
    # Eigenvalues at the level of rounding may be negative, and have no logarithm.
    held = ~(w <= jnp.finfo(w.dtype).eps)  # and NaN is held
    w = jnp.where(held, w, 1)
    shannon = -jnp.sum(jnp.where(held, w * jnp.log(w), 0))
    power = jnp.sum(jnp.where(held, w**alpha, 0))
    order = jnp.where(alpha == 1, 2, alpha)
    return jnp.where(alpha == 1, shannon, jnp.log(power) / (1 - order))


# What all of them are made of


def _squared_distances(row: Float[Array, " d"], b: Float[Array, "n d"]) -> Float[Array, " n"]:
    if row.shape[0] <= _DIRECT:
        return sum(jnp.square(b[:, k] - row[k]) for k in range(row.shape[0]))  # type: ignore
    norms = jnp.sum(row * row) + jnp.sum(b * b, axis=1)
    squared = norms - 2 * jnp.matmul(row, b.T, precision="highest")
    # Between near samples cancellation leaves nothing but rounding, of either sign; and a sample's
    # kernel with itself must be 1, however long the sample is beside sigma. NaN stays NaN.
    return jnp.where(squared <= 8 * jnp.finfo(b.dtype).eps * norms, 0, squared)


def _log_kernel(row: Float[Array, " d"], b: Float[Array, "n d"], sigma) -> Float[Array, " n"]:
    return _squared_distances(row, b) * (-0.5 / jnp.square(jnp.asarray(sigma, b.dtype)))


def _centred(reference: Array, *parts: Array) -> tuple[Array, ...]:
    """Moved by the reference's mean: distances stay, and what cancels in them is small."""
    if reference.shape[1] <= _DIRECT:
        return parts
    centre = lax.stop_gradient(jnp.mean(reference, axis=0))
    return tuple(part - centre for part in parts)


def _log_total(logs: Array, axis_name: str | None) -> Array:
    """Logarithm of the sum of exponentials, over devices too."""
    total = logsumexp(logs)
    return total if axis_name is None else logsumexp(all_gather(total, axis_name))


def _paired(who: str, a: Array, b: Array) -> None:
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"{who}: samples come in pairs; got {a.shape[0]} and {b.shape[0]} rows")


def _same_features(who: str, a: Array, b: Array) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{who}: samples of {a.shape[1]} and of {b.shape[1]} features")


def _block(block: int | None) -> int | None:
    if block is not None and block < 1:
        raise ValueError(f"block={block}: at least one row, or None")
    return block
