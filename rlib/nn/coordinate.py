"""Coordinate networks: coordinates in [-1, 1]^d to signal values.

| | first layer | hidden layers | source, arXiv |
|---|---|---|---|
| `Siren` | sin(w_first z) | sin(w0 z) | Sitzmann et al. 2020, 2006.09661 |
| `Finer` | sin(w0 (abs(z) + 1) z), bias U(-k, k) | the same | Liu et al. 2024, 2312.02434 |
| `Gaussian` | exp(-(s z)^2) | the same | Ramasinghe and Lucey 2022, 2111.15135 |
| `Wire` | exp(i w z - s^2 abs(z)^2) | the same, z complex | Saragadam et al. 2023, 2301.05187 |
| `FourierMLP` | sin, cos of 2 pi B x | relu | Tancik et al. 2020, 2006.10739 |

z is the affine map of a layer's input. `n_hidden` counts the layers with an activation; a linear
layer follows. Frequencies and scales are `Constant` variables, not static attributes: networks
that differ in them alone share one compiled program.

Deviations

| | paper | official code | here |
|---|---|---|---|
| Fourier features, weights | not said | Glorot normal | PyTorch's default |
| SIREN, biases | not said | PyTorch's default, U(+-1/sqrt(fan_in)) | as the code |
| SIREN, output layer | not said | drawn like the hidden ones | as the code |
| FINER, gradient of abs(z) + 1 | flows | stopped | stopped; `detach=False` for the paper |
| Gaussian | exp(-z^2 / (2 a^2)) | exp(-(s z)^2) in later repositories | s = 1 / (sqrt(2) a) |
| WIRE | complex weights | complex64, Adam on both parts apart | real arithmetic on the pair |
| Fourier features | sigmoid output, [0, 1] | the same | linear output, [-1, 1] |
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from rlib.nn.functional import affine, cosine, sine
from rlib.nn.partitioning import logical_axes


class Constant(nnx.Variable):
    """A number or array of a model that no optimiser touches.

    >>> network = Gaussian(1, 16, 1, 2, scale=2.0, rngs=nnx.Rngs(0))
    >>> len(jax.tree.leaves(nnx.state(network, nnx.Param)))  # three kernels and biases
    6
    >>> jax.tree.leaves(nnx.state(network, Constant))
    [Array(2., dtype=float32)]
    """


def symmetric_uniform(limit: float) -> Initializer:
    """Initialiser of U(-limit, limit)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class Affine(nnx.Module):
    """x @ kernel + bias with PyTorch's default initialisation, U(+-1/sqrt(inputs)), unless given.

    Differs from `nnx.Linear` in the bias's gradient (see `rlib.nn.functional.affine`) and in its
    precision: "highest" by default, since fits of 50 dB do not survive bfloat16 or TF32 products.

    >>> ones = nnx.initializers.ones
    >>> Affine(3, 2, rngs=nnx.Rngs(0), kernel_init=ones, bias_init=ones)(jnp.ones((1, 3)))
    Array([[4., 4.]], dtype=float32)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        axes: Sequence[str | None] = ("embed", "mlp"),
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: jax.lax.PrecisionLike = "highest",
    ):
        default = symmetric_uniform(1 / math.sqrt(inputs))
        kernel = (kernel_init or default)(rngs.params(), (inputs, outputs), param_dtype)
        bias = (bias_init or default)(rngs.params(), (outputs,), param_dtype)
        self.kernel = nnx.Param(kernel, **logical_axes(*axes))
        self.bias = nnx.Param(bias, **logical_axes(axes[-1]))
        self.dtype, self.precision = dtype, precision

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        x, kernel, bias = nnx.nn.dtypes.promote_dtype(
            (x, self.kernel[...], self.bias[...]), dtype=self.dtype
        )
        return affine(x, kernel, bias, self.precision)


class CoordinateNetwork(nnx.Module):
    """Affine layers with an activation between them; a subclass gives `activate`.

    Args:
        sizes: coordinates, width of each hidden layer, channels.
        limits: kernel i is drawn from U(-limits[i], limits[i]); PyTorch's default if None.
        first_bias: the same for the first bias.
        rngs: the stream "params" draws kernels and biases, layer by layer.

    Raises:
        NotImplementedError: called without `activate`.

    >>> class Relu(CoordinateNetwork):
    ...     def activate(self, z, layer):
    ...         return jax.nn.relu(z)
    >>> jax.eval_shape(Relu((1, 16, 16, 1), rngs=nnx.Rngs(0)), jnp.zeros((5, 1))).shape
    (5, 1)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        rngs: nnx.Rngs,
        limits: Sequence[float] | None = None,
        first_bias: float | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
    ):
        self.layers = nnx.List(
            Affine(
                sizes[i],
                sizes[i + 1],
                rngs=rngs,
                kernel_init=symmetric_uniform(limits[i]) if limits else None,
                bias_init=symmetric_uniform(first_bias) if i == 0 and first_bias else None,
                axes=_axes(i, len(sizes) - 2),
                dtype=dtype,
                param_dtype=param_dtype,
            )
            for i in range(len(sizes) - 1)
        )

    def encode(self, x: Array) -> Array:
        return x

    def activate(self, z: Array, layer: int) -> Array:
        raise NotImplementedError(f"{type(self).__name__} has no activation")

    def decode(self, y: Array) -> Array:
        return y

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch outputs"]:
        h = self.encode(x)
        for index, layer in enumerate(self.layers[:-1]):
            h = self.activate(layer(h), index)
        return self.decode(self.layers[-1](h))


def _sizes(in_dim: int, hidden: int, out_dim: int, n_hidden: int, at_least: int = 1) -> list[int]:
    if n_hidden < at_least:
        raise ValueError(f"n_hidden={n_hidden}: this network needs at least {at_least} layers")
    return [in_dim, *[hidden] * n_hidden, out_dim]


def _axes(index: int, n_hidden: int) -> tuple[str | None, str | None]:
    """Every second kernel is split by columns, the next by rows, as for pairs of MLP layers."""
    inside, outside = ("embed", "mlp") if index % 2 == 0 else ("mlp", "embed")
    return (None if index == 0 else inside, None if index == n_hidden else outside)


class Siren(CoordinateNetwork):
    """Sinusoidal network, initialised as in the official code.

    Args:
        in_dim, hidden, out_dim: number of coordinates, width, channels.
        n_hidden: number of sine layers, at least 2.
        w0: angular frequency of the hidden layers, and divisor of their initial weights.
        w_first: angular frequency of the first layer (30 published, 3000 for sounds).
        rngs, first_bias, dtype, param_dtype: as `CoordinateNetwork`.

    >>> jax.eval_shape(Siren(1, 16, 1, 2, rngs=nnx.Rngs(0)), jnp.zeros((5, 1))).shape
    (5, 1)
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int,
        out_dim: int,
        n_hidden: int,
        *,
        w0: float = 30.0,
        w_first: float = 30.0,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        sizes = _sizes(in_dim, hidden, out_dim, n_hidden, at_least=2)
        limits = [1 / in_dim] + [math.sqrt(6 / hidden) / w0] * n_hidden
        super().__init__(sizes, limits=limits, rngs=rngs, **kwargs)
        self.w_first = Constant(jnp.float32(w_first))
        self.w0 = Constant(jnp.float32(w0))

    def frequency(self, layer: int, dtype: Dtype) -> Array:
        return (self.w_first if layer == 0 else self.w0)[...].astype(dtype)

    def activate(self, z: Array, layer: int) -> Array:
        return sine(self.frequency(layer, z.dtype) * z)


class Finer(Siren):
    """SIREN whose frequency grows with the pre-activation, and wide first biases.

    Args (others as `Siren`):
        k: half-width of the first layer's bias; None for PyTorch's default.
        detach: stop the gradient of abs(z) + 1, as the official code does.

    >>> network = Finer(1, 16, 1, 2, w_first=1.0, rngs=nnx.Rngs(0))
    >>> round(float(network.activate(jnp.float32(0.5), layer=0)), 4)  # sin(1.5 * 0.5)
    0.6816
    """

    def __init__(self, *args: Any, k: float | None = None, detach: bool = True, **kwargs: Any):
        super().__init__(*args, first_bias=k, **kwargs)
        self.detach = detach

    def activate(self, z: Array, layer: int) -> Array:
        scale = jnp.abs(z) + 1
        if self.detach:
            scale = jax.lax.stop_gradient(scale)
        return sine(self.frequency(layer, z.dtype) * scale * z)


class Gaussian(CoordinateNetwork):
    """exp(-(s z)^2) in every layer. `scale` is s; the other arguments are as `Siren`'s.

    >>> network = Gaussian(1, 16, 1, 2, scale=2.0, rngs=nnx.Rngs(0))
    >>> round(float(network.activate(jnp.float32(0.5), layer=0)), 4)  # exp(-1)
    0.3679
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int,
        out_dim: int,
        n_hidden: int,
        *,
        scale: float = 30.0,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(_sizes(in_dim, hidden, out_dim, n_hidden), rngs=rngs, **kwargs)
        self.scale = Constant(jnp.float32(scale))

    def activate(self, z: Array, layer: int) -> Array:
        return jnp.exp(-jnp.square(self.scale[...].astype(z.dtype) * z))


class FourierMLP(CoordinateNetwork):
    """[sin 2 pi B x, cos 2 pi B x] with B ~ N(0, sigma^2), then a relu network.

    Args (others as `Siren`):
        n_hidden: number of relu layers.
        sigma: standard deviation of B in cycles per unit length.
        features: number of frequencies m; the network sees 2 m inputs.

    >>> network = FourierMLP(2, 16, 1, 1, features=3, rngs=nnx.Rngs(0))
    >>> network.encode(jnp.zeros(2))
    Array([0., 0., 0., 1., 1., 1.], dtype=float32)
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int,
        out_dim: int,
        n_hidden: int,
        *,
        sigma: float = 10.0,
        features: int = 256,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        sizes = _sizes(2 * features, hidden, out_dim, n_hidden)
        super().__init__(sizes, rngs=rngs, **kwargs)
        self.frequencies = Constant(sigma * jax.random.normal(rngs.params(), (in_dim, features)))

    def encode(self, x: Array) -> Array:
        z = 2 * jnp.pi * jnp.matmul(x, self.frequencies[...].astype(x.dtype), precision="highest")
        return jnp.concatenate([sine(z), cosine(z)], axis=-1)

    def activate(self, z: Array, layer: int) -> Array:
        return jax.nn.relu(z)


class _ComplexAffine(nnx.Module):
    """(x_re + i x_im)(K_re + i K_im) + b on [x_re, x_im], as one real product."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, param_dtype: Dtype, axes):
        draw = symmetric_uniform(1 / math.sqrt(inputs))
        self.kernel = nnx.Param(
            draw(rngs.params(), (2, inputs, outputs), param_dtype), **logical_axes(None, *axes)
        )
        self.bias = nnx.Param(
            draw(rngs.params(), (2, outputs), param_dtype), **logical_axes(None, axes[-1])
        )

    def __call__(self, x: Array) -> Array:
        re, im = self.kernel[...].astype(x.dtype)
        block = jnp.block([[re, im], [-im, re]])
        return affine(x, block, self.bias[...].astype(x.dtype).reshape(-1), "highest")


class Wire(CoordinateNetwork):
    """Complex Gabor wavelets exp(i w z - s^2 abs(z)^2); the output is the real part.

    The width is int(hidden / sqrt(2)), so that the count of real parameters equals the others'.

    Args (others as `Gaussian`):
        w: angular frequency of the wavelets.
        scale: s, inverse width of their envelope.

    >>> network = Wire(1, 16, 1, 1, w=1.0, scale=0.0, rngs=nnx.Rngs(0))
    >>> network.activate(jnp.array([0.0, jnp.pi / 2]), layer=0).round(3)  # 1 and i
    Array([ 1., -0.,  0.,  1.], dtype=float32)
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int,
        out_dim: int,
        n_hidden: int,
        *,
        w: float = 10.0,
        scale: float = 10.0,
        rngs: nnx.Rngs,
        param_dtype: Dtype = jnp.float32,
    ):
        sizes = _sizes(in_dim, int(hidden / math.sqrt(2)), out_dim, n_hidden)
        first = Affine(*sizes[:2], rngs=rngs, axes=_axes(0, n_hidden), param_dtype=param_dtype)
        layers: list[Any] = [first]
        layers += [
            _ComplexAffine(m, n, rngs=rngs, param_dtype=param_dtype, axes=_axes(i, n_hidden))
            for i, (m, n) in enumerate(pairwise(sizes[1:]), start=1)
        ]
        self.layers = nnx.List(layers)
        self.w = Constant(jnp.float32(w))
        self.scale = Constant(jnp.float32(scale))

    def activate(self, z: Array, layer: int) -> Array:
        re, im = (z, jnp.zeros_like(z)) if layer == 0 else jnp.split(z, 2, axis=-1)
        w, s = self.w[...].astype(z.dtype), self.scale[...].astype(z.dtype)
        envelope = jnp.exp(-w * im - jnp.square(s) * (jnp.square(re) + jnp.square(im)))
        return jnp.concatenate([envelope * cosine(w * re), envelope * sine(w * re)], axis=-1)

    def decode(self, y: Array) -> Array:
        return jnp.split(y, 2, axis=-1)[0]
