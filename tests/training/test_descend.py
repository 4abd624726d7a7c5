import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlib import optim
from rlib.training import descend


def loss(params, key, count):
    return jnp.where(count == 1, jnp.inf, 1.0) * params, count + 1  # the second step's is infinite


KEYS = jax.random.split(jax.random.key(0), 4)


def run(tx, **options):
    return descend(loss, jnp.float32(0), tx, KEYS, 0, look=lambda p: p, **options)


def test_steps_without_a_finite_gradient_are_skipped_and_counted_if_the_caller_says_so():
    guarded = optim.skip_nonfinite(optax.sgd(1.0))
    found = run(guarded, looks=2)
    assert (float(found.params), int(found.state.skipped), int(found.carry)) == (-3, 1, 4)
    np.testing.assert_array_equal(found.seen, [-1, -3])
    np.testing.assert_array_equal(run(guarded, looks=2, before=True).seen, [0, -1])
    assert not np.isfinite(run(optax.sgd(1.0)).params)


def test_momentum_by_hand_with_batches_under_vmap():
    error = lambda x, batch, carry: (jnp.mean((batch[0] - x) ** 2) * batch[1], carry)
    batches = np.random.default_rng(0).standard_normal((3, 5)), np.array([1.0, 2.0, 0.5])
    fit = lambda rate: descend(error, jnp.float32(1), optax.sgd(rate, 0.9), batches).params
    found = jax.vmap(fit)(jnp.array([0.1, 0.3]))
    for rate, last in zip((0.1, 0.3), found, strict=True):
        x, trace = 1.0, 0.0
        for rows, weight in zip(*batches, strict=True):
            trace = 0.9 * trace - 2 * weight * np.mean(rows - x)
            x -= rate * trace
        assert float(last) == pytest.approx(x, rel=1e-5)


def test_looks_divide_the_steps():
    for looks in (0, 3):
        with pytest.raises(ValueError, match=f"4 steps are not divisible into {looks} looks"):
            run(optax.sgd(1.0), looks=looks)
