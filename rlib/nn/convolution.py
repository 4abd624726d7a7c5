"""Convolution and pooling that stay fast inside loops on a CPU, for (N, H, W, C) images.

`lax.scan`, `lax.map` and `lax.while_loop` keep XLA's CPU compiler from choosing the layout of the
convolutions that differentiation writes: a gradient inside a loop runs 10 to 40 times slower than
outside. `conv` writes its backward in the layout that is fast everywhere; on other back ends it is
JAX's own. The poolings are maxima and sums of strided slices, whose gradients are cheap as well.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float

from rlib.nn.partitioning import logical_axes

_HE_NORMAL = jax.nn.initializers.he_normal()


def conv(
    x: Float[Array, "n h w inputs"], kernel: Float[Array, "kh kw inputs outputs"], stride: int = 1
) -> Float[Array, "n hs ws outputs"]:
    """Convolution (cross-correlation) of NHWC with HWIO, kernels of odd size, zeros outside.

    The output is ceil(h / stride) x ceil(w / stride), centred on pixels 0, stride, 2 stride, ...
    For stride 1 this is the padding "SAME"; for larger ones it is PyTorch's `padding=kh // 2`,
    where "SAME" would shift even sizes by a pixel.

    Differentiable in reverse mode to any order; only the first order is fast in a loop. Forward
    mode (`jax.jvp`, `jax.hessian`) raises TypeError, but for 1x1 kernels. `jax.vmap` over images is
    one convolution; over kernels it is a grouped one, in the gradient as well, which a CPU computes
    slowly: there `lax.map` over the models is several times faster.

    Raises:
        ValueError: a size of the kernel is even, or channels do not agree.

    >>> conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)))[0, :, :, 0]
    Array([[4., 6., 6., 4.],
           [6., 9., 9., 6.],
           [6., 9., 9., 6.],
           [4., 6., 6., 4.]], dtype=float32)
    """
    if kernel.ndim != 4 or x.ndim != 4 or x.shape[-1] != kernel.shape[2]:
        raise ValueError(f"images {x.shape} (NHWC) do not fit a kernel {kernel.shape} (HWIO)")
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"a kernel of {kernel.shape[0]}x{kernel.shape[1]} has no centre pixel")
    if kernel.shape[:2] == (1, 1):
        return jnp.matmul(x[:, ::stride, ::stride], kernel[0, 0])
    return _conv(x, kernel, stride)


def max_pool(
    x: Float[Array, "n h w c"], window: int = 2
) -> Float[Array, "n h//window w//window c"]:
    """Maximum of each window x window square; what is left over at the far edges is dropped.

    Where several values are the largest, they share the gradient.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    return _pool(jnp.maximum, x, window)


def avg_pool(
    x: Float[Array, "n h w c"], window: int = 2
) -> Float[Array, "n h//window w//window c"]:
    """Mean of each window x window square; what is left over at the far edges is dropped.

    >>> avg_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0]
    Array([[ 2.5,  4.5],
           [10.5, 12.5]], dtype=float32)
    """
    return _pool(jnp.add, x, window) / window**2


def _pool(combine, x: Array, window: int) -> Array:
    height, width = (size // window * window for size in x.shape[1:3])
    x = functools.reduce(combine, [x[:, i:height:window] for i in range(window)])
    return functools.reduce(combine, [x[:, :, j:width:window] for j in range(window)])


class Conv(nnx.Module):
    """`conv` with a kernel of its own, drawn by He's rule for relu, and a zero bias if wanted.

    Args:
        inputs, outputs: channels.
        size: height and width of the kernel, odd.
        stride: as `conv`.
        use_bias: add a bias to each channel; a normalisation that follows makes it idle.
        axes: logical names of the channel axes.

    >>> Conv(3, 16, stride=2, rngs=nnx.Rngs(0))(jnp.zeros((5, 32, 32, 3))).shape
    (5, 16, 16, 16)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        use_bias: bool = False,
        rngs: nnx.Rngs,
        kernel_init: Initializer = _HE_NORMAL,
        axes: Sequence[str | None] = ("embed", "mlp"),
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        shape = (size, size, inputs, outputs)
        kernel = kernel_init(rngs.params(), shape, param_dtype)
        self.kernel = nnx.Param(kernel, **logical_axes(None, None, *axes))
        bias = nnx.Param(jnp.zeros(outputs, param_dtype), **logical_axes(axes[-1]))
        self.bias = bias if use_bias else nnx.data(None)
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: Float[Array, "n h w inputs"]) -> Float[Array, "n hs ws outputs"]:
        x, kernel = nnx.nn.dtypes.promote_dtype((x, self.kernel[...]), dtype=self.dtype)
        y = conv(x, kernel, self.stride)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def _native(x: Array, kernel: Array, stride: int) -> Array:
    padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=dimensions
    )


def _native_backward(x: Array, kernel: Array, dy: Array, stride: int) -> tuple[Array, Array]:
    return jax.vjp(lambda x, kernel: _native(x, kernel, stride), x, kernel)[1](dy)


def _cpu_backward(x: Array, kernel: Array, dy: Array, stride: int) -> tuple[Array, Array]:
    # Between strided outputs put zeros: the gradient is then that of stride 1.
    interior = [(0, (full - 1) % stride, stride - 1) for full in x.shape[1:3]]
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *interior, (0, 0, 0)])
    dx = _native(dy, kernel[::-1, ::-1].swapaxes(2, 3), 1)
    # Channels play the batch and the batch plays the channels: dy is the kernel.
    padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
    dimensions = ("NHWC", "HWIO", "NHWC")
    rows = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        padding,
        dimension_numbers=dimensions,
    )
    return dx, rows.transpose(1, 2, 0, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: Array, kernel: Array, stride: int) -> Array:
    return _native(x, kernel, stride)


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _native(x, kernel, stride), (x, kernel)


def _backward(stride: int, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    return lax.platform_dependent(
        *residuals,
        dy,
        cpu=functools.partial(_cpu_backward, stride=stride),
        default=functools.partial(_native_backward, stride=stride),
    )


_conv.defvjp(_forward, _backward)
