"""Mutual information of Gaussian encoders Z | x ~ N(mean(x), diag sd(x)^2), in nats.

With x uniform over m samples, whose mixture of encoders is the marginal of Z:

    mc          mean_i [log p(z_i | x_i) - log mean_j p(z_i | x_j)]      at most log m
    jensen      mean_i [log p(z_i | x_i) - mean_j log p(z_i | x_j)]      no less than mc
    kolchinsky  -mean_i log mean_j exp(-KL(p(. | x_i), p(. | x_j)))      between them in expectation

The first two are means over one draw z_i ~ p(. | x_i), the third needs none. The reference set j
includes i. Given labels, j runs over the samples of i's label alone and the result is I(X; Z | Y),
each label weighted by its share. Sources: Kawaguchi et al., arXiv 2305.18887 (mc and jensen);
Kolchinsky and Tracey, arXiv 1706.02419 (the pairwise bound).

Divide by ln 2 for bits. An estimate by mc within a nat of log m is saturated: take more samples.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rlib.information.rows import at_least_float32, gathered, of_each, places

#: Standard deviations below it count as it.
SD_FLOOR = 1e-10
_LOG_2PI = math.log(2 * math.pi)


def normal_log_density(
    z: Float[Array, "*#batch dims"],
    mean: Float[Array, "*#batch dims"],
    sd: Float[Array, "*#batch dims"],
) -> Float[Array, "*batch"]:
    """log N(z; mean, diag sd^2), summed over the last axis.

    >>> float(normal_log_density(jnp.zeros(2), jnp.zeros(2), jnp.ones(2)))
    -1.837877...
    """
    sd = jnp.maximum(sd, SD_FLOOR)
    # Products of z and mean would be faster, but cancel where sd is small against mean.
    terms = jnp.square((z - mean) / sd) + 2 * jnp.log(sd) + _LOG_2PI
    return -0.5 * jnp.sum(terms, axis=-1)


def gaussian_information(
    z: Float[Array, "samples dims"],
    mean: Float[Array, "samples dims"],
    sd: Float[Array, "samples dims"],
    labels: Int[Array, " samples"] | None = None,
    *,
    estimator: Literal["mc", "jensen"] = "mc",
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """I(X; Z), or I(X; Z | Y) given labels, in nats, from one draw of Z a sample.

    Differentiable; a sample alone with its label (or a batch of one) counts 0, NaN gives NaN.
    Computed in float32 at least.

    Args:
        z: mean + sd * noise, sample for sample.
        mean, sd: of the encoder; sd is floored at 1e-10.
        labels: any integers.
        estimator: "mc", or the upper bound "jensen", which one small sd blows up.
        axis_name: mesh axis over which samples are split in equal parts; every part is compared
            with the samples of all.

    Raises:
        ValueError: shapes that do not match, no samples, or an unknown estimator.

    >>> mean = jnp.array([[0.0], [100.0]])  # two samples that Z tells apart: ln 2
    >>> float(gaussian_information(mean, mean, jnp.ones((2, 1))))
    0.693147...
    """
    if estimator not in ("mc", "jensen"):
        raise ValueError(f'estimator={estimator!r}: choose "mc" or "jensen"')
    _check(mean, sd, labels, z)
    z, mean, sd = at_least_float32(z, mean, sd)

    def information(row, reference, own, alike, count):
        mean_j, inverse_j, log_norm_j = reference
        log_p = log_norm_j - 0.5 * jnp.sum(jnp.square((row[0] - mean_j) * inverse_j), axis=-1)
        if estimator == "mc":
            marginal = jax.nn.logsumexp(log_p, where=alike) - jnp.log(count)
        else:
            marginal = jnp.sum(log_p, where=alike) / count
        return log_p[own] - marginal

    # The sd's functions are computed once, not for every pair; see `normal_log_density` for why
    # the square is not multiplied out.
    inverse = 1 / jnp.maximum(sd, SD_FLOOR)
    log_norm = normal_log_density(mean, mean, sd)
    return _mean_over_samples(information, (z,), (mean, inverse, log_norm), labels, axis_name)


def kolchinsky_bound(
    mean: Float[Array, "samples dims"],
    sd: Float[Array, "samples dims"],
    labels: Int[Array, " samples"] | None = None,
    *,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Upper bound of I(X; Z), or of I(X; Z | Y) given labels, from divergences of pairs, in nats.

    Arguments and errors as `gaussian_information`.

    >>> round(float(kolchinsky_bound(jnp.array([[0.0], [1.0]]), jnp.ones((2, 1)))), 4)
    0.2191
    """
    _check(mean, sd, labels)
    mean, sd = at_least_float32(mean, sd)

    def information(row, reference, own, alike, count):
        mean_j, sd_j = reference[0], jnp.maximum(reference[1], SD_FLOOR)
        ratio = jnp.maximum(row[1], SD_FLOOR) / sd_j
        distance = jnp.square((row[0] - mean_j) / sd_j)
        divergence = 0.5 * jnp.sum(distance + jnp.square(ratio) - 1 - 2 * jnp.log(ratio), axis=-1)
        return jnp.log(count) - jax.nn.logsumexp(-divergence, where=alike)

    return _mean_over_samples(information, (mean, sd), (mean, sd), labels, axis_name)


def _mean_over_samples(
    information: Callable[..., Array],
    rows: tuple[Array, ...],
    reference: tuple[Array, ...],
    labels: Array | None,
    axis_name: str | None,
) -> Float[Array, ""]:
    """Mean of information(sample, reference set, its place there, who is like it, how many)."""
    n = len(rows[0])
    labels = jnp.zeros(n, jnp.int32) if labels is None else labels
    reference, everyone = gathered((reference, labels), axis_name)

    def one(sample):
        row, label, own = sample
        alike = everyone == label
        return information(row, reference, own, alike, jnp.sum(alike, dtype=reference[0].dtype))

    mean = jnp.mean(of_each(one, (rows, labels, places(n, axis_name)), len(everyone)))
    return mean if axis_name is None else lax.pmean(mean, axis_name)


def _check(mean: Array, sd: Array, labels: Array | None, z: Array | None = None) -> None:
    given = {"mean": mean.shape, "sd": sd.shape} | ({} if z is None else {"z": z.shape})
    shapes = ", ".join(f"{name} {shape}" for name, shape in given.items())
    if len(set(given.values())) > 1 or mean.ndim != 2:
        raise ValueError(f"one shape (samples, dims) is needed for all; got {shapes}")
    if mean.size == 0:
        raise ValueError(f"no samples or no dimensions: {shapes}")
    if labels is not None and labels.shape != mean.shape[:1]:
        raise ValueError(f"labels {labels.shape} for {mean.shape[0]} samples: one each is needed")
