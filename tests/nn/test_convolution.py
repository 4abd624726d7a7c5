"""Convolution and pooling against JAX's own and against loops in float64 numpy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlib.nn.convolution import Conv, avg_pool, conv, max_pool

DRAW = np.random.default_rng(0)
SHAPES = [  # images, kernel
    ((2, 8, 8, 3), (3, 3, 3, 4)),
    ((1, 7, 5, 2), (3, 3, 2, 3)),
    ((3, 6, 9, 2), (5, 5, 2, 3)),
    ((2, 5, 4, 3), (1, 1, 3, 2)),
    ((1, 1, 1, 1), (3, 3, 1, 1)),
    ((2, 3, 4, 2), (5, 3, 2, 1)),
    ((2, 2, 2, 1), (7, 7, 1, 2)),
]


def draw(*shape):
    return DRAW.normal(size=shape).astype(np.float32)


def native(x, kernel, stride):
    padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def loop(x, kernel):
    """The definition, in float64."""
    kh, kw = kernel.shape[:2]
    x = np.pad(np.float64(x), [(0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows, np.float64(kernel))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("images", "kernel"), SHAPES)
def test_forward_and_gradients(images, kernel, stride):
    x, w = draw(*images), draw(*kernel)
    chex.assert_trees_all_close(conv(x, w, stride), loop(x, w)[:, ::stride, ::stride], atol=2e-5)
    with jax.enable_x64(True):
        x, w = np.float64(x), np.float64(w)
        y, pull = jax.vjp(lambda x, w: conv(x, w, stride), x, w)
        exact, exact_pull = jax.vjp(lambda x, w: native(x, w, stride), x, w)
        dy = DRAW.normal(size=y.shape)
        chex.assert_trees_all_close((y, pull(dy)), (exact, exact_pull(dy)), rtol=1e-12, atol=1e-12)


def test_stride_one_is_the_padding_same():
    x, w = draw(2, 7, 6, 3), draw(3, 3, 3, 4)
    same = jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    chex.assert_trees_all_close(conv(x, w), same, atol=1e-6)


def test_backward_is_in_the_fast_layout_on_a_cpu():
    """The trap is a dimension order that XLA keeps inside loops: no such order is written."""
    fast = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"

    def step(w, x):
        return w - jax.grad(lambda w: jnp.sum(conv(x, w, 2) ** 2))(w), None

    run = jax.jit(lambda w, xs: jax.lax.scan(step, w, xs)[0])
    traced = run.trace(draw(3, 3, 2, 4), draw(5, 2, 8, 8, 2))
    for platform in ("cpu", "tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        orders = [fast in line for line in text.splitlines() if "stablehlo.convolution" in line]
        assert len(orders) > 1 and all(orders) == (platform == "cpu")
    assert "conditional" not in traced.lower().compile().as_text()


def test_vmap_over_images_and_over_kernels():
    x, w = draw(3, 2, 5, 5, 2), draw(3, 3, 3, 2, 4)
    gradient = jax.grad(lambda w, x: jnp.sum(conv(x, w) ** 2))
    for args in ((w[0], x), (w, x)):
        axes = (None if args[0].ndim == 4 else 0, 0)
        expected = [gradient(w[0 if axes[0] is None else i], x[i]) for i in range(3)]
        found = jax.vmap(gradient, in_axes=axes)(*args)
        chex.assert_trees_all_close(found, jnp.stack(expected), rtol=1e-4, atol=1e-4)


def test_second_order_in_reverse_mode_and_no_forward_mode():
    x, w, direction = draw(1, 5, 5, 2), draw(3, 3, 2, 2), draw(3, 3, 2, 2)

    def product(apply):
        loss = lambda w: jnp.sum(jnp.tanh(apply(x, w, 1)))
        return jax.grad(lambda w: jnp.vdot(jax.grad(loss)(w), direction))(w)

    chex.assert_trees_all_close(product(conv), product(native), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda w: conv(x, w), (w,), (direction,))


def test_bfloat16():
    x, w = jnp.asarray(draw(2, 5, 5, 3), jnp.bfloat16), jnp.asarray(draw(3, 3, 3, 2), jnp.bfloat16)
    gradients = jax.grad(lambda x, w: jnp.sum(conv(x, w, 2)), (0, 1))(x, w)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2


@pytest.mark.parametrize(
    ("images", "kernel", "message"),
    [((1, 4, 4, 2), (2, 2, 2, 1), "no centre"), ((1, 4, 4, 2), (3, 3, 1, 1), "do not fit")],
)
def test_what_does_not_fit_is_refused(images, kernel, message):
    with pytest.raises(ValueError, match=message):
        conv(jnp.zeros(images), jnp.zeros(kernel))


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (1, 7, 5, 2)])
def test_pools_are_reduce_window(shape, window):
    x, size = draw(*shape), (1, window, window, 1)
    pairs = [
        (max_pool, lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, size, size, "VALID")),
        (
            avg_pool,
            lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, size, size, "VALID") / window**2,
        ),
    ]
    for ours, exact in pairs:
        y, pull = jax.vjp(lambda x, f=ours: f(x, window), x)
        expected, exact_pull = jax.vjp(exact, x)
        chex.assert_trees_all_close((y, pull(y)), (expected, exact_pull(y)), rtol=1e-6, atol=1e-6)


def test_module_is_a_convolution_with_a_bias():
    layer = Conv(2, 3, 5, stride=2, use_bias=True, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray([1.0, 2.0, 3.0])
    x = draw(2, 9, 8, 2)
    chex.assert_trees_all_close(
        layer(x), native(x, layer.kernel[...], 2) + jnp.asarray([1.0, 2.0, 3.0]), atol=1e-5
    )
    kernel = Conv(64, 64, rngs=nnx.Rngs(0)).kernel[...]
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
