"""The small convolutional network of federated learning's papers."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from rlib.nn.convolution import Conv, max_pool
from rlib.nn.coordinate import Affine


class ConvNet(nnx.Module):
    """Convolutions, each with an activation and 2x2 max pooling, then affine layers.

    Args:
        shape: height, width and channels of an image.
        widths: channels of each 3x3 convolution.
        hidden: width of each affine layer before the last.
        outputs: of the last one.

    Raises:
        ValueError: more poolings than the image has halves.

    >>> network = ConvNet((28, 28, 1), (16, 32), (64,), 10, rngs=nnx.Rngs(0))
    >>> network(jax.numpy.ones((5, 28, 28, 1))).shape
    (5, 10)
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        widths: Sequence[int],
        hidden: Sequence[int],
        outputs: int,
        *,
        activation: Callable[[Array], Array] = jax.nn.relu,
        rngs: nnx.Rngs,
        dtype: Dtype | None = None,
    ):
        height, width, channels = shape
        convolutions, layers = [], []
        for size in widths:
            if min(height, width) < 2:
                raise ValueError(f"{len(widths)} poolings of a picture of {shape[0]}x{shape[1]}")
            convolutions.append(Conv(channels, size, use_bias=True, rngs=rngs, dtype=dtype))
            height, width, channels = height // 2, width // 2, size
        inputs = height * width * channels
        for size in (*hidden, outputs):
            layers.append(Affine(inputs, size, rngs=rngs, dtype=dtype, precision=None))
            inputs = size
        self.convolutions, self.layers = nnx.List(convolutions), nnx.List(layers)
        self.activation = activation

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n outputs"]:
        for convolution in self.convolutions:
            x = max_pool(self.activation(convolution(x)))
        x = x.reshape(len(x), -1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)
