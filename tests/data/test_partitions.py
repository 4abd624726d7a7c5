"""Splits of a data set over clients: nothing twice, sizes by rule, labels by law."""

import numpy as np
import pytest

from rlib import data

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 50))
SPLITS = {
    "iid": lambda seed: data.partition_iid(500, 7, seed),
    "by label": lambda seed: data.partition_by_label(LABELS, 7),
    "shards": lambda seed: data.partition_shards(LABELS, 7, 3, seed),
    "dirichlet": lambda seed: data.partition_dirichlet(LABELS, 7, 0.3, seed),
    "dirichlet, equal": lambda seed: data.partition_dirichlet(LABELS, 7, 0.3, seed, size=60),
    "key": lambda seed: data.partition_by_key(LABELS),
}


@pytest.mark.parametrize("name", SPLITS)
def test_no_example_twice_and_the_same_from_a_seed(name):
    parts = SPLITS[name](3)
    everything = np.concatenate(parts)
    assert len(set(everything.tolist())) == len(everything)
    assert min(map(len, parts)) > 0 and everything.min() >= 0 and everything.max() < 500
    for a, b in zip(parts, SPLITS[name](3), strict=True):
        np.testing.assert_array_equal(a, b)
    if name not in ("by label", "key"):
        assert any(set(a) != set(b) for a, b in zip(parts, SPLITS[name](4), strict=True))


@pytest.mark.parametrize("name", ["iid", "dirichlet", "key"])
def test_nothing_is_left_over(name):
    assert sum(map(len, SPLITS[name](0))) == 500


def test_labels_by_client():
    single = data.partition_by_label(LABELS, 10)
    assert [set(LABELS[part].tolist()) for part in single] == [{i} for i in range(10)]
    assert max(len(set(LABELS[part])) for part in data.partition_shards(LABELS, 10, 2)) <= 4
    assert [set(LABELS[p].tolist()) for p in data.partition_by_key(LABELS)] == [
        {i} for i in range(10)
    ]


@pytest.mark.parametrize("size", [None, 40])
def test_a_small_concentration_skews_labels_and_a_large_one_does_not(size):
    def skew(concentration):
        """Mean over clients of the share of the most frequent label."""
        parts = data.partition_dirichlet(LABELS, 10, concentration, size=size)
        return np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts])

    assert skew(0.1) > 0.4 and skew(1000.0) < 0.25


def test_proportions_follow_the_dirichlet_distribution():
    """Variance of a client's share of a label: (1/n)(1 - 1/n) / (n alpha + 1) for n clients."""
    labels, n, alpha = np.repeat(np.arange(2), 2000), 5, 0.7
    shares = [
        np.sum(labels[part] == 0) / 2000
        for seed in range(200)
        for part in data.partition_dirichlet(labels, n, alpha, seed)
    ]
    expected = (1 / n) * (1 - 1 / n) / (n * alpha + 1)
    np.testing.assert_allclose(np.mean(shares), 1 / n, rtol=1e-9)
    np.testing.assert_allclose(np.var(shares), expected, rtol=0.15)


def test_equal_sizes_use_up_everything_if_they_must():
    parts = data.partition_dirichlet(LABELS, 10, 0.05, size=50)
    assert [len(part) for part in parts] == [50] * 10
    assert len(set(np.concatenate(parts).tolist())) == 500


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.partition_iid(3, 4), "3 examples cannot be dealt to 4"),
        (lambda: data.partition_iid(3, 0), "to 0 clients"),
        (lambda: data.partition_shards(LABELS, 5, 0), "times each=0 shards"),
        (lambda: data.partition_dirichlet(LABELS, 5, 0.0), "must be positive"),
        (lambda: data.partition_dirichlet(LABELS, 5, 1.0, size=101), "of 101 examples from 500"),
        (lambda: data.partition_dirichlet(LABELS, 20, 0.01, least=20), "left one of 20 clients"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()
