"""Mixtures of data sets of unequal sizes: temperature sampling, scalarisation, Cooldown.

Li et al., "Upsample or Upweight? Balanced Training on Heavily Imbalanced Datasets", arXiv
2410.04579.

Deviations

| | paper | official code | here |
|---|---|---|---|
| sizes | sentence pairs or tokens | none published | examples of one length, so tokens |
| order | epochs of a materialised list | | draws with replacement, from (seed, step) alone |
| theorem 2 | gradients of equal size in all domains | | exact, `second_moments=` |
| switch | a step | | any function of the step |
| UniMax | uniform until a domain is used up | | a static mixture, as its own paper |
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from rlib.data.streams import check_rows, fetcher

if TYPE_CHECKING:
    import grain

Temperature = float | Callable[[int], float]


def temperature_probs(sizes: ArrayLike, tau: float) -> np.ndarray:
    """p_i = n_i^(1/tau) / sum_j n_j^(1/tau), float64 (K,): tau = 1 proportional, infinity uniform.

    Args:
      sizes: (K,) n_i > 0, all counted in one unit; their scale does not matter.
      tau: at least 1; below it the theory does not hold.

    Raises:
      ValueError: a size that is not positive and finite, or tau below 1.

    >>> temperature_probs([900, 100], 2.0)
    array([0.75, 0.25])
    """
    n = np.asarray(sizes, np.float64)
    if n.ndim != 1 or not n.size or not (np.isfinite(n) & (n > 0)).all():
        raise ValueError(f"sizes {n.tolist()} are not a row of positive numbers")
    if not tau >= 1:
        raise ValueError(f"temperature {tau} is below 1")
    p = np.exp((np.log(n) - np.log(n.max())) / tau)
    return p / p.sum()


def scalarization_weights(sizes: ArrayLike, tau: float) -> np.ndarray:
    """w_i = p(i; tau) / p(i; 1), float64 (K,): what replaces sampling at tau under tau = 1.

    The loss of a batch of B is sum_b w_{i_b} L_b / B: divided by the sum of the weights instead it
    would be biased.

    >>> scalarization_weights([900, 100], 2.0)
    array([0.83333333, 2.5       ])
    """
    return temperature_probs(sizes, tau) / temperature_probs(sizes, 1.0)


def variance_ratio(sizes: ArrayLike, tau: float, second_moments: ArrayLike | None = None) -> float:
    """E|g_S|^2 / E|g_TS|^2 of a single draw: scalarisation over temperature sampling.

    Both have the same mean, so the one with the larger second moment has the larger variance.

    Args:
      sizes, tau: as for `temperature_probs`.
      second_moments: (K,) G_i = E|g|^2 in each domain. Equal ones (None) give F(tau) of theorem 2,
        at least 1. With unequal ones the ratio can be below 1, and is where the abundant domains'
        gradients are much larger.

    Raises:
      ValueError: as `temperature_probs`; second moments of another shape, negative, or all 0.

    >>> round(variance_ratio([900, 100], 2.0), 4)
    1.25
    >>> round(variance_ratio([900, 100], 2.0, [1.0, 0.0]), 4)
    0.8333
    """
    p, w = temperature_probs(sizes, tau), scalarization_weights(sizes, tau)
    g = np.ones_like(p) if second_moments is None else np.asarray(second_moments, np.float64)
    if g.shape != p.shape or not (g >= 0).all() or not g.any():
        raise ValueError(f"second_moments {g} are not {p.size} numbers >= 0, some above")
    return float((p * w) @ g / (p @ g))


def cooldown(switch: int, hi: float = 5.0, lo: float = 1.0) -> Callable[[int], float]:
    """tau(step): `hi` before step `switch`, `lo` from there on. The paper switches half-way.

    Raises:
      ValueError: a temperature below 1, or a negative step.

    >>> [cooldown(2)(step) for step in range(4)]
    [5.0, 5.0, 1.0, 1.0]
    """
    if not (switch >= 0 and hi >= 1 and lo >= 1):
        raise ValueError(
            f"cooldown(switch={switch}, hi={hi}, lo={lo}): steps >= 0, temperatures >= 1"
        )
    return lambda step: hi if step < switch else lo


def unimax_sizes(sizes: ArrayLike, budget: float, epochs: float) -> np.ndarray:
    """Draws of each domain, float64 (K,), as even as possible with at most `epochs` of any.

    The baseline of Chung et al., UniMax, arXiv 2304.09151: from the smallest domain to the largest
    each gets an even share of what is left of the budget, or `epochs` times its size. Give the
    result to `mixture(sizes=...)` with temperature 1.

    Args:
      sizes: (K,) n_i, in examples.
      budget: examples in the whole training.
      epochs: how often an example may be seen, on average.

    Raises:
      ValueError: as `temperature_probs`; a budget or epochs that are not positive.

    >>> unimax_sizes([900, 100, 10], 600, 4.0)
    array([280., 280.,  40.])
    """
    n = np.asarray(sizes, np.float64)
    temperature_probs(n, 1.0)  # checks them
    if not (budget > 0 and epochs > 0):
        raise ValueError(f"unimax_sizes: budget {budget} and epochs {epochs} must be positive")
    draws, left = np.empty_like(n), float(budget)
    for rank, i in enumerate(np.argsort(n)):
        draws[i] = min(left / (len(n) - rank), epochs * n[i])
        left -= draws[i]
    return draws


def mixture(
    names: Sequence[str],
    split: str = "train",
    *,
    batch_size: int,
    seed: int,
    temperature: Temperature = 1.0,
    sizes: Sequence[float] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    length: int | None = None,
) -> grain.IterDataset:
    """Batches without end from several data sets, each row's set drawn by temperature.

    Row by row a set is drawn with p(.; temperature(step)), then an example of it uniformly, with
    replacement. Batch `i` depends on `(seed, i)` alone, whatever the number of processes, and two
    temperatures that agree at a step agree in that batch.

    Args:
      names: data sets with the same features.
      split, batch_size, seed, process_index, process_count, length: as for `stream`.
      temperature: tau, or a function of the step such as `cooldown(...)`.
      sizes: n_i instead of the numbers of examples (of `length` bytes, for text).

    Returns:
      As `stream`; its batches have the further row `domain`, int32 (B,), positions in `names`.

    Raises:
      DataUnavailable, ValueError: as for `stream`; no sets, other features, sizes or temperatures.

    >>> batches = mixture(["python_docs", "python_source"], batch_size=4, seed=0, length=32)
    >>> {key: value.shape for key, value in next(iter(batches)).items()}
    {'domain': (4,), 'tokens': (4, 32)}
    """
    import grain

    rows = check_rows(batch_size, seed, process_index, process_count)
    if not names:
        raise ValueError("a mixture of no data sets")
    sets = [fetcher(name, split, length) for name in names]
    features = [
        sorted((key, v.dtype, v.shape) for key, v in get(np.array([0])).items()) for get, *_ in sets
    ]
    if any(each != features[0] for each in features):
        raise ValueError(f"{', '.join(names)} have not the same features: {features}")
    if any(key == "domain" for key, *_ in features[0]):
        raise ValueError("a feature is named 'domain', as the row that a mixture adds")
    counts = np.array([count for _, count, _ in sets])
    weights = counts if sizes is None else np.asarray(sizes, np.float64)
    if weights.shape != counts.shape:
        raise ValueError(f"{weights.size} sizes for {len(names)} data sets")
    at = temperature if callable(temperature) else lambda step: temperature
    probs = functools.lru_cache(maxsize=2)(lambda tau: np.cumsum(temperature_probs(weights, tau)))
    probs(float(at(0)))  # mistakes show here, not in a thread

    def batch_at(i: int) -> dict[str, np.ndarray]:
        # Two uniform numbers a row, whatever the temperature.
        which, where = np.random.default_rng((seed, i)).random((2, batch_size))[:, rows]
        ends = probs(float(at(i)))
        domain = np.minimum(np.searchsorted(ends, which, side="right"), len(sets) - 1)
        index = (where * counts[domain]).astype(np.int64)
        batch = {"domain": domain.astype(np.int32)}
        for k in np.unique(domain):
            chosen = np.flatnonzero(domain == k)
            for key, values in sets[k][0](index[chosen]).items():
                empty = np.empty((len(domain), *values.shape[1:]), values.dtype)
                batch.setdefault(key, empty)[chosen] = values
        return batch

    options = max((options for *_, options in sets), key=lambda o: o.num_threads)
    return grain.MapDataset.range(sys.maxsize).map(batch_at).to_iter_dataset(options)
