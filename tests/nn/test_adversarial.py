"""FGSM and PGD: linear models in closed form, distances, ranges, examples attacked apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlib.nn import fgsm, pgd

W = jnp.array([2.0, -1.0, 0.0])
X = jnp.array([[0.5, 0.25, 1.0], [-1.0, 0.0, 3.0]])


def linear(x):
    return jnp.sum(x @ W)


def test_of_a_linear_loss_both_are_the_best_attack():
    """max of w.d over |d| <= epsilon is epsilon |w|_1, at epsilon sign(w)."""
    for moved in (fgsm(linear, X, 0.25), pgd(linear, X, 0.25, step=0.125, steps=4)):
        np.testing.assert_allclose(moved - X, np.tile([0.25, -0.25, 0], (2, 1)))
        assert linear(moved) - linear(X) == pytest.approx(2 * 0.25 * 3)


def test_the_published_pgd_does_not_reach_its_distance():
    moved = pgd(linear, X, 0.3, step=0.05, steps=5)
    assert jnp.max(jnp.abs(moved - X)) == pytest.approx(0.25)


def test_a_distance_for_each_feature_and_half_precision():
    epsilon = jnp.array([0.25, 0.0, 1.0])
    x = X.astype(jnp.bfloat16)
    for moved in (fgsm(linear, x, epsilon), pgd(linear, x, epsilon, step=epsilon, steps=1)):
        assert moved.dtype == jnp.bfloat16
        np.testing.assert_array_equal(moved - x, np.tile([0.25, 0, 0], (2, 1)))
    with pytest.raises(ValueError, match="epsilon="):
        fgsm(linear, X, -epsilon)


def curved(x):
    return jnp.sum(jnp.sin(5 * x) * jnp.roll(x, 1, axis=-1))


def test_pgd_stays_within_distance_and_range_and_beats_fgsm():
    x = jax.random.uniform(jax.random.key(0), (20, 3))
    attack = jax.jit(lambda x, e: pgd(curved, x, e, step=0.02, steps=40, low=0.0, high=1.0))
    moved = attack(x, 0.2)
    assert float(jnp.max(jnp.abs(moved - x))) <= 0.2 + 1e-6
    assert float(moved.min()) >= 0 and float(moved.max()) <= 1
    once = fgsm(curved, x, 0.2, low=0.0, high=1.0)
    assert curved(x) < curved(once) < curved(moved)
    np.testing.assert_array_equal(attack(x, 0.0), x)


def test_a_random_start_lies_within_the_distance():
    flat = lambda x: jnp.sum(0 * x)
    first, second = (
        pgd(flat, X, 0.5, step=0.1, steps=1, key=jax.random.key(seed)) - X for seed in (0, 1)
    )
    assert float(jnp.max(jnp.abs(first))) <= 0.5
    assert not np.allclose(first, second)


def test_examples_are_attacked_each_for_itself():
    one = lambda x: jnp.sum(jnp.square(jnp.tanh(x) - 0.3))
    together = pgd(one, X, 0.3, step=0.1, steps=5)
    apart = jnp.stack([pgd(one, row, 0.3, step=0.1, steps=5) for row in X])
    np.testing.assert_allclose(together, apart)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fgsm(linear, X, -0.1), "epsilon=-0.1"),
        (lambda: fgsm(linear, X, float("nan")), "epsilon=nan"),
        (lambda: pgd(linear, X, 0.1, step=-1.0, steps=2), "step=-1.0"),
        (lambda: pgd(linear, X, 0.1, step=0.1, steps=0), "steps=0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
