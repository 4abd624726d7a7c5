"""SWAG: the posterior of a path against float64 moments, Woodbury against the dense density."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from rlib.optim import SwagState, record_swag, swag_log_density, swag_restrict, swag_sample

PATH = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)


log_density = jax.jit(swag_log_density, static_argnames=("scale", "floor"))


def recorded(path, start, every, rank, dtype=jnp.float32):
    """The state after updates that lead along a path, from zeros."""
    tx = record_swag(start, every, rank)
    steps = jnp.asarray(np.diff(path, axis=0, prepend=0), dtype)

    def step(carry, update):
        params, state = carry
        passed, state = tx.update(update, state, params)
        return (optax.apply_updates(params, passed), state), passed

    params = jnp.zeros(path.shape[1], dtype)
    (_, state), passed = jax.lax.scan(step, (params, tx.init(params)), steps)
    np.testing.assert_array_equal(passed, steps)
    return state


def test_moments_and_deviations_of_a_path():
    state = recorded(PATH, start=2, every=2, rank=2)
    seen = PATH[[3, 5, 7]].astype(np.float64)  # after steps 4, 6 and 8
    assert state.count == 9
    assert state.recorded == 3
    np.testing.assert_allclose(state.mean, seen.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(state.variance, seen.var(axis=0), rtol=1e-5)
    # Each deviation is from the mean that it has updated; the oldest is overwritten.
    own = [seen[i] - seen[: i + 1].mean(axis=0) for i in range(3)]
    np.testing.assert_allclose(state.deviations, [own[2], own[1]], rtol=1e-4, atol=1e-6)


def test_empty_slots_are_zero_and_nothing_is_recorded_early():
    state = recorded(PATH[:4], start=2, every=1, rank=4)
    np.testing.assert_allclose(state.deviations[2:], 0)
    assert jnp.any(state.deviations[1] != 0)
    early = recorded(PATH[:2], start=2, every=1, rank=4)
    assert early.recorded == 0
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(early[2:]))
    assert jnp.isfinite(log_density(early, jnp.zeros(3)))


def test_small_variances_survive_float32():
    """Moves of 1e-4 around 1: the difference of float32 moments would be rounding alone."""
    path = (1 + 1e-4 * PATH).astype(np.float32)
    state = recorded(path, start=0, every=1, rank=2)
    np.testing.assert_allclose(state.variance, path.astype(np.float64).var(axis=0), rtol=1e-2)


def test_half_precision_parameters_are_recorded_in_float32():
    state = recorded(PATH, start=0, every=1, rank=2, dtype=jnp.bfloat16)
    assert state.mean.dtype == state.variance.dtype == state.deviations.dtype == jnp.float32
    np.testing.assert_allclose(state.mean, PATH.mean(axis=0), atol=0.05)


@pytest.fixture(scope="module")
def by_hand():
    """The specification's posterior, on a tree: v = (1, 2, 3), K = 3 with an empty slot."""
    tree = lambda x: {"a": jnp.asarray(x[..., :1]), "b": [jnp.asarray(x[..., 1:])]}
    deviations = np.array([[1.0, 0, 1], [0, 1, 1], [0, 0, 0]], np.float32)
    variance, mean = np.array([1.0, 2, 3], np.float32), np.array([0.5, 0, -1], np.float32)
    zero = jnp.zeros((), jnp.int32)
    return SwagState(zero, zero, tree(mean), tree(variance), tree(deviations)), tree


COVARIANCE = np.array([[0.75, 0, 0.25], [0, 1.25, 0.25], [0.25, 0.25, 2]])


def test_log_density_is_the_dense_one(by_hand):
    state, tree = by_hand
    assert np.linalg.slogdet(COVARIANCE)[1] == pytest.approx(0.5596158, abs=1e-7)
    theta, mean = np.array([1.0, 2, 3], np.float32), np.array([0.5, 0, -1])
    dense = stats.multivariate_normal(mean, COVARIANCE)
    assert log_density(state, tree(theta)) == pytest.approx(dense.logpdf(theta), rel=1e-5)
    at_mean = log_density(state, state.mean)
    assert at_mean == pytest.approx(-0.5596158 / 2 - 1.5 * np.log(2 * np.pi), rel=1e-5)
    twice = stats.multivariate_normal(mean, 2 * COVARIANCE)  # the official sampler's
    scaled = log_density(state, tree(theta), scale=1.0)
    assert scaled == pytest.approx(twice.logpdf(theta), rel=1e-5)


def test_the_part_of_a_posterior_is_its_marginal(by_hand):
    state, tree = by_hand
    part = swag_restrict(state, lambda t: t["b"])
    theta = np.array([0.0, 2, 3], np.float32)
    dense = stats.multivariate_normal([0, -1], COVARIANCE[1:, 1:])
    found = log_density(part, tree(theta)["b"])
    assert found == pytest.approx(dense.logpdf(theta[1:]), rel=1e-5)


def test_samples_have_the_covariance(by_hand):
    state, _ = by_hand
    keys = jax.random.split(jax.random.key(0), 40_000)
    both = lambda k: [swag_sample(k, state, scale=scale) for scale in (0.5, 1.0)]
    for drawn, scale in zip(jax.jit(jax.vmap(both))(keys), (0.5, 1.0), strict=True):
        drawn = np.concatenate([drawn["a"], drawn["b"][0]], axis=1)
        np.testing.assert_allclose(drawn.mean(axis=0), [0.5, 0, -1], atol=0.04)
        np.testing.assert_allclose(np.cov(drawn.T), 2 * scale * COVARIANCE, atol=0.1)


def test_frozen_weights_are_floored():
    state = recorded(np.ones((4, 2), np.float32), start=1, every=1, rank=2)
    assert jnp.all(state.variance == 0)
    found = log_density(state, jnp.ones(2), floor=2e-6)
    by_hand = stats.norm.logpdf(0, 0, 1e-3) * 2
    assert found == pytest.approx(by_hand, rel=1e-5)
    assert jnp.all(swag_sample(jax.random.key(0), state) == 1)


def test_many_models_at_once_and_extra_arguments():
    tx = optax.with_extra_args_support(record_swag(0, 1, 2))
    params = jnp.asarray(PATH)
    state = jax.vmap(tx.init)(params)
    updates = jnp.ones_like(params)
    _, state = jax.vmap(lambda u, s, p: tx.update(u, s, p, value=1.0))(updates, state, params)
    np.testing.assert_allclose(state.mean, PATH + 1, rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="rank=1"):
        record_swag(0, 1, rank=1)
    with pytest.raises(ValueError, match="every=0"):
        record_swag(0, 0)
    tx = record_swag(0, 1)
    state = tx.init(jnp.zeros(2))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.zeros(2), state)
    with pytest.raises(ValueError, match="of a posterior of"):
        log_density(state, {"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"\[\(1,\)\] of a posterior of .*\[\(2,\)\]"):
        log_density(state, jnp.zeros(1))
