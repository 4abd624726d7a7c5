"""Representation and parameter information, the bound, and correlations within groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from rlib.information import (
    StochasticClassifier,
    binned_information,
    combined_score,
    correlation_interval,
    feature_information,
    gaussian_information,
    generalization_bound,
    generalization_correlation,
    parameter_information,
    rows,
)
from rlib.optim import SwagState

# Representation


@pytest.fixture(scope="module")
def network():
    return StochasticClassifier((2, 8, 3, 5), rngs=nnx.Rngs(0))


@nnx.jit
def outputs(network, x, key):
    """Mean, sd and a draw of Z, and the logits."""
    encoder = network.encoder
    return *encoder(x), encoder.sample(x, key), network(x, key)


def test_the_encoder_is_two_perceptrons_with_a_floor(network):
    x, key = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32), jax.random.key(1)
    mean, sd, z, logits = outputs(network, x, key)
    layers = [np.asarray(p[...]) for a in network.encoder.mean.layers for p in (a.kernel, a.bias)]
    by_hand = np.maximum(x @ layers[0] + layers[1], 0) @ layers[2] + layers[3]
    np.testing.assert_allclose(mean, by_hand, rtol=1e-4, atol=1e-6)
    assert mean.min() < 0  # no activation on the mean
    assert jnp.all(sd > 0)
    noise = jax.random.normal(key, mean.shape)
    np.testing.assert_allclose(z, mean + sd * noise, rtol=1e-6)
    head = network.head  # linear on a draw of Z
    by_hand = np.asarray(z) @ np.asarray(head.kernel[...]) + np.asarray(head.bias[...])
    np.testing.assert_allclose(logits, by_hand, rtol=1e-4, atol=1e-6)
    floored = nnx.clone(network)
    floored.encoder.sd.layers[-1].bias[...] = jnp.full(3, -1e4)
    np.testing.assert_allclose(outputs(floored, x, key)[1], 1e-10)
    with pytest.raises(ValueError, match="inputs, dimensions of Z and classes"):
        StochasticClassifier((2, 5), rngs=nnx.Rngs(0))


@jax.jit
def of_features(f, scale, key):
    """With noise, as a Gaussian encoder of the same noise, and as the official code."""
    z = f + scale * jax.random.normal(key, f.shape)
    return (
        feature_information(f, f, scale, key),
        gaussian_information(z, f, jnp.full(f.shape, scale)),
        feature_information(f, f, scale, key, variant="official"),
    )


def test_features_with_noise_are_a_gaussian_encoder():
    f = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    found, by_encoder, _ = of_features(f, 0.7, jax.random.key(1))
    assert found == pytest.approx(float(by_encoder), rel=1e-5)


def test_the_official_features_are_off_by_the_missing_coordinates():
    """One coordinate's log density instead of three, at the mode."""
    f, scale = np.repeat(100.0 * np.arange(6, dtype=np.float32)[:, None], 3, axis=1), 0.5
    corrected, _, official = of_features(f, scale, jax.random.key(0))
    assert corrected == pytest.approx(np.log(6), rel=1e-5)
    off = (3 - 1) * np.log(scale * np.sqrt(2 * np.pi))
    assert official == pytest.approx(np.log(6) + off, rel=1e-5)


def test_features_are_compared_in_blocks(monkeypatch):
    f = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    expected = of_features(f, 0.7, jax.random.key(1))[0]
    monkeypatch.setattr(rows, "BLOCKED_ABOVE", 5)
    monkeypatch.setattr(rows, "PAIRS_AT_ONCE", 24)  # four samples a block, two in the last
    found = jax.jit(feature_information)(f, f, 0.7, jax.random.key(1))
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_features_errors():
    f, key = jnp.ones((3, 2)), jax.random.key(0)
    with pytest.raises(ValueError, match="choose"):
        feature_information(f, f, 1.0, key, variant="paper")
    with pytest.raises(ValueError, match=r"\(n, dims\)"):
        feature_information(f, f[:, :1], 1.0, key)
    with pytest.raises(ValueError, match="no samples"):
        feature_information(f, f[:0], 1.0, key)


def test_binned_information_by_hand():
    z = [[0.0, 0.0], [0.0, 0.4], [1.0, 1.0], [1.0, 0.9]]
    # Two bins of width 1/2, and the maximum's own: cells 00 00 22 21.
    entropy = stats.entropy([2, 1, 1])
    assert binned_information(z, bins=2) == pytest.approx(entropy)
    assert binned_information(z, bins=2, clip=True) == pytest.approx(np.log(2))
    # By label the bins are refitted: 00 02 in the first, 22 20 in the second.
    assert binned_information(z, [0, 0, 1, 1], bins=2) == pytest.approx(np.log(2))
    assert binned_information(z, [0, 1, 2, 3], bins=2) == 0
    assert binned_information(np.ones((4, 2)), bins=3) == 0  # a constant


@pytest.mark.parametrize(
    ("z", "labels", "bins"),
    [([[np.nan]], None, 2), (np.ones((0, 2)), None, 2), ([[1.0]], [0, 1], 2), ([[1.0]], None, 0)],
)
def test_binned_information_refuses(z, labels, bins):
    with pytest.raises(ValueError, match=r"finite|labels|bins"):
        binned_information(z, labels, bins=bins)


# Parameters


def posteriors(means, variance=1.0, deviations=0.0):
    """Posteriors over a tree of two parameters, one a mean (and a variance)."""
    means = np.asarray(means, np.float32)
    tree = lambda x: {"a": x[..., :1], "b": x[..., 1:]}
    zero = np.zeros(len(means), np.int32)
    variance = np.broadcast_to(np.reshape(variance, (-1, 1)), means.shape).astype(np.float32)
    spread = np.full((len(means), 3, 2), deviations, np.float32)
    return SwagState(zero, zero, tree(means), tree(variance), tree(spread))


KINDS = {
    "jensen": {},
    "mc": {"estimator": "mc"},
    "kolchinsky": {"estimator": "kolchinsky"},
    "mc of a": {"estimator": "mc", "select": lambda tree: tree["a"]},
    "jensen, official sampler": {"sampler_scale": 1.0},
}


@jax.jit
def informations(state):
    key = jax.random.key(0)
    return {
        name: parameter_information(state, key, draws=4000, **kind) for name, kind in KINDS.items()
    }


def test_posteriors_that_are_the_same_tell_nothing():
    same = informations(posteriors([[1.0, 2.0]] * 3, deviations=0.5))
    np.testing.assert_allclose(list(same.values()), 0, atol=1e-5)


def test_posteriors_far_apart_tell_the_data_draw():
    apart = informations(posteriors([[0.0, 0.0], [0.0, 1e3], [0.0, 2e3]], deviations=0.5))
    assert apart["mc"] == pytest.approx(np.log(3), rel=1e-6)
    assert apart["kolchinsky"] == pytest.approx(np.log(3), rel=1e-6)
    assert apart["mc of a"] == pytest.approx(0, abs=1e-6)  # they differ in b


def test_the_upper_bound_of_near_posteriors():
    """N(0, 1/2) and twice N(1, 1/2): the divergence of a pair that differs is 1."""
    found = informations(posteriors([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    assert found["jensen"] == pytest.approx(4 / 9, abs=0.03)
    of_pairs = -(np.log((1 + 2 / np.e) / 3) + 2 * np.log((2 + 1 / np.e) / 3)) / 3
    assert found["kolchinsky"] == pytest.approx(of_pairs, rel=1e-5)
    assert found["mc"] < found["kolchinsky"] < found["jensen"]


def test_the_official_sampler_draws_twice_the_variance():
    """By hand: two parameters of variance scale * v, v 1, 4 and 4, under densities of v / 2."""
    found = informations(posteriors([[0.0, 0.0]] * 3, variance=[1.0, 4.0, 4.0]))
    by_hand = 2 * 2 * (1 / 4 + 4 - 2) / 9  # times the scale
    assert found["jensen"] == pytest.approx(0.5 * by_hand, abs=0.05)
    assert found["jensen, official sampler"] == pytest.approx(by_hand, abs=0.1)


def test_parameter_errors():
    one = posteriors([[0.0, 0.0]])
    with pytest.raises(ValueError, match="estimator='kl'"):
        parameter_information(one, jax.random.key(0), estimator="kl")
    with pytest.raises(ValueError, match="draws=0"):
        parameter_information(one, jax.random.key(0), draws=0)


# Together


def test_the_bound():
    assert generalization_bound(2.0, 1.0, 100) == pytest.approx(0.2)  # sqrt(4 / 100)
    n = np.array([10.0, 40.0, 160.0])
    falling = generalization_bound(2.0, 1.0, n, g1=0.5, g2=3.0, g3=2.0)
    np.testing.assert_allclose(falling[:-1] / falling[1:], 2, rtol=1e-5)  # as 1 / sqrt(n)
    assert generalization_bound(3.0, 1.0, 10) > generalization_bound(2.0, 1.0, 10)
    assert generalization_bound(2.0, 2.0, 10) > generalization_bound(2.0, 1.0, 10)


def test_the_combined_score():
    np.testing.assert_allclose(combined_score([1, 3], [10, 30], scaled=False), [11, 33])
    np.testing.assert_allclose(combined_score([1, 3], [0, 0]), [1, 3])
    scaled = combined_score([1.0, 3.0], [5e20, 3e20])
    np.testing.assert_allclose(scaled, [1 + 2.5, 3 + 1.5])
    with pytest.raises(ValueError, match="one value a model"):
        combined_score([1.0], [1.0, 2.0])


DRAW = np.random.default_rng(0)


def test_one_group_is_the_usual_correlation():
    x = DRAW.normal(size=20)
    y = np.round(x + DRAW.normal(size=20), 0)  # ties
    found = generalization_correlation(x, y)
    assert found.pearson == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.kendall == pytest.approx(stats.kendalltau(x, y).statistic)


def test_groups_of_different_levels():
    """The group reverses the order; within it the score is perfect."""
    x = np.array([0.0, 1, 2, 10, 11])
    y = np.array([20.0, 21, 22, 5, 7])
    groups = ["a", "a", "a", "b", "b"]
    assert generalization_correlation(x, y).spearman < 0
    within = generalization_correlation(x, y, groups)
    assert within.spearman == within.kendall == pytest.approx(1)
    centred = ([-1, 0, 1, -0.5, 0.5], [-1, 0, 1, -1, 1])
    assert within.pearson == pytest.approx(np.corrcoef(*centred)[0, 1])


def test_pairs_of_one_group_by_hand():
    x, y = [1.0, 2, 3, 1, 2], [1.0, 3, 2, 4, 4]
    # Group a: + + -; group b: one pair, tied in y. 1 / sqrt(4 * 3).
    found = generalization_correlation(x, y, [0, 0, 0, 1, 1])
    assert found.kendall == pytest.approx(1 / np.sqrt(12))


def test_a_constant_orders_nothing_and_errors():
    assert generalization_correlation([1.0, 2, 3], [5.0, 5, 5]) == (0, 0, 0)
    assert generalization_correlation([1.0], [5.0]) == (0, 0, 0)
    # Constants whose mean is rounded, in one group and in groups of different levels.
    assert generalization_correlation([0.1] * 3, [0.1] * 3) == (0, 0, 0)
    levels = [0.1] * 3 + [0.7] * 3
    assert generalization_correlation(levels, levels, [0, 0, 0, 1, 1, 1]) == (0, 0, 0)
    with pytest.raises(ValueError, match="NaN"):
        generalization_correlation([1.0, np.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match="one value a model"):
        generalization_correlation([1.0, 2.0], [1.0, 2.0], [0])
    with pytest.raises(ValueError, match="one value a model"):
        generalization_correlation([], [])
    with pytest.raises(ValueError, match="NaN"):
        correlation_interval([1.0, np.nan], [1.0, 2.0], [0, 0])


def test_the_interval_covers():
    """Bivariate normal models in many groups: close to the t interval of the groups' values."""
    groups = np.repeat(np.arange(30), 20)
    x = DRAW.normal(size=600)
    y = 0.5 * x + DRAW.normal(size=600) + 10 * groups
    low, high = correlation_interval(x, y, groups, resamples=200)
    single = [stats.spearmanr(x[groups == g], y[groups == g]).statistic for g in range(30)]
    half = stats.t.ppf(0.975, 29) * np.std(single, ddof=1) / np.sqrt(30)
    assert low < generalization_correlation(x, y, groups).spearman < high
    assert half < (high - low) / 2 < 2 * half  # wider: models in a group are drawn again as well
    assert correlation_interval(x, y, groups, resamples=20) == correlation_interval(
        x, y, groups, resamples=20
    )
