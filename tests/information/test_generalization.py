"""Representation and parameter information, the bound, and correlations within groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from rlib.information import (
    StochasticClassifier,
    StochasticEncoder,
    binned_information,
    combined_score,
    correlation_interval,
    feature_information,
    gaussian_information,
    generalization_bound,
    generalization_correlation,
    parameter_information,
)
from rlib.optim import SwagState

# Representation


def test_the_encoder_is_two_perceptrons_with_a_floor():
    encoder = StochasticEncoder((2, 8, 3), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (6, 2))
    mean, sd = encoder(x)
    layers = encoder.mean.layers
    by_hand = np.maximum(x @ layers[0].kernel[...] + layers[0].bias[...], 0)
    by_hand = by_hand @ layers[1].kernel[...] + layers[1].bias[...]
    np.testing.assert_allclose(mean, by_hand, rtol=1e-4, atol=1e-6)
    assert mean.min() < 0  # no activation on the mean
    assert jnp.all(sd > 0)
    encoder.sd.layers[-1].bias[...] = jnp.full(3, -1e4)
    floored = encoder(x)[1]
    np.testing.assert_allclose(floored, 1e-10)
    key = jax.random.key(1)
    noise = jax.random.normal(key, mean.shape)
    np.testing.assert_allclose(encoder.sample(x, key), mean + floored * noise)


def test_the_classifier_is_linear_on_a_draw():
    classifier = StochasticClassifier((2, 8, 3, 5), rngs=nnx.Rngs(0))
    x, key = jnp.ones((4, 2)), jax.random.key(0)
    z = classifier.encoder.sample(x, key)
    np.testing.assert_allclose(classifier(x, key), classifier.head(z))
    with pytest.raises(ValueError, match="inputs, dimensions of Z and classes"):
        StochasticClassifier((2, 5), rngs=nnx.Rngs(0))


def test_features_with_noise_are_a_gaussian_encoder():
    f = jax.random.normal(jax.random.key(0), (6, 3))
    key, scale = jax.random.key(1), 0.7
    z = f + scale * jax.random.normal(key, f.shape)
    by_encoder = float(gaussian_information(z, f, jnp.full(f.shape, scale)))
    assert feature_information(f, f, scale, key) == pytest.approx(by_encoder, rel=1e-5)


def test_the_official_features_are_off_by_the_missing_coordinates():
    """One coordinate's log density instead of three, at the mode."""
    f, scale = 100.0 * jnp.eye(3), 0.5
    official = feature_information(f, f, scale, jax.random.key(0), variant="official")
    off = (3 - 1) * np.log(scale * np.sqrt(2 * np.pi))
    assert official == pytest.approx(np.log(3) + off, rel=1e-5)
    corrected = feature_information(f, f, scale, jax.random.key(0))
    assert corrected == pytest.approx(np.log(3), rel=1e-5)


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
    """Posteriors over a tree of two parameters, one a mean."""
    m = len(means)
    means = jnp.asarray(means, jnp.float32)
    tree = lambda x: {"a": x[..., :1], "b": x[..., 1:]}
    zero = jnp.zeros(m, jnp.int32)
    spread = jnp.full((m, 3, 2), deviations)
    return SwagState(zero, zero, tree(means), tree(jnp.full((m, 2), variance)), tree(spread))


information = jax.jit(
    parameter_information, static_argnames=("draws", "estimator", "select", "sampler_scale")
)


@pytest.mark.parametrize("estimator", ["mc", "jensen", "kolchinsky"])
def test_posteriors_that_are_the_same_tell_nothing(estimator):
    same = posteriors([[1.0, 2.0]] * 3, deviations=0.5)
    found = information(same, jax.random.key(0), estimator=estimator)
    assert found == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("estimator", ["mc", "kolchinsky"])
def test_posteriors_far_apart_tell_the_data_draw(estimator):
    apart = posteriors([[0.0, 0.0], [1e3, 0.0], [0.0, 1e3]], deviations=0.5)
    found = information(apart, jax.random.key(0), estimator=estimator)
    assert found == pytest.approx(np.log(3), rel=1e-6)


def test_the_upper_bound_of_two_posteriors():
    """N(0, 1/2) and N(1, 1/2): the divergence is 1, half of the other posterior's."""
    two = posteriors([[0.0, 0.0], [1.0, 0.0]])
    found = information(two, jax.random.key(0), draws=4000)
    assert found == pytest.approx(0.5, abs=0.03)
    pairs = information(two, jax.random.key(0), estimator="kolchinsky")
    assert pairs == pytest.approx(-np.log((1 + np.exp(-1)) / 2), rel=1e-5)
    mc = information(two, jax.random.key(0), draws=4000, estimator="mc")
    assert mc < pairs < found


def test_the_official_sampler_draws_twice_the_variance():
    """The means stay: both log densities fall alike. The spread of single draws is sqrt(2)."""
    two, keys = posteriors([[0.0, 0.0], [1.0, 0.0]]), jax.random.split(jax.random.key(0), 1000)

    def spread(scale):
        one = lambda key: parameter_information(two, key, draws=1, sampler_scale=scale)
        return jnp.std(jax.jit(jax.vmap(one))(keys))

    assert spread(1.0) / spread(0.5) == pytest.approx(np.sqrt(2), rel=0.1)


def test_the_parameters_of_some_layers():
    state = posteriors([[0.0, 0.0], [0.0, 1e3]])
    only = functools.partial(information, state, jax.random.key(0), estimator="mc")
    assert only(select=lambda tree: tree["a"]) == pytest.approx(0, abs=1e-6)
    assert only(select=lambda tree: tree["b"]) == pytest.approx(np.log(2), rel=1e-6)


def test_a_single_data_draw_tells_nothing_and_errors():
    one = posteriors([[0.0, 0.0]])
    assert information(one, jax.random.key(0)) == 0
    with pytest.raises(ValueError, match="estimator='kl'"):
        information(one, jax.random.key(0), estimator="kl")


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
    with pytest.raises(ValueError, match="NaN"):
        generalization_correlation([1.0, np.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match="one value a model"):
        generalization_correlation([1.0, 2.0], [1.0, 2.0], [0])
    with pytest.raises(ValueError, match="one value a model"):
        generalization_correlation([], [])


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
