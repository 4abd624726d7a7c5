"""Does the information bottleneck predict generalisation? The quantities and their correlation.

Kawaguchi, Deng, Ji and Huang, "How Does Information Bottleneck Help Deep Learning?",
arXiv 2305.18887. The gap between test and training loss of g(Z), Z = phi(X), trained on n samples S
is bounded, up to constants, by sqrt((I(X; Z | Y) + I(phi; S)) / n): what the representation keeps
of the input beyond the label, plus what the encoder's parameters keep of the training set. Over a
pool of models the sum should order the gap better than either term, norms or parameter counts.

Deviations

| | paper | official code | here |
|---|---|---|---|
| unit of information | bits | nats; `to_bits` multiplies by ln 2 | nats; bits are nats / ln 2 |
| samples in I(X; Z) | not said | 10 times the training set: near its limit | the caller's |
| deterministic features: log p(z, x_i) | not said | one coordinate's | all; `variant="official"` |
| the same: z | not said | the mode f(x_i), without noise | f(x_i) + noise |
| bins of I(X; Z) | not said | the maximum has a bin of its own | as the code; `clip=True` |
| SWAG's second moment | not said | cancels in float32 | `rlib.optim.record_swag` |
| SWAG's density: variances | not said | the sampler's (1e-30 or more) + 1e-6 | `floor` or more |
| SWAG's density: deviations | not said | each tensor's, without those below 0 | all, jointly |
| SWAG's density: scale | not said | no halves, no 1 / (K - 1) | the sampler's |
| dual ascent | not said | the multiplier may turn negative | as the code |
| constants G1, G2, G3 | O(1) and logarithms | none | 0, 1, 1: up to constants |
| combined sum, Theorem 2 | min over layers | one layer | one layer |
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key
from scipy import stats

from rlib.information.gaussian import SD_FLOOR, kolchinsky_bound, normal_log_density
from rlib.information.rows import at_least_float32, of_each
from rlib.nn import Affine, Perceptron
from rlib.optim import SwagState, swag_log_density, swag_restrict, swag_sample

# Representation


class StochasticEncoder(nnx.Module):
    """Z | x ~ N(mean(x), diag sd(x)^2), mean and softplus of sd by perceptrons of their own.

    Args:
        sizes: inputs, width of each hidden layer, dimensions of Z.

    >>> encoder = StochasticEncoder((2, 8, 3), rngs=nnx.Rngs(0))
    >>> [part.shape for part in encoder(jnp.ones((5, 2)))]
    [(5, 3), (5, 3)]
    """

    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs):
        self.mean = Perceptron(sizes, rngs=rngs)
        self.sd = Perceptron(sizes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "samples inputs"]
    ) -> tuple[Float[Array, "samples dims"], Float[Array, "samples dims"]]:
        """Mean and standard deviation, the latter at least 1e-10."""
        return self.mean(x), jnp.maximum(jax.nn.softplus(self.sd(x)), SD_FLOOR)

    def sample(
        self, x: Float[Array, "samples inputs"], key: Key[Array, ""]
    ) -> Float[Array, "samples dims"]:
        """One draw of Z a sample."""
        mean, sd = self(x)
        return mean + sd * jax.random.normal(key, mean.shape, mean.dtype)


class StochasticClassifier(nnx.Module):
    """A linear classifier on a `StochasticEncoder`.

    Args:
        sizes: inputs, width of each hidden layer, dimensions of Z, classes.

    Raises:
        ValueError: fewer than three sizes.

    >>> classifier = StochasticClassifier((2, 8, 3, 5), rngs=nnx.Rngs(0))
    >>> classifier(jnp.ones((7, 2)), jax.random.key(0)).shape
    (7, 5)
    """

    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs):
        if len(sizes) < 3:
            raise ValueError(f"sizes={tuple(sizes)}: inputs, dimensions of Z and classes at least")
        self.encoder = StochasticEncoder(sizes[:-1], rngs=rngs)
        self.head = Affine(sizes[-2], sizes[-1], rngs=rngs)

    def __call__(
        self, x: Float[Array, "samples inputs"], key: Key[Array, ""]
    ) -> Float[Array, "samples classes"]:
        """Logits of one draw of Z."""
        return self.head(self.encoder.sample(x, key))


def feature_information(
    features: Float[Array, "samples dims"],
    reference: Float[Array, "others dims"],
    scale: float | Float[Array, ""],
    key: Key[Array, ""],
    *,
    variant: Literal["corrected", "official"] = "corrected",
) -> Float[Array, ""]:
    """I(X; Z) of deterministic features to which noise N(0, scale^2) is thought added, in nats.

    The marginal is the mixture over `reference`, so samples among it are found again.

    Computed in float32 at least, in blocks if the pairs are many.

    Args:
        features, reference: finite; not empty.
        scale: noise, in the features' unit.
        variant: "official" takes one coordinate's log density for log p(z | x), all coordinates'
            for the marginal, and both at z = f(x): off by (dims - 1) log(scale sqrt(2 pi)).

    Raises:
        ValueError: another variant, features that are no matrices of one width, or no samples.

    >>> f = jnp.array([[0.0, 0.0], [50.0, 50.0]])
    >>> float(feature_information(f, f, 1.0, jax.random.key(0)))
    0.693147...
    """
    if variant not in ("corrected", "official"):
        raise ValueError(f'variant={variant!r}: choose "corrected" or "official"')
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"features {features.shape} and reference {reference.shape}: (n, dims)")
    if features.size == 0 or reference.size == 0:
        raise ValueError(f"no samples: features {features.shape}, reference {reference.shape}")
    features, reference = at_least_float32(features, reference)
    sd = jnp.asarray(scale, features.dtype)
    if variant == "official":
        z, own = features, jnp.zeros((len(features), 1), features.dtype)
        posterior = normal_log_density(own, own, sd)
    else:
        z = features + scale * jax.random.normal(key, features.shape, features.dtype)
        posterior = normal_log_density(z, features, sd)
    total = lambda row: jax.nn.logsumexp(normal_log_density(row, reference, sd))
    marginal = of_each(total, z, len(reference)) - jnp.log(len(reference))
    return jnp.mean(posterior - marginal)


def binned_information(
    z: ArrayLike, labels: ArrayLike | None = None, *, bins: int, clip: bool = False
) -> float:
    """I(X; Z) = H(binned Z) of a deterministic Z, or I(X; Z | Y) given labels, in nats.

    All coordinates share `bins` bins of equal width over the range of z; given labels, over that
    of the label's samples. Computed on the host in float64; at most log(samples).

    Args:
        z: (samples, dims), finite.
        clip: put the maximum into the last bin; it has one of its own otherwise, as published.

    Raises:
        ValueError: no samples, values that are not finite, no bins, or labels that do not match.

    >>> round(binned_information([[0.0], [1.0], [2.0], [2.0]], bins=2), 4)
    1.0397
    """
    values = np.asarray(z, np.float64)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"z is (samples, dims), not empty and finite; got shape {values.shape}")
    if bins < 1:
        raise ValueError(f"bins={bins}: at least 1")
    if labels is None:
        return _binned_entropy(values, bins, clip)
    groups = np.asarray(labels)
    if groups.shape != values.shape[:1]:
        raise ValueError(f"labels {groups.shape} for {len(values)} samples: one each is needed")
    entropies = [
        _binned_entropy(values[groups == c], bins, clip) * np.mean(groups == c)
        for c in np.unique(groups)
    ]
    return float(np.sum(entropies))


def _binned_entropy(values: np.ndarray, bins: int, clip: bool) -> float:
    low, high = values.min(), values.max()
    if low == high:
        return 0.0
    cells = np.floor(bins * ((values - low) / (high - low))).astype(np.int64)
    if clip:
        cells = np.minimum(cells, bins - 1)
    _, counts = np.unique(cells, axis=0, return_counts=True)
    return float(stats.entropy(counts))


# Parameters


def parameter_information(
    posteriors: SwagState,
    key: Key[Array, ""],
    *,
    draws: int = 10,
    estimator: Literal["jensen", "mc", "kolchinsky"] = "jensen",
    select: Callable[[Any], Any] = lambda tree: tree,
    sampler_scale: float = 0.5,
    floor: float = 1e-30,
) -> Float[Array, ""]:
    """I(phi; S) in nats, from the SWAG posteriors of trainings that differ in the data draw alone.

    Args:
        posteriors: stacked, one for each of M data draws: every leaf has a leading axis M.
        draws: parameters drawn from each posterior; all of them, M * draws * P numbers, are in
            memory at once.
        estimator: "jensen", an upper bound and the paper's choice; "mc", at most log M;
            "kolchinsky", a bound from the posteriors' marginal variances that draws nothing.
        select: the parameters meant, a part of the tree: those of the layers up to Z.
        sampler_scale: SWAG's 1/2, or the official sampler's 1; densities have 1/2.
        floor: least variance v of a parameter, see `rlib.optim.swag_log_density`. Where it is
            small, weights that never move decide the result. The official code samples with 1e-30,
            but adds 1e-6 to the variances of its densities: 2e-6 is near that, v being halved.

    Raises:
        ValueError: an unknown estimator, or no draws.

    >>> from rlib.optim import record_swag
    >>> one = record_swag(0, 1).init(jnp.zeros(3))._replace(variance=jnp.ones(3))
    >>> same = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    >>> float(parameter_information(same, jax.random.key(0), estimator="kolchinsky"))
    0.0
    """
    if estimator not in ("jensen", "mc", "kolchinsky"):
        raise ValueError(f'estimator={estimator!r}: choose "jensen", "mc" or "kolchinsky"')
    if draws < 1:
        raise ValueError(f"draws={draws}: at least 1 from each posterior")
    posteriors = _as_vectors(swag_restrict(posteriors, select))
    m = len(posteriors.mean)
    if estimator == "kolchinsky":
        rank = posteriors.deviations.shape[1]
        low_rank = jnp.sum(jnp.square(posteriors.deviations), axis=1) / (rank - 1)
        sd = jnp.sqrt(0.5 * (jnp.maximum(posteriors.variance, floor) + low_rank))
        return kolchinsky_bound(posteriors.mean, sd)

    sample = lambda k, q: swag_sample(k, q, scale=sampler_scale, floor=floor)
    keys = jax.random.split(key, (m, draws))
    theta = jax.vmap(jax.vmap(sample, in_axes=(0, None)))(keys, posteriors)  # (M, draws, P)

    def log_density(posterior):
        one = lambda parameters: swag_log_density(posterior, parameters, floor=floor)
        return jax.vmap(jax.vmap(one))(theta)

    log_q = jax.lax.map(log_density, posteriors)  # (M of the posterior, M of the draw, draws)
    ratio = jnp.diagonal(log_q).T - log_q  # of large numbers: their difference comes first
    if estimator == "mc":
        return jnp.mean(jnp.log(m) - jax.nn.logsumexp(-ratio, axis=0))
    return jnp.mean(ratio)


def _as_vectors(posteriors: SwagState) -> SwagState:
    """Each tree of arrays as one array, its parameters along the last axis."""
    joined = lambda tree, lead: jnp.concatenate(
        [leaf.reshape(*leaf.shape[:lead], -1) for leaf in jax.tree.leaves(tree)], axis=-1
    )
    return posteriors._replace(
        mean=joined(posteriors.mean, 1),
        variance=joined(posteriors.variance, 1),
        deviations=joined(posteriors.deviations, 2),
    )


# Together


def generalization_bound(
    representation: ArrayLike,
    parameters: ArrayLike,
    n: ArrayLike,
    *,
    g1: float = 0.0,
    g2: float = 1.0,
    g3: float = 1.0,
) -> Array:
    """The bound of Theorem 2 at one layer, up to the constants G1, G2, G3, which are not known.

    That of the whole network is `generalization_bound(0, parameters, 2 * n)`, g3 being the largest
    loss.

    Args:
        representation, parameters: I(X; Z | Y) and I(phi; S), in nats.
        n: training samples.

    >>> float(generalization_bound(2.0, 6.0, 100))
    0.3...
    """
    information = jnp.asarray(representation) + jnp.asarray(parameters)
    return g3 * jnp.sqrt((information + g2) / n) + g1 / jnp.sqrt(jnp.asarray(n))


def combined_score(
    representation: ArrayLike, parameters: ArrayLike, *, scaled: bool = True
) -> np.ndarray:
    """I(X; Z | Y) + I(phi; S) of a pool of models, one each.

    Args:
        scaled: bring the second term to the mean of the first over the pool, as the paper does
            before it adds.

    Raises:
        ValueError: not one value a model each.

    >>> combined_score([1.0, 3.0], [100.0, 300.0])
    array([2., 6.])
    """
    first = np.asarray(representation, np.float64)
    second = np.asarray(parameters, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"one value a model each; got shapes {first.shape} and {second.shape}")
    if scaled and second.mean() != 0:
        second = second * (first.mean() / second.mean())
    return first + second


class Correlations(NamedTuple):
    """Of a score with the generalisation gap, between -1 and 1; 0 where either is constant."""

    pearson: float
    spearman: float
    kendall: float


def generalization_correlation(
    gap: ArrayLike, score: ArrayLike, groups: ArrayLike | None = None
) -> Correlations:
    """Correlations within groups, such as data draws, whose own level is not to count.

    Pearson's of values centred in their group; Spearman's of ranks in the group, scaled to it and
    centred; Kendall's tau-b over pairs of one group. With one group they are the usual ones.

    Args:
        gap, score: one a model, finite.
        groups: a label a model; None for one group.

    Raises:
        ValueError: lengths that do not match, no models, or values that are not finite.

    >>> generalization_correlation([1.0, 2.0, 11.0, 12.0], [5.0, 6.0, 1.0, 2.0], [0, 0, 1, 1])
    Correlations(pearson=1.0, spearman=1.0, kendall=1.0)
    """
    x, y, g = _checked(gap, score, groups)
    same = [np.flatnonzero(g == name) for name in np.unique(g)]
    centred = lambda v: np.concatenate([_centred(v[i]) for i in same])
    order = lambda v: np.concatenate([_order(v[i]) for i in same])
    return Correlations(
        _cosine(centred(x), centred(y)),
        _cosine(_ranks(x, same), _ranks(y, same)),
        _cosine(order(x), order(y)),  # tau-b: a pair tied in one value leaves that value's norm
    )


def _checked(
    gap: ArrayLike, score: ArrayLike, groups: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y = np.asarray(gap, np.float64), np.asarray(score, np.float64)
    g = np.zeros(x.shape, int) if groups is None else np.asarray(groups)
    if not x.shape == y.shape == g.shape or x.ndim != 1 or x.size == 0:
        raise ValueError(
            f"one value a model each is needed; got gap {x.shape}, score {y.shape}, "
            f"groups {g.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a gap or a score is NaN or infinite: leave such models out first")
    return x, y, g


def _centred(values: np.ndarray) -> np.ndarray:
    """Less their mean; exactly 0 if they are all the same, whose mean may be rounded."""
    from_first = values - values[0]
    return from_first - from_first.mean()


def _ranks(values: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """Ranks in each group (rows of its members), ties averaged, between -1/2 and 1/2."""
    return np.concatenate([(stats.rankdata(values[i]) - 0.5) / len(i) - 0.5 for i in groups])


def _order(values: np.ndarray) -> np.ndarray:
    """The sign of the difference of every pair."""
    pairs = np.triu_indices(len(values), 1)
    return np.sign(np.subtract.outer(values, values))[pairs]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """a'b / |a||b|; 0 if either is zero."""
    scale = np.sqrt((a @ a) * (b @ b))
    return float(np.clip(a @ b / scale, -1, 1)) if scale > 0 else 0.0


def correlation_interval(
    gap: ArrayLike,
    score: ArrayLike,
    groups: ArrayLike,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of the within-group Spearman correlation: groups, then models in each.

    Args:
        gap, score, groups: as `generalization_correlation`, which also says what it raises.
        resamples: bootstrap draws.

    >>> models = np.arange(40.0)
    >>> low, high = correlation_interval(models, models, models.astype(int) % 4, resamples=100)
    >>> low > 0.9, high <= 1
    (True, True)
    """
    x, y, g = _checked(gap, score, groups)
    draw = np.random.default_rng(seed)
    products = []  # of the ranks in each group, (groups, resamples of its models)
    for name in np.unique(g):
        rows = np.flatnonzero(g == name)
        drawn = rows[draw.integers(len(rows), size=(resamples, len(rows)))]
        a, b = (stats.rankdata(v[drawn], axis=1) / len(rows) for v in (x, y))
        a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
        products.append([np.sum(p, axis=1) for p in (a * b, a * a, b * b)])
    table = np.asarray(products)  # (groups, 3, resamples)
    picked = draw.integers(len(table), size=(resamples, len(table)))
    which = draw.integers(resamples, size=picked.shape)
    both, of_x, of_y = np.moveaxis(table[picked, :, which], -1, 0).sum(axis=-1)
    scale = np.sqrt(of_x * of_y)
    found = np.divide(both, scale, out=np.zeros_like(both), where=scale > 0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)
