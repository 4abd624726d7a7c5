"""Entropy and mutual information from samples: nearest neighbours and kernels. All in nats.

Kozachenko and Leonenko's entropy (1987), its weighted form of Berrett, Samworth and Yuan (2019,
arXiv 1606.00304), the mutual information of Kraskov, Stoegbauer and Grassberger (2004,
cond-mat/0305641; KSG) and of Ross (2014) for a label, and leave-one-out kernel densities.

Distances are computed for a block of rows at a time, so that 50 000 samples need megabytes, not an
N x N matrix. Every function is pure and works under `jit`, `vmap` and `lax.map`; with `axis_name`
each device has its own rows (equally many), which it compares with everyone's.

What is not defined is told: outside of `jit` a ValueError, inside a result that is not finite.
Estimates of mutual information may be negative, and are never clipped.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp, ndtri
from jaxtyping import Array, Float, Int
from scipy import special

from rlib.information.rows import by_rows, gathered, places, summed, workers

InformationEstimator = Literal["kl", "wkl", "ksg", "kde"]
Metric = Literal["euclidean", "maximum"]
ESTIMATORS: tuple[InformationEstimator, ...] = get_args(InformationEstimator)
#: Distances that are held at a time: 1 MB, which stays in a core's cache.
_AT_ONCE = 2**18
_UNROLLED = 64
#: In float32, two of 5000 samples on a line often agree; more than this share is no accident.
_BY_CHANCE = 0.01


# Distances


def knn_distances(
    x: Float[Array, "n d"],
    k: int,
    *,
    labels: Int[Array, " n"] | None = None,
    metric: Metric = "euclidean",
    axis_name: str | None = None,
) -> Float[Array, "n k"]:
    """Distances to the k nearest other samples, in ascending order; duplicates are at distance 0.

    Differences are squared and summed, not expanded into products: near neighbours keep their
    precision. Time grows as N^2 d.

    Args:
        labels: where given, only samples of the same label count; too few of them give infinity.
        axis_name: axis over which rows are split; the result is that of the own rows.

    Raises:
        ValueError: k is not between 1 and N - 1, labels are not one a sample, or, outside of jit,
            samples that are not finite (NaN inside).

    >>> knn_distances(jnp.array([[0.0], [1.0], [3.0]]), 1)[:, 0]
    Array([1., 1., 2.], dtype=float32)
    """
    x = _table(x)
    _need(k, len(x) * workers(axis_name))
    if metric not in get_args(Metric):
        raise ValueError(f"metric={metric!r}: choose from {', '.join(get_args(Metric))}")
    if labels is not None and jnp.shape(labels) != (len(x),):
        raise ValueError(f"labels of shape {jnp.shape(labels)} for {len(x)} samples: one a row")
    return _defined(_knn(x, labels, k, metric, axis_name), "distances", (x,))


@functools.partial(jax.jit, static_argnames=("k", "metric", "axis_name"))
def _knn(x, labels, k, metric, axis_name) -> Array:
    everyone = gathered((x, labels), axis_name)

    def row(mine):
        far = _other(mine, everyone, metric)
        return _smallest(far, k)

    found = _by_rows(row, (x, labels), everyone, axis_name)
    return jnp.sqrt(found) if metric == "euclidean" else found


def _table(x: Any) -> Array:
    x = jnp.asarray(x)
    if x.ndim == 1:
        x = x[:, None]
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"samples of shape {x.shape}: (N, d) or (N,) is needed")
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


def _by_rows(row, mine: Any, everyone: Any, axis_name: str | None, width: int = 1) -> Any:
    """`row` of every own sample; `width` numbers are held for each pair."""
    n, total = len(mine[0]), len(everyone[0])
    return by_rows(row, (*mine, places(n, axis_name)), max(1, _AT_ONCE // (total * width)))


def _apart(point: Float[Array, " d"], points: Float[Array, "n d"], metric: Metric) -> Array:
    """Squared Euclidean or maximum distance, coordinate by coordinate, which compiles to a loop."""

    def add(far, one, many):
        gap = jnp.abs(one - many)
        return jnp.maximum(far, gap) if metric == "maximum" else far + gap * gap

    far = jnp.zeros(len(points), points.dtype)
    if len(point) <= _UNROLLED:
        for one, many in zip(point, points.T, strict=True):
            far = add(far, one, many)
        return far
    step = lambda far, coordinate: (add(far, *coordinate), None)
    return lax.scan(step, far + 0 * point[0], (point, points.T))[0]


def _other(mine: Any, everyone: Any, metric: Metric) -> Array:
    """Distances to all samples, infinity to itself and to those of another label."""
    (point, label, index), (points, labels) = mine, everyone
    far = _apart(point, points, metric)
    hidden = jnp.arange(len(points)) == index
    if labels is not None:
        hidden |= labels != label
    return jnp.where(hidden, jnp.inf, far)


def _smallest(values: Float[Array, " n"], k: int) -> Float[Array, " k"]:
    """The k smallest values, ascending.

    They lie in the k groups whose minima are smallest: sorting those alone is several times faster.
    """
    if k == 1:
        return jnp.min(values, keepdims=True)
    groups = max(64, 8 * k)
    if len(values) >= 8 * groups:
        padded = jnp.pad(values, (0, -len(values) % groups), constant_values=jnp.inf)
        grouped = padded.reshape(-1, groups)
        nearest = lax.top_k(-jnp.min(grouped, axis=0), k)[1]
        values = grouped[:, nearest].reshape(-1)
    return -lax.top_k(-values, k)[0]


# Whitening and ranks


def gaussianise(
    x: Float[Array, "n d"], *, key: jax.Array | None = None, axis_name: str | None = None
) -> Float[Array, "n d"]:
    """Each coordinate's ranks as normal quantiles, Phi^-1((rank - 1/2) / N).

    Mutual information does not change, heavy tails and the edges of a bounded code go. Ties are
    broken by order, or at random with a key: no two samples agree in any coordinate, so distances
    are never 0. A constant coordinate becomes noise. Quantiles lie on a grid, where neighbours are
    farther than in a random sample: in one dimension "kl" and "wkl" are then too high by 0.7 nats,
    in two of each side by 0.1; "ksg" is not affected.

    Raises:
        ValueError: outside of jit, samples that are not finite; inside, their ranks are NaN.

    >>> [round(float(v), 3) for v in gaussianise(jnp.array([30.0, -1.0, 1e6]))[:, 0]]
    [0.0, -0.967, 0.967]
    """
    x = _table(x)
    return _defined(_quantiles(x, key, axis_name), "ranks", (x,))


@functools.partial(jax.jit, static_argnames="axis_name")
def _quantiles(x: Array, key: jax.Array | None, axis_name: str | None) -> Array:
    everyone = gathered(x, axis_name)
    if key is None:
        ranks = _ranks(everyone)
    else:  # in an order of its own for each coordinate, or coordinates that tie would be one
        order = jnp.argsort(jax.random.bits(key, everyone.shape), axis=0)
        ranks = jnp.take_along_axis(
            _ranks(jnp.take_along_axis(everyone, order, axis=0)), jnp.argsort(order, axis=0), axis=0
        )
    if axis_name is not None:
        ranks = lax.dynamic_slice_in_dim(ranks, lax.axis_index(axis_name) * len(x), len(x))
    quantiles = ndtri((ranks + 0.5) / len(everyone)).astype(x.dtype)
    return quantiles + 0 * x  # sorting gives NaN a rank like any other


def _ranks(x: Array) -> Array:
    return jnp.argsort(jnp.argsort(x, axis=0, stable=True), axis=0)


class _Samples(NamedTuple):
    """Whitened samples of one or more classes.

    Fields:
        points: whitened within their class; nothing is left of directions without width.
        labels: None for one class.
        one_hot: membership.
        rank: directions that have a width, one number per class.
        log_det: half the log-determinant of each class's covariance.
        number: samples of each class.
    """

    points: Float[Array, "n d"]
    labels: Int[Array, " n"] | None
    one_hot: Float[Array, "n classes"]
    rank: Int[Array, " classes"]
    log_det: Float[Array, " classes"]
    number: Float[Array, " classes"]


def _whiten(
    x: Array,
    labels: Array | None = None,
    classes: int = 1,
    *,
    symmetric: bool = False,
    axis_name: str | None = None,
) -> _Samples:
    """Each class whitened by its own covariance: in its principal axes, where those without width
    are 0, or by the symmetric root of the correlations, which depends on no choice of eigenvectors
    (and whose determinant is not reported for samples without width in some direction).

    In two passes: in float32 the first is rough where one direction is thousands of times narrower
    than another, and the second mends it. What is narrower than rounding has no width.
    """
    eps = jnp.finfo(x.dtype).eps
    dot = functools.partial(jnp.einsum, precision="highest")
    one_hot = jnp.ones((len(x), 1), x.dtype)
    if labels is not None:
        one_hot = (labels[:, None] == jnp.arange(classes)).astype(x.dtype)
    number = summed(one_hot, axis_name)
    share = 1 / jnp.maximum(number, 1)[:, None]

    def mean(x):  # of each class
        total = dot("nc,nd->cd", one_hot, x)
        return share * (total if axis_name is None else lax.psum(total, axis_name))

    largest = jnp.max(jnp.abs(x), axis=0)
    largest = largest if axis_name is None else lax.pmax(largest, axis_name)
    for _ in range(2):  # the second time removes the rounding of the first
        x -= dot("nc,cd->nd", one_hot, mean(x))
    width = jnp.sqrt(mean(jnp.square(x)))
    flat = width <= eps * largest
    scale = jnp.where(flat, 0, 1 / jnp.where(flat, 1, width))
    x *= dot("nc,cd->nd", one_hot, scale)
    log_det = jnp.sum(jnp.log(jnp.where(flat, 1, width)), axis=1)

    def turned(x, least):
        products = dot("nc,ni,nj->cij", one_hot, x, x)
        products = products if axis_name is None else lax.psum(products, axis_name)
        values, vectors = jnp.linalg.eigh(products * share[:, :, None])
        floor = eps * jnp.maximum(values[:, -1:], jnp.finfo(x.dtype).tiny / eps)
        kept = values > least * floor
        values = jnp.maximum(values, floor)
        turn = vectors * jnp.where(kept, 1 / jnp.sqrt(values), 0)[:, None, :]
        if symmetric:
            turn = dot("cdi,cei->cde", turn, vectors)
        return dot("nc,nd,cde->ne", one_hot, x, turn), (values, vectors, 1.0 * kept)

    # The first pass keeps every direction; they count as far as the second keeps them.
    x, ((rough, values), (_, vectors), (_, kept)) = lax.scan(turned, x, jnp.array([-1.0, 10.0]))
    spanned = dot("cij,cj->ci", jnp.square(vectors), kept)
    log_det += 0.5 * jnp.sum(spanned * jnp.log(rough) + kept * jnp.log(values), axis=1)
    rank = jnp.sum(kept, axis=1).astype(int)
    return _Samples(x, labels, one_hot, rank, log_det, number)


# Entropies


@functools.cache
def kl_weights(k: int, d: int) -> np.ndarray:
    """Weights of the first k neighbours in the weighted Kozachenko-Leonenko entropy, float64.

    Their sum is 1, and they cancel the bias's terms of order N^(-2l/d), l = 1 .. d/4 (1606.00304,
    eq. 2): the minimum-norm least-squares solution over j in {floor(i k / d)}. Up to d = 4 there is
    nothing to cancel: (1, 0, ...). Variance grows with sum |w|: 3.5 for k = d = 5, 33 for d = 8,
    755 for d = 12. Where the equations cannot be met, from d = 17 on for k = 5: (1, 0, ...).

    Raises:
        ValueError: no neighbours, or a negative dimension.

    >>> kl_weights(5, 5).round(6).tolist()
    [1.54059, 0.669625, 0.059949, -0.427792, -0.842371]
    """
    if k < 1 or d < 0:
        raise ValueError(f"weights of k={k} neighbours in d={d} dimensions")
    first = np.eye(k)[0]
    if d <= 4 or k == 1:
        return first
    j = np.arange(1, k + 1)
    orders = np.arange(1, d // 4 + 1)[:, None]
    gammas = np.exp(special.gammaln(j + 2 * orders / d) - special.gammaln(j))
    gammas /= np.linalg.norm(gammas, axis=1, keepdims=True)
    equations = np.vstack([np.full(k, 1 / k), gammas])
    right = np.r_[1 / k, np.zeros(len(orders))]
    free = np.unique([i * k // d for i in range(1, d + 1) if i * k >= d])
    weights = np.zeros(k)
    weights[free - 1] = np.linalg.lstsq(equations[:, free - 1], right, rcond=1e-6)[0]
    return weights if abs(weights.sum() - 1) < 1e-6 else first


def _weight_table(k: int, largest: int, weighted: bool) -> np.ndarray:
    """(d + 1, neighbours): the weights for each dimension; without weights the k-th alone."""
    if not weighted:
        return np.tile(np.eye(k)[k - 1], (largest + 1, 1))
    table = np.stack([kl_weights(k, d) for d in range(largest + 1)])
    return table[:, : 1 + np.flatnonzero(table.any(axis=0)).max()]


def _constants(dimensions: int, k: int) -> np.ndarray:
    """log V_d - psi(j), (dimensions, k)."""
    d = np.arange(dimensions)[:, None]
    ball = 0.5 * d * np.log(np.pi) - special.gammaln(d / 2 + 1)
    return ball - special.digamma(np.arange(1, k + 1))


def _neighbour_entropies(
    samples: _Samples, table: np.ndarray, axis_name: str | None
) -> Float[Array, " classes"]:
    """Of each whitened class: sum_j w_j (log(N-1) - psi(j) + log V_d + d/N sum log rho_j).

    A class without width has one point as its support, and entropy 0 there; likewise an empty one.
    Where few samples coincide, by rounding, their distance is a rounding step.
    """
    points, labels, one_hot, rank, _, number = samples
    k = table.shape[1]
    near = _knn(points, labels, k, "euclidean", axis_name)
    everywhere = points.shape[0] * workers(axis_name)
    square = summed(jnp.sum(jnp.square(points), axis=1), axis_name) / everywhere
    coincide = summed(1.0 * (near[:, 0] == 0), axis_name) / everywhere
    rounding = jnp.where(coincide > _BY_CHANCE, 0, jnp.finfo(points.dtype).eps * jnp.sqrt(square))
    logs = jnp.log(jnp.maximum(near, rounding))
    shared = gathered((one_hot, logs), axis_name)
    sums = jnp.stack([jnp.sum(jnp.where(c[:, None] > 0, shared[1], 0), 0) for c in shared[0].T])
    d, n = rank.astype(points.dtype)[:, None], number[:, None]
    weights, constants = (
        jnp.asarray(v, points.dtype)[rank] for v in (table, _constants(*table.shape))
    )
    each = jnp.log(n - 1) + constants + d * sums / n
    h = jnp.sum(jnp.where(weights == 0, 0, weights * each), axis=1)
    return jnp.where((rank == 0) | (number == 0), 0, h)


def _kernel_entropies(
    samples: _Samples, bandwidths: Float[Array, " b"], axis_name: str | None
) -> Float[Array, "b classes"]:
    """Of each whitened class and bandwidth: - mean log of the other samples' Gaussian kernels."""
    points, labels, one_hot, rank, _, number = samples
    everyone = gathered((points, labels), axis_name)

    def row(mine):
        far = _other(mine, everyone, "euclidean")
        return logsumexp(-far / (2 * jnp.square(bandwidths)[:, None]), axis=1)

    width = 2 * len(bandwidths)
    logs = _by_rows(row, (points, labels), everyone, axis_name, width)
    every_hot, every_log = gathered((one_hot, logs), axis_name)
    sums = jnp.stack([jnp.sum(jnp.where(c[:, None] > 0, every_log, 0), 0) for c in every_hot.T], 1)
    norm = 0.5 * rank * jnp.log(2 * np.pi * jnp.square(bandwidths))[:, None]
    h = norm + jnp.log(number - 1) - sums / number
    return jnp.where((rank == 0) | (number == 0), 0, h)


def _bandwidth(
    samples: _Samples, narrowest: Array, total: int, axis_name: str | None
) -> Float[Array, ""]:
    """The bandwidth of greatest leave-one-out likelihood, to 1 %.

    Seven values from 0.5 times the narrowest standard deviation to 1.06 times the widest, 1, both
    over N^(0.2/d), then seven between the neighbours of the best, and so on.
    """
    d = samples.points.shape[1]
    ends = jnp.stack([jnp.log(0.5 * narrowest), jnp.full_like(narrowest, np.log(1.06))])

    def closer(ends, _):
        grid = jnp.linspace(ends[0], ends[1], 7)
        h = _kernel_entropies(samples, jnp.exp(grid), axis_name) @ samples.number
        best = jnp.argmin(h)
        near = jnp.clip(jnp.stack([best - 1, best + 1]), 0, 6)
        return grid[near], grid[best]

    return jnp.exp(lax.scan(closer, ends - 0.2 / d * np.log(total), length=5)[1][-1])


def kl_entropy(
    x: Float[Array, "n d"],
    k: int = 5,
    *,
    weighted: bool = True,
    whiten: bool = True,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Differential entropy in nats, by Kozachenko and Leonenko's estimator.

    Its bias falls as N^(-2/d) and grows with the density's curvature; the weighted form removes
    the bias's leading terms where the density is smooth, at the price that `kl_weights` tells.

    Args:
        x: one sample a row.
        k: neighbours.
        weighted: combine the first k by `kl_weights`; otherwise use the k-th alone.
        whiten: estimate in coordinates of unit covariance and add half its log-determinant; the
            result then moves by log |det A| exactly under any linear map A.
        axis_name: axis over which rows are split.

    Returns:
        -inf where more than 1 % of samples coincide, or all lie on a plane: such a distribution has
        no density. Fewer may coincide by rounding; their distance counts as one rounding step.

    Raises:
        ValueError: too few samples for k, or, outside of jit, samples that are not finite.

    >>> x = jnp.array([[0.0], [1.0], [3.0]])
    >>> round(float(kl_entropy(x, 1, whiten=False)), 5)
    2.19456
    """
    x = _table(x)
    _need(k, len(x) * workers(axis_name))
    h = _entropy(x, k, weighted, whiten, axis_name)
    return _defined(h, "the entropy", (x,))


@functools.partial(jax.jit, static_argnames=("k", "weighted", "whiten", "axis_name"))
def _entropy(x, k, weighted, whiten, axis_name) -> Array:
    samples = _whiten(x, axis_name=axis_name)
    d = x.shape[1]
    if not whiten:
        own = {"points": x, "log_det": 0 * samples.log_det, "rank": jnp.full(1, d)}
        samples = samples._replace(**own)
    h = _neighbour_entropies(samples, _weight_table(k, d, weighted), axis_name)
    h = jnp.where(samples.rank < d, -jnp.inf, h + samples.log_det)[0]
    return h + summed(jnp.sum(0 * x, axis=1), axis_name)  # NaN of what is not finite


def _need(k: int, count: int) -> None:
    if not 1 <= k < count:
        raise ValueError(f"k={k} neighbours of {count} samples: 1 to {count - 1} are possible")


def _defined(value: Array, what: str, inputs: tuple[Array, ...], hint: str = "") -> Array:
    """Raise where a concrete value is NaN, and say why."""
    if isinstance(value, jax.core.Tracer) or not np.isnan(value).any():
        return value
    if not all(np.isfinite(x).all() for x in inputs):
        raise ValueError(f"{what} of samples that are not finite")
    raise ValueError(f"{what} is not defined{hint}")


# Mutual information


def mutual_information(
    x: Float[Array, "n dx"],
    y: Float[Array, "n dy"] | Int[Array, " n"],
    *,
    estimator: InformationEstimator = "kl",
    k: int | None = None,
    num_classes: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """I(X; Y) in nats from N pairs; negative values are the estimator's error, and shown.

    X and Y are whitened first, which changes no information, and directions in which they do not
    vary are left out. Then, by estimator:

    - "kl": h(X) + h(Y) - h(X, Y), each by its k-th neighbours (default the first);
    - "wkl": the same by the first k (default 5), weighted (`kl_weights`), as in arXiv 2305.08013;
    - "ksg": psi(k) + psi(N) - mean(psi(n_x + 1) + psi(n_y + 1)), maximum norm, k = 5; for a label
      psi(k) + psi(N) - mean(psi(N_label) + psi(m)). Small bias near independence; it saturates
      at high information, about as (log N) for one dimension;
    - "kde": the entropies by leave-one-out Gaussian kernels, with the joint's best bandwidth.

    The biases of the three entropies do not cancel: "kl" is below 0 for independent samples, by
    more in higher dimensions.

    Args:
        x: one sample a row.
        y: as x; or labels from 0 to `num_classes` - 1 if that is given.
        k: neighbours; "kde" has none.
        axis_name: axis over which rows are split.

    Returns:
        +inf if Y is a linear function of X in some direction ("kl", "wkl", "kde"), or a class has
        no width where others have one ("kl", "wkl").

    Raises:
        ValueError: X and Y differ in number, there are too few samples for k, or, outside of jit,
            a result that is not defined (NaN inside): more than 1 % of samples coincide with
            another ("kl", "wkl") or with k others ("ksg"), a class has samples but not more than k
            or ("kl", "wkl") than dimensions, values are not finite.

    >>> x, noise = jax.random.normal(jax.random.key(0), (2, 2000, 1))
    >>> y = x + 0.1 * noise  # 0.5 log 101 = 2.31
    >>> round(float(mutual_information(x, y, estimator="ksg")), 1)
    2.3
    """
    x = _table(x)
    y = _table(y) if num_classes is None else jnp.asarray(y)
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: choose from {', '.join(ESTIMATORS)}")
    if len(x) != len(y):
        raise ValueError(f"{len(x)} samples of X and {len(y)} of Y do not make pairs")
    if num_classes is not None:
        if y.ndim != 1 or not jnp.issubdtype(y.dtype, jnp.integer):
            raise ValueError(f"labels of shape {y.shape} and type {y.dtype}: one integer a row")
        if (
            not isinstance(y, jax.core.Tracer)
            and not ((np.asarray(y) >= 0) & (np.asarray(y) < num_classes)).all()
        ):
            raise ValueError(f"labels outside 0 .. {num_classes - 1}")
    elif x.dtype != y.dtype:
        raise ValueError(f"X is {x.dtype} and Y is {y.dtype}")
    k = {"kl": 1, "wkl": 5, "ksg": 5, "kde": 1}[estimator] if k is None else k
    _need(k, len(x) * workers(axis_name))
    if estimator == "wkl" and x.shape[1] + (y.shape[1] if num_classes is None else 0) <= 4:
        estimator, k = "kl", 1  # whose program serves: all weights are (1, 0, ...)
    value = _information(x, y, estimator, k, num_classes, axis_name)
    hint = ": samples coincide, or a class has too few; add noise, or use gaussianise"
    return _defined(value, "mutual information", (x, y), hint)


@functools.partial(jax.jit, static_argnames=("estimator", "k", "num_classes", "axis_name"))
def _information(x, y, estimator, k, num_classes, axis_name) -> Array:
    whole = _whiten(x, symmetric=estimator == "ksg", axis_name=axis_name)
    degenerate = jnp.zeros((), bool)
    if num_classes is not None and estimator == "ksg":
        value = _ross(whole.points, y, k, num_classes, axis_name)
        value = jnp.where(whole.rank[0] == 0, 0, value)
    elif num_classes is not None and estimator == "kde":
        parts = _whiten(whole.points, y, num_classes, axis_name=axis_name)
        value = _kde_of_classes(whole, parts, axis_name)
    elif num_classes is not None:
        parts = _whiten(whole.points, y, num_classes, axis_name=axis_name)
        h, each = _entropies((whole, parts), estimator, k, axis_name)
        share = parts.number / jnp.sum(parts.number)
        value = h[0] - jnp.sum(jnp.where(share > 0, share * (each + parts.log_det), 0))
        degenerate = jnp.any((parts.rank < whole.rank) & (parts.number > 0))
        few = (parts.number > 0) & (parts.number <= jnp.maximum(k, whole.rank))
        value, degenerate = jnp.where(few.any(), jnp.nan, value), degenerate & ~few.any()
    else:
        other = _whiten(y, symmetric=estimator == "ksg", axis_name=axis_name)
        if estimator == "ksg":
            value = _ksg(whole.points, other.points, k, axis_name)
            value = jnp.where((whole.rank[0] == 0) | (other.rank[0] == 0), 0, value)
        else:
            pairs = jnp.concatenate([whole.points, other.points], axis=1)
            both = _whiten(pairs, axis_name=axis_name)
            hx, hy, hxy = _entropies((whole, other, both), estimator, k, axis_name)
            value = (hx + hy - hxy - both.log_det)[0]
            degenerate = (both.rank < whole.rank + other.rank)[0]
    value = jnp.where(degenerate, jnp.inf, jnp.where(jnp.isinf(value), jnp.nan, value))
    # A comparison with NaN hides it: what is not finite gives NaN.
    return value + summed(jnp.sum(0 * x, 1) + jnp.sum(0.0 * y, -1), axis_name)


def _entropies(
    parts: tuple[_Samples, ...], estimator: str, k: int, axis_name: str | None
) -> list[Array]:
    """Of whitened samples, each part's."""
    if estimator == "kde":
        joint = parts[-1]
        total = len(joint.points) * workers(axis_name)
        narrowest = jnp.ones((), joint.points.dtype)
        bandwidths = _bandwidth(joint, narrowest, total, axis_name)[None]
        return [_kernel_entropies(part, bandwidths, axis_name)[0] for part in parts]
    tables = [_weight_table(k, p.points.shape[1], estimator == "wkl") for p in parts]
    pairs = zip(parts, tables, strict=True)
    return [_neighbour_entropies(part, table, axis_name) for part, table in pairs]


def _kde_of_classes(whole: _Samples, parts: _Samples, axis_name: str | None) -> Array:
    """h(X) - h(X | Y), both in the coordinates that whiten X: there one bandwidth has one meaning.

    Smoothed alike, the two are the information of X plus noise: at most H(Y).
    """
    d = jnp.maximum(whole.rank[0], 1)
    geometric = jnp.exp(parts.log_det / d)  # mean width of a class
    narrowest = jnp.min(jnp.where((parts.number > 1) & (geometric > 0), geometric, 1))
    unwhitened = parts._replace(points=whole.points, rank=0 * parts.rank + whole.rank)
    total = len(whole.points) * workers(axis_name)
    bandwidths = _bandwidth(unwhitened, narrowest, total, axis_name)[None]
    h = _kernel_entropies(whole, bandwidths, axis_name)[0, 0]
    each = _kernel_entropies(unwhitened, bandwidths, axis_name)[0]
    share = parts.number / jnp.sum(parts.number)
    return h - jnp.sum(jnp.where(share > 0, share * each, 0))


def _psi(total: int, dtype: Any) -> Array:
    """psi(1), ..., psi(total)."""
    return jnp.asarray(special.digamma(np.arange(1, total + 1)), dtype)


def _ksg(x: Array, y: Array, k: int, axis_name: str | None) -> Array:
    everyone = gathered((x, y), axis_name)
    total = len(everyone[0])
    psi = _psi(total, x.dtype)

    def row(mine):
        x, y, index = mine
        pairs = zip((x, y), everyone, strict=True)
        far = [_other((one, None, index), (many, None), "maximum") for one, many in pairs]
        reach = _smallest(jnp.maximum(*far), k)[-1]
        counts = jnp.stack([jnp.sum(f < reach) for f in far])
        return jnp.stack([jnp.sum(psi[counts]), reach == 0])

    sums = _by_rows(row, (x, y), everyone, axis_name, width=3)
    return _from_sums(sums, psi, k, axis_name)


def _ross(x: Array, labels: Array, k: int, classes: int, axis_name: str | None) -> Array:
    everyone = gathered((x, labels), axis_name)
    total = len(everyone[0])
    number, psi = jnp.bincount(everyone[1], length=classes), _psi(total, x.dtype)

    def row(mine):
        x, label, index = mine
        far = _other((x, None, index), (everyone[0], None), "maximum")
        reach = _smallest(jnp.where(everyone[1] == label, far, jnp.inf), k)[-1]
        value = psi[number[label] - 1] + psi[jnp.sum(far <= reach) - 1]
        return jnp.stack([jnp.where(jnp.isfinite(reach), value, jnp.nan), reach == 0])

    sums = _by_rows(row, (x, labels), everyone, axis_name, width=2)
    return _from_sums(sums, psi, k, axis_name)


def _from_sums(sums: Float[Array, "n 2"], psi: Array, k: int, axis_name: str | None) -> Array:
    """psi(k) + psi(N) - the mean; NaN where k others coincide with more than a few samples."""
    mean, coincide = summed(sums, axis_name) / len(psi)
    return jnp.where(coincide > _BY_CHANCE, jnp.nan, psi[k - 1] + psi[-1] - mean)
