"""A small residual network for small images, without statistics that couple the examples.

Pre-activation blocks (He et al. 2016, arXiv 1603.05027) with group normalisation (Wu and He 2018,
arXiv 1803.08494): no running averages, so that one network serves federated clients, batches of
one and `vmap`, and its gradient is a mean over examples.

Deviations

| | paper | official code | here |
|---|---|---|---|
| stem | 3x3, 16 channels (CIFAR) | the same | 3x3, `widths[0]` channels |
| normalisation | batch | batch | group, epsilon 1e-5 |
| shortcut at a change of shape | 1x1 convolution | 1x1, on the pre-activation | as the code |
| stride 2 | 3x3, padding not said | padding 1 on each side | as the code |
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from rlib.nn.convolution import Conv
from rlib.nn.coordinate import Affine
from rlib.nn.partitioning import logical_axes


def group_norm(
    x: Float[Array, "n h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    groups: int,
    epsilon: float = 1e-5,
) -> Float[Array, "n h w c"]:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, per example and group of channels.

    Statistics are taken in float32, over the pixels of each channel first and over the channels of
    a group then: on a CPU 2 to 4 times as fast as `nnx.GroupNorm`, with its gradient.

    Raises:
        ValueError: the channels do not divide into the groups.

    >>> x = jnp.array([1.0, 3.0, 10.0, 30.0]).reshape(1, 1, 1, 4)
    >>> group_norm(x, jnp.ones(4), jnp.zeros(4), groups=2).ravel().round(3)
    Array([-1.,  1., -1.,  1.], dtype=float32)
    """
    n, channels = x.shape[0], x.shape[-1]
    if channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups")

    def mean(v: Array) -> Array:
        group = v.mean(axis=(1, 2)).reshape(n, groups, -1).mean(axis=-1, keepdims=True)
        return jnp.broadcast_to(group, (n, groups, channels // groups)).reshape(n, 1, 1, channels)

    centred = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = centred - mean(centred)
    gain = jax.lax.rsqrt(mean(jnp.square(centred)) + epsilon) * scale
    return (centred * gain + bias).astype(x.dtype)


class GroupNorm(nnx.Module):
    """`group_norm` with a scale, ones at first, and a bias, zeros at first.

    Raises:
        ValueError: the channels do not divide into the groups.

    >>> norm = GroupNorm(channels=4, groups=2)
    >>> norm(jnp.array([1.0, 3.0, 10.0, 30.0]).reshape(1, 1, 1, 4)).ravel().round(3)
    Array([-1.,  1., -1.,  1.], dtype=float32)
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        *,
        axis: str | None = "embed",
        param_dtype: Dtype = jnp.float32,
    ):
        if channels % groups:
            raise ValueError(f"{channels} channels do not divide into {groups} groups")
        self.scale = nnx.Param(jnp.ones(channels, param_dtype), **logical_axes(axis))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype), **logical_axes(axis))
        self.groups = groups

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        return group_norm(x, self.scale[...], self.bias[...], self.groups)


class ResidualBlock(nnx.Module):
    """shortcut + conv(relu(norm(conv(relu(norm(x)))))); its inner channels are "mlp".

    The shortcut is x, or, where the shape changes, a 1x1 convolution of relu(norm(x)).

    Raises:
        ValueError: the channels do not divide into the groups.

    >>> apply = lambda x: ResidualBlock(8, 16, stride=2, rngs=nnx.Rngs(0))(x)
    >>> jax.eval_shape(apply, jnp.zeros((5, 32, 32, 8))).shape
    (5, 16, 16, 16)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stride: int = 1,
        groups: int = 8,
        rngs: nnx.Rngs,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        def conv(inputs, size, stride, axes):
            return Conv(
                inputs,
                outputs,
                size,
                stride=stride,
                rngs=rngs,
                axes=axes,
                dtype=dtype,
                param_dtype=param_dtype,
            )

        self.norm1 = GroupNorm(inputs, groups, param_dtype=param_dtype)
        self.conv1 = conv(inputs, 3, stride, ("embed", "mlp"))
        self.norm2 = GroupNorm(outputs, groups, axis="mlp", param_dtype=param_dtype)
        self.conv2 = conv(outputs, 3, 1, ("mlp", "embed"))
        same = inputs == outputs and stride == 1
        # Both axes would be called "embed", and an array can name a mesh axis only once.
        self.project = nnx.data(None) if same else conv(inputs, 1, stride, (None, "embed"))

    def __call__(self, x: Float[Array, "n h w inputs"]) -> Float[Array, "n hs ws outputs"]:
        h = jax.nn.relu(self.norm1(x))
        shortcut = x if self.project is None else self.project(h)
        return shortcut + self.conv2(jax.nn.relu(self.norm2(self.conv1(h))))


class ResNet(nnx.Module):
    """Images (N, H, W, C) to float32 logits (N, classes).

    Stage i has `blocks` blocks of `widths[i]` channels and halves height and width, but for the
    first one. `ResNet(10, in_channels=3, widths=(16, 32, 64), blocks=3)` is ResNet-20.

    Args:
        classes: number of logits.
        in_channels: of the images, 1 or 3.
        widths: channels of each stage, multiples of `groups`.
        blocks: of two convolutions each, per stage.
        groups: of channels that share a mean and a variance.
        rngs: the stream "params".
        dtype: of the computation; parameters, statistics and logits stay as they are.

    Example:
        >>> logits = lambda images: ResNet(10, in_channels=1, blocks=1, rngs=nnx.Rngs(0))(images)
        >>> jax.eval_shape(logits, jnp.zeros((5, 28, 28, 1))).shape
        (5, 10)
    """

    def __init__(
        self,
        classes: int,
        *,
        in_channels: int,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 2,
        groups: int = 8,
        rngs: nnx.Rngs,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        self.stem = Conv(
            in_channels,
            widths[0],
            rngs=rngs,
            axes=(None, "embed"),
            dtype=dtype,
            param_dtype=param_dtype,
        )
        layers, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(
                    ResidualBlock(
                        inputs,
                        width,
                        stride=2 if stage > 0 and block == 0 else 1,
                        groups=groups,
                        rngs=rngs,
                        dtype=dtype,
                        param_dtype=param_dtype,
                    )
                )
                inputs = width
        self.blocks = nnx.List(layers)
        self.norm = GroupNorm(inputs, groups, param_dtype=param_dtype)
        self.head = Affine(
            inputs,
            classes,
            rngs=rngs,
            axes=("embed", None),
            dtype=jnp.float32,
            param_dtype=param_dtype,
            precision=None,
        )

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        h = jax.nn.relu(self.norm(h))
        return self.head(jnp.mean(h, axis=(1, 2), dtype=jnp.float32))
