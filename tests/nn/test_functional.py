import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlib.nn import affine, cosine, sine


@pytest.mark.usefixtures("usual_optimizations")
@pytest.mark.parametrize(("ours", "exact"), [(sine, np.sin), (cosine, np.cos)])
@pytest.mark.parametrize("bound", [1.0, 30.0, 1e3, 1e5])
def test_error_against_float64(ours, exact, bound):
    x = np.random.default_rng(0).uniform(-bound, bound, 100_000).astype(np.float32)
    error = np.asarray(jax.jit(ours)(x), np.float64) - exact(x.astype(np.float64))
    assert np.abs(error).max() < 1.5e-7


def test_zero_is_exact_and_nan_stays():
    assert sine(jnp.float32(0)) == 0
    assert cosine(jnp.float32(0)) == 1
    assert np.isnan(sine(jnp.float32(np.nan)))


def test_derivatives_in_both_modes_to_third_order():
    x = np.float32(0.7)
    first, second = jax.grad(sine), jax.grad(jax.grad(sine))
    third = jax.jvp(second, (x,), (1.0,))[1]
    chex.assert_trees_all_close(
        (first(x), second(x), third), (np.cos(x), -np.sin(x), -np.cos(x)), atol=3e-7
    )
    chex.assert_trees_all_close(jax.jvp(sine, (x,), (2.0,))[1], 2 * np.cos(x), atol=3e-7)


def test_other_dtypes_use_the_library():
    x = jnp.asarray([0.5, 3.0], jnp.bfloat16)
    assert (sine(x) == jnp.sin(x)).all()
    assert sine(x).dtype == jnp.bfloat16


def test_affine_and_its_gradients_against_float64():
    draw = np.random.default_rng(0)
    x, w, b, dy = (draw.normal(size=s) for s in ((50, 7), (7, 3), (3,), (50, 3)))
    args = [jnp.asarray(a, jnp.float32) for a in (x, w, b)]
    y, pull = jax.vjp(lambda *a: affine(*a, "highest"), *args)
    exact = (x @ w + b, (dy @ w.T, x.T @ dy, dy.sum(axis=0)))
    chex.assert_trees_all_close(
        (y, pull(jnp.asarray(dy, jnp.float32))), exact, rtol=2e-5, atol=1e-5
    )


def test_bias_gradient_is_a_product():
    grad = jax.jit(jax.grad(lambda b, x, w: affine(x, w, b).sum()))
    text = grad.lower(jnp.ones(3), jnp.ones((50, 7)), jnp.ones((7, 3))).as_text()
    assert "dot_general" in text
