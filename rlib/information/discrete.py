"""Entropies of finite samples: binned units, exact counts, and bounds by Gaussian kernels.

A layer's outputs are put into bins, unit by unit; a cell T is the tuple of a row's bins. Over an
enumerated, equiprobable input the counts of the cells are exact, and for a deterministic network
with distinct inputs I(X;T) = H(T): it says how many cells are occupied, no more. What the bins
follow (a fixed range, a unit's own) therefore decides what one sees, and is an argument here.

Counting: rows become 32-bit hashes, one integer sort counts the cells of T and of (T, Y) at once.
Among 4096 cells of one row each some two share a hash with probability 0.4 % (two classes), which
moves an entropy by 2 / 4096 bit; K cells of any size lose less than K / 2^31 bit on average.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from rlib.information.rows import by_rows

Reference = Literal["idnns"]


def bin_codes(
    outputs: Float[Array, "*shape"],
    num_bins: int = 30,
    low: float | Float[Array, ""] = -1.0,
    high: float | Float[Array, ""] = 1.0,
    *,
    reference: Reference | None = None,
) -> Int[Array, "*shape"]:
    """The bin, 0 to num_bins - 1, of each output among equal bins of [low, high].

    Outputs beyond the range fall into the nearest bin, NaN into a bin of its own (-1). An empty
    range (low = high, for example of a constant unit, or low above high) is a single bin.

    Args:
        num_bins: number of bins.
        low, high: the range: fixed, or of `output_range`.
        reference: "idnns" bins as the official code of arXiv 1703.00810: `num_bins` edges, so
            num_bins - 1 bins and one more for everything from `high` on; below `low` wraps
            around to that last one.

    Raises:
        ValueError: too few bins, or another reference.

    >>> bin_codes(jnp.array([-1.0, -0.99, 0.0, 1.0, 5.0]), num_bins=4)
    Array([0, 0, 2, 3, 3], dtype=int32)
    >>> bin_codes(jnp.array([-1.5, -0.99, 0.0, 1.0, 5.0]), num_bins=4, reference="idnns")
    Array([3, 0, 1, 3, 3], dtype=int32)
    """
    if num_bins < (1 if reference is None else 2):
        raise ValueError(f"num_bins={num_bins}: at least 1, or 2 edges with reference")
    if reference not in (None, "idnns"):
        raise ValueError(f'reference={reference!r}: choose None or "idnns"')
    t = jnp.asarray(outputs)
    width = jnp.asarray(high - low, t.dtype)
    scaled = jnp.where(width > 0, (t - low) / jnp.where(width > 0, width, 1), 0.0)
    if reference is None:
        codes = jnp.clip(jnp.floor(scaled * num_bins), 0, num_bins - 1)
    else:
        codes = jnp.clip(jnp.floor(scaled * (num_bins - 1)), -1, num_bins - 1)
        codes = jnp.where(codes < 0, num_bins - 1, codes)
    return jnp.where(jnp.isnan(t), -1, codes).astype(jnp.int32)


def width_codes(outputs: Float[Array, "*shape"], width: float) -> Int[Array, "*shape"]:
    """floor(output / width): bins of a fixed width, as many as the outputs reach.

    NaN falls into the lowest bin, -2^31; a bin beyond 32 bits into the last one.

    Raises:
        ValueError: a width that is not above 0.

    >>> width_codes(jnp.array([-0.1, 0.1, 0.9]), 0.5)
    Array([-1,  0,  1], dtype=int32)
    """
    if not width > 0:
        raise ValueError(f"width={width}: a bin is wider than 0")
    codes = jnp.floor(jnp.asarray(outputs) / width)
    largest = 2.0**31 - 128  # the largest float32 below 2^31
    codes = jnp.where(jnp.isnan(codes), -(2.0**31), jnp.clip(codes, -largest, largest))
    return codes.astype(jnp.int32)


def output_range(outputs: Float[Array, "rows units"]) -> Float[Array, "2"]:
    """(smallest, largest) finite output of a layer; (0, 0) if none is finite.

    >>> output_range(jnp.array([[0.5, -2.0], [jnp.inf, 1.0]]))
    Array([-2.,  1.], dtype=float32)
    """
    t = jnp.asarray(outputs)
    finite = jnp.isfinite(t)
    low = jnp.min(jnp.where(finite, t, jnp.inf))
    high = jnp.max(jnp.where(finite, t, -jnp.inf))
    return jnp.where(jnp.any(finite), jnp.stack([low, high]), 0.0)


def hash_rows(codes: Int[Array, "rows units"]) -> UInt[Array, " rows"]:
    """A 32-bit hash of each row: equal rows share it, others do with probability 2^-32.

    Raises:
        ValueError: codes that are no matrix.

    >>> a, b, c = hash_rows(jnp.array([[1, 2], [1, 2], [2, 1]]))
    >>> bool(a == b), bool(a == c)
    (True, False)
    """
    if codes.ndim != 2:
        raise ValueError(f"codes are (rows, units); got shape {codes.shape}")
    h = jnp.full(codes.shape[0], 0x9747B28C, jnp.uint32)
    for unit in range(codes.shape[1]):
        h = (h ^ codes[:, unit].astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
        h = h ^ (h >> 15)
    h = h * jnp.uint32(0x85EBCA6B)
    return h ^ (h >> 13)


def _entropy_of_runs(ordered: Array) -> Array:
    """Entropy in bits of the values of a sorted vector, by their counts."""
    n = ordered.shape[0]
    place = jnp.arange(n, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    ends = jnp.concatenate([starts[1:], jnp.ones(1, bool)])
    count = (place - lax.cummax(jnp.where(starts, place, 0)) + 1).astype(jnp.float32)
    return math.log2(n) - jnp.sum(jnp.where(ends, count * jnp.log2(count), 0.0)) / n


def entropy_of_rows(codes: Int[Array, "rows units"]) -> Float[Array, ""]:
    """H of the empirical distribution of the rows, in bits.

    >>> entropy_of_rows(jnp.array([[0, 0], [0, 1], [0, 1], [0, 0]]))
    Array(1., dtype=float32)
    """
    _check_rows(codes.shape[0])
    return jnp.maximum(_entropy_of_runs(jnp.sort(hash_rows(codes))), 0.0)


def information_plane_point(
    codes: Int[Array, "rows units"], y: Int[Array, " rows"], num_classes: int = 2
) -> Float[Array, "2"]:
    """(I(X;T), I(T;Y)) in bits, of distinct equiprobable inputs X, one a row.

    I(X;T) = H(T) for a deterministic layer, and I(T;Y) = H(T) + H(Y) - H(T, Y).

    Args:
        codes: of `bin_codes` or `width_codes`.
        y: labels from 0 to num_classes - 1, at most 2^16 of them.

    Raises:
        ValueError: not one label a row, or too few or too many classes.

    >>> codes = jnp.array([[0], [0], [1], [1]])
    >>> information_plane_point(codes, jnp.array([0, 0, 1, 1]))
    Array([1., 1.], dtype=float32)
    """
    _check_rows(codes.shape[0])
    if y.shape != codes.shape[:1]:
        raise ValueError(f"one label a row: codes {codes.shape}, y {y.shape}")
    if not 1 <= num_classes <= 1 << 16:
        raise ValueError(f"num_classes={num_classes}: between 1 and 65536")
    bits = max(1, (num_classes - 1).bit_length())
    labels = y.astype(jnp.uint32)
    ordered = jnp.sort((hash_rows(codes) >> bits << bits) | labels)
    h_t, h_ty = _entropy_of_runs(ordered >> bits), _entropy_of_runs(ordered)
    h_y = _entropy_of_runs(jnp.sort(labels))
    return jnp.maximum(jnp.stack([h_t, h_t + h_y - h_ty]), 0.0)


def _check_rows(rows: int) -> None:
    if rows == 0:
        raise ValueError("an entropy needs at least one row")


def kde_entropy_bounds(
    outputs: Float[Array, "rows units"], noise_var: float, *, block: int = 256
) -> Float[Array, "2"]:
    """(lower, upper) bound on H(T + noise) in nats, of Gaussian noise on a finite sample T.

    Kolchinsky and Tracey 2017 (arXiv 1706.02419): the sample plus the noise is a mixture of
    Gaussians. Subtract `gaussian_entropy` for bounds on I(X; T + noise).

    Args:
        noise_var: s^2 of each unit's noise, in the square of the outputs' unit.
        block: rows whose distances to all rows are in memory at a time.

    Raises:
        ValueError: a variance that is not above 0.

    >>> far = jnp.array([[0.0], [100.0]])
    >>> kde_entropy_bounds(far, 0.1) - gaussian_entropy(1, 0.1)  # log 2
    Array([0.693..., 0.693...], dtype=float32)
    """
    n, units = outputs.shape
    _check_rows(n)
    if not noise_var > 0:
        raise ValueError(f"noise_var={noise_var}: a variance above 0")

    def of_row(row: Array) -> Array:
        # By differences: |a|^2 + |b|^2 - 2 a.b would lose the small distances that matter.
        squared = sum(jnp.square(row[k] - outputs[:, k]) for k in range(units))
        squared /= jnp.asarray(noise_var, outputs.dtype)
        return jnp.stack([jax.nn.logsumexp(-squared / c) for c in (8, 2)])

    log_sums = by_rows(of_row, outputs, block)
    # Of (d/2) log(2 pi 4 s^2) + (d/2) log(1/4) the factor 4 cancels.
    return gaussian_entropy(units, noise_var) + math.log(n) - jnp.mean(log_sums, axis=0)


def gaussian_entropy(units: int, noise_var: float) -> float:
    """H of `units` independent Gaussians of one variance, in nats.

    >>> round(gaussian_entropy(2, 1.0), 4)
    2.8379
    """
    return units / 2 * (math.log(2 * math.pi * noise_var) + 1)
