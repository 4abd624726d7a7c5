"""Information between images, layers and labels, estimated on short codes of them. In nats.

Butakov, Tolmachev, Malanchuk, Neopryatnaya, Frolov and Andreev, "Information Bottleneck Analysis
of Deep Neural Networks via Lossy Compression", arXiv 2305.08013. Estimators of mutual information
fail in hundreds of dimensions, and a deterministic network's I(X; L) is no number at all. So:

    L_k = f_k(L_{k-1} (1 + sigma eps))            noise at the input of every layer, always on
    E(X), E(L)                                    a few coordinates, by an autoencoder or PCA
    I(X; L) ~ h(E(X)) + h(E(L)) - h(E(X), E(L))   `rlib.information.mutual_information`
    I(L; Y) ~ h(E(L)) - sum_y p(y) h(E(L) | y)

Codes never hold more than what they are made of, I(E(X); E(L)) <= I(X; L); how much less is
unbounded, unless noise covers what they drop (`channel_information`). Pictures of known
information (`gaussian_pair`, `render_bumps`, `render_rectangles`) measure the error.

Deviations

| | paper | official code | here |
|---|---|---|---|
| entropy | weighted, k = 5 | the same; from d = 17 on they sum to 0.96 | "wkl", (1, 0, ..) then |
| its weights | up to 33 in d = 8 | the same | default "kl", without; "ksg" |
| codes | as they are | the same | as they are, or by ranks (`gaussianise`) |
| noise | multiplicative, 1e-3 | the same | the same, or additive |
| samples that coincide | not mentioned | -inf | ranks or `jitter`; without, an error |
| codes of layers | 4, by PCA at each epoch or learnt | the latter is broken | both, at most 4 |
| null directions | not mentioned | singular | left out |
| autoencoder's loss | L1 | L1, its log averaged with a wrong weight | L1 |
| curves | smoothed | Savitzky-Golay, then Butterworth | raw |
"""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from rlib import nn, optim
from rlib.information.neighbours import InformationEstimator, gaussianise, mutual_information
from rlib.training import descend

_leaky_relu = functools.partial(jax.nn.leaky_relu, negative_slope=0.01)

# Pairs of known information


def component_correlation(mi: float | Array, pairs: int) -> Float[Array, ""]:
    """The correlation in each of `pairs` Gaussian pairs that hold `mi` nats together.

    Raises:
        ValueError: no pairs, or, outside of jit, less than 0 nats (NaN inside).

    >>> round(float(component_correlation(2.0, 2)), 5)
    0.92987
    """
    if pairs < 1 or (not isinstance(mi, jax.core.Tracer) and np.any(np.asarray(mi) < 0)):
        raise ValueError(f"{mi} nats in {pairs} pairs: at least 0 in at least 1 is needed")
    return jnp.sqrt(-jnp.expm1(-2 * jnp.asarray(mi) / pairs))


def gaussian_pair(
    key: jax.Array, mi: float | Array, dx: int, dy: int, n: int, *, rotate: bool = True
) -> tuple[Float[Array, "n dx"], Float[Array, "n dy"]]:
    """n samples of standard normal X and Y with I(X; Y) = `mi` nats.

    The information is split equally over min(dx, dy) pairs of components; then X and Y are turned
    by random rotations of their own, or left as they are: then equal components belong together,
    and stay nearly proportional under what is done to each component alike.

    >>> x, y = gaussian_pair(jax.random.key(0), 1.0, 3, 2, 100)
    >>> x.shape, y.shape
    ((100, 3), (100, 2))
    """
    m = min(dx, dy)
    keys = jax.random.split(key, 4)
    x, y = jax.random.normal(keys[0], (n, dx)), jax.random.normal(keys[1], (n, dy))
    # y = rho x + sqrt(1 - rho^2) noise, with the root from mi: 1 - rho^2 would lose its digits.
    rho, rest = component_correlation(mi, m), jnp.exp(-jnp.asarray(mi) / m)
    y = y.at[:, :m].set(rho * x[:, :m] + rest * y[:, :m])
    if not rotate:
        return x, y
    turn = lambda key, d: jnp.linalg.qr(jax.random.normal(key, (d, d)))[0]
    dot = functools.partial(jnp.matmul, precision="highest")
    return dot(x, turn(keys[2], dx)), dot(y, turn(keys[3], dy))


def channel_information(
    eigenvalues: Float[Array, " d"], noise: float, kept: int | None = None
) -> Float[Array, ""]:
    """I(X; X + Z) of a Gaussian X and Z ~ N(0, noise I), or of the `kept` largest directions.

    1/2 sum log(1 + lambda / noise): directions narrower than the noise cost little to drop, and
    without noise each holds infinitely much.

    Args:
        eigenvalues: of the covariance of X.
        noise: variance of the noise.

    Raises:
        ValueError: a variance of the noise that is not above 0.

    >>> [round(float(channel_information(jnp.array([4, 1, 0.25]), 0.1, n)), 4) for n in (3, 2)]
    [3.6821, 3.0557]
    """
    if noise <= 0:
        raise ValueError(f"noise={noise}: a variance above 0 is needed")
    largest = jnp.sort(jnp.asarray(eigenvalues, jnp.float32))[::-1][:kept]
    return 0.5 * jnp.sum(jnp.log1p(largest / noise))


def render_bumps(centres: Float[Array, "n 2"], size: int) -> Float[Array, "n size size"]:
    """Pictures exp(-10 |g - c|^2) on a grid g of [0, 1]^2, its ends included; c in [0, 1]^2.

    >>> int(jnp.argmax(render_bumps(jnp.array([[0.0, 1.0]]), 8)))  # first row, last column
    7
    """
    grid = jnp.linspace(0, 1, size)
    along = jnp.exp(-10 * jnp.square(grid - centres[..., None]))
    return along[:, 0, :, None] * along[:, 1, None, :]


def render_rectangles(
    parameters: Float[Array, "n 4"], size: int, smallest: float = 2 / 32
) -> Float[Array, "n size size"]:
    """Pictures of filled rectangles; a pixel is the share of it that is covered.

    Args:
        parameters: (u1, u2) for rows and (u3, u4) for columns, all in [0, 1]: an interval starts
            at (1 - m)(1 - sqrt(1 - u1)) and is m + u2 times the rest long, with m = `smallest`.

    >>> render_rectangles(jnp.array([[0.0, 1.0, 0.0, 0.0]]), 4, smallest=0.25)[0]
    Array([[1., 0., 0., 0.],
           [1., 0., 0., 0.],
           [1., 0., 0., 0.],
           [1., 0., 0., 0.]], dtype=float32)
    """
    edge = jnp.linspace(0, 1, size + 1)

    def covered(u: Array, v: Array) -> Array:
        left = ((1 - smallest) * (1 - jnp.sqrt(1 - u)))[:, None]
        right = left + smallest + v[:, None] * (1 - left - smallest)
        return size * jnp.clip(jnp.minimum(right, edge[1:]) - jnp.maximum(left, edge[:-1]), 0)

    u1, u2, u3, u4 = parameters.T
    return covered(u1, u2)[:, :, None] * covered(u3, u4)[:, None, :]


# Codes


class Projection(NamedTuple):
    """The first principal axes of a sample.

    Fields:
        mean: of the sample.
        axes: orthonormal columns, the widest first.
    """

    mean: Float[Array, " p"]
    axes: Float[Array, "p dim"]

    def __call__(self, x: Float[Array, "n p"]) -> Float[Array, "n dim"]:
        """The coordinates of samples."""
        return jnp.matmul(x - self.mean, self.axes, precision="highest")


def principal_axes(x: Float[Array, "n p"], dim: int) -> Projection:
    """The `dim` directions in which a sample varies most.

    Raises:
        ValueError: more axes than coordinates.

    >>> project = principal_axes(jnp.array([[0.0, 5.0], [0.1, -5.0], [-0.1, 0.0]]), 1)
    >>> [round(abs(float(a))) for a in project.axes[:, 0]]
    [0, 1]
    """
    if not 1 <= dim <= x.shape[1]:
        raise ValueError(f"dim={dim}: samples of {x.shape[1]} coordinates have as many axes")
    mean = jnp.mean(x, axis=0)
    _, vectors = jnp.linalg.eigh(jnp.matmul((x - mean).T, x - mean, precision="highest"))
    return Projection(mean, vectors[:, ::-1][:, :dim])


def add_noise(key: jax.Array, x: Array, sigma: float, *, relative: bool = True) -> Array:
    """x (1 + sigma eps), or x + sigma eps, with eps ~ N(0, 1) for each number.

    Relative noise leaves zeros as they are.

    >>> add_noise(jax.random.key(0), jnp.zeros(3), 0.5)
    Array([0., 0., 0.], dtype=float32)
    """
    eps = jax.random.normal(key, x.shape, x.dtype)
    return x * (1 + sigma * eps) if relative else x + sigma * eps


class Autoencoder(nnx.Module):
    """Images to short codes in (0, 1) and back.

    Convolutions 3x3, each halved by a maximum over 2x2, then affine layers; mirrored to decode.

    Args:
        shape: of an image, (height, width, channels).
        dim: length of the code.
        channels: of the convolutions; none for affine layers alone.
        widths: of the affine layers between.

    Raises:
        ValueError: images that cannot be halved that often.

    >>> encode = lambda x: Autoencoder((8, 8, 1), 2, channels=(4,), rngs=nnx.Rngs(0)).encode(x)
    >>> jax.eval_shape(encode, jnp.zeros((5, 8, 8, 1))).shape
    (5, 2)
    """

    def __init__(
        self,
        shape: Sequence[int],
        dim: int,
        *,
        channels: Sequence[int] = (),
        widths: Sequence[int] = (128,),
        rngs: nnx.Rngs,
    ):
        height, width, colours = shape
        every = (colours, *channels)
        self.sizes = [(height >> i, width >> i) for i in range(len(every))]
        self.inner = (*self.sizes[-1], every[-1])
        flat = int(np.prod(self.inner))
        if flat == 0:
            raise ValueError(f"images of {height}x{width} cannot be halved {len(channels)} times")
        conv = lambda m, n: nn.Conv(m, n, use_bias=True, rngs=rngs)
        self.inward = nnx.List(conv(m, n) for m, n in pairwise(every))
        self.squeeze = nn.Perceptron((flat, *widths, dim), activation=_leaky_relu, rngs=rngs)
        widths = tuple(reversed(widths))
        self.expand = nn.Perceptron((dim, *widths, flat), activation=_leaky_relu, rngs=rngs)
        self.outward = nnx.List(conv(m, n) for m, n in pairwise(reversed(every)))

    def encode(self, images: Float[Array, "n h w c"]) -> Float[Array, "n dim"]:
        """Codes in (0, 1)."""
        for conv in self.inward:
            images = _leaky_relu(nn.max_pool(conv(images)))
        return jax.nn.sigmoid(self.squeeze(images.reshape(len(images), -1)))

    def decode(self, codes: Float[Array, "n dim"]) -> Float[Array, "n h w c"]:
        images = self.expand(codes).reshape(len(codes), *self.inner)
        for conv, size in zip(self.outward, reversed(self.sizes[:-1]), strict=True):
            images = _leaky_relu(images)
            shape = (len(images), *size, images.shape[-1])
            images = conv(jax.image.resize(images, shape, "nearest"))
        return images


def fit_autoencoder(
    key: jax.Array,
    images: Float[Array, "n h w c"],
    dim: int,
    *,
    channels: Sequence[int] = (),
    widths: Sequence[int] = (128,),
    noise: float = 0.1,
    steps: int = 1000,
    batch: int = 256,
    learning_rate: float = 1e-3,
) -> tuple[Callable[[Array], Array], Float[Array, ""]]:
    """Train an `Autoencoder` by Adam on the mean absolute error.

    Args:
        dim, channels, widths: as `Autoencoder`.
        noise: relative noise on the code while training, which keeps codes apart.
        batch: images of a step, drawn with replacement.

    Returns:
        The encoder, images -> codes, and the mean absolute error over the images.

    Raises:
        ValueError: as `Autoencoder`.

    >>> fit = lambda key, images: fit_autoencoder(key, images, 2, widths=(8,), steps=3)[1]
    >>> jax.eval_shape(fit, jax.random.key(0), jnp.zeros((20, 4, 4, 1))).shape
    ()
    """
    first, second, last = jax.random.split(key, 3)
    shape, rngs = images.shape[1:], nnx.Rngs(first)
    model = Autoencoder(shape, dim, channels=channels, widths=widths, rngs=rngs)
    graphdef, params = nnx.split(model)

    def error(params, key, images):
        coder = nnx.merge(graphdef, params)
        return jnp.mean(jnp.abs(coder.decode(add_noise(key, coder.encode(images), noise)) - images))

    def loss(params, key, _):
        rows, key = jax.random.split(key)
        rows = jax.random.randint(rows, (min(batch, len(images)),), 0, len(images))
        return error(params, key, images[rows]), None

    keys = jax.random.split(second, steps)
    params = descend(loss, params, optim.skip_nonfinite(optax.adam(learning_rate)), keys).params
    return nnx.merge(graphdef, params).encode, error(params, last, images)


# Networks and their layers


class NoisyClassifier(nnx.Module):
    """A classifier with noise at the input of every layer, in use as well as in training.

    Convolutions 3x3 without padding, each halved by a maximum over 2x2, then affine layers; leaky
    ReLU (0.01).

    Args:
        shape: of an image, (height, width, channels).
        classes: outputs.
        channels: of the convolutions; none for affine layers alone.
        widths: of the affine layers between.
        sigma: standard deviation of the noise, relative to each number or absolute.
        relative: multiply by 1 + noise, or add it.
        dropout: rate before each convolution, if asked for.

    Raises:
        ValueError: images too small for the convolutions.

    >>> make = lambda: NoisyClassifier((8, 8, 1), 10, widths=(6,), rngs=nnx.Rngs(0))
    >>> layers = lambda images, key: make()(images, key)
    >>> [h.shape for h in jax.eval_shape(layers, jnp.zeros((5, 8, 8, 1)), jax.random.key(0))]
    [(5, 6), (5, 10)]
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        channels: Sequence[int] = (),
        widths: Sequence[int] = (),
        sigma: float = 1e-3,
        relative: bool = True,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        height, width, colours = shape
        every = (colours, *channels)
        for _ in channels:
            height, width = (height - 2) // 2, (width - 2) // 2
        if min(height, width) < 1:
            small = f"{shape[0]}x{shape[1]}"
            raise ValueError(f"images of {small} are too small for {len(channels)} convolutions")
        flat = height * width * every[-1]
        conv = lambda m, n: nn.Conv(m, n, use_bias=True, rngs=rngs)
        self.convolutions = nnx.List(conv(m, n) for m, n in pairwise(every))
        sizes = pairwise((flat, *widths, classes))
        self.affine = nnx.List(nn.Affine(m, n, rngs=rngs) for m, n in sizes)
        self.sigma, self.relative, self.dropout = sigma, relative, dropout

    def __call__(
        self, images: Float[Array, "n h w c"], key: jax.Array, *, training: bool = False
    ) -> list[Float[Array, "n ..."]]:
        """The output of every layer; the last are log-probabilities."""
        keys = iter(jax.random.split(key, 2 * len(self.convolutions) + len(self.affine)))
        layers, x = [], images
        for conv in self.convolutions:
            x = add_noise(next(keys), x, self.sigma, relative=self.relative)
            drop = next(keys)
            if training and self.dropout > 0:
                kept = jax.random.bernoulli(drop, 1 - self.dropout, x.shape)
                x = jnp.where(kept, x / (1 - self.dropout), 0)
            x = _leaky_relu(nn.max_pool(conv(x)[:, 1:-1, 1:-1]))
            layers.append(x)
        x = x.reshape(len(x), -1)
        for layer in self.affine:
            x = layer(add_noise(next(keys), x, self.sigma, relative=self.relative))
            x = jax.nn.log_softmax(x) if layer is self.affine[-1] else _leaky_relu(x)
            layers.append(x)
        return layers


def information_path(
    key: jax.Array,
    code: Float[Array, "n d"],
    layers: Sequence[Float[Array, "n ..."]],
    labels: Int[Array, " n"],
    num_classes: int,
    *,
    dim: int = 4,
    estimator: InformationEstimator = "kl",
    ranks: bool = True,
    jitter: float = 1e-6,
) -> tuple[Float[Array, " layers"], Float[Array, " layers"]]:
    """I(X; L) and I(L; Y) in nats of each layer, by its first `dim` principal coordinates.

    One point of each layer's path in the information plane.

    Args:
        key: for the jitter, and for ties of ranks.
        code: E(X), a row an input.
        layers: outputs for the same inputs, made with the noise on.
        labels: from 0 to `num_classes` - 1.
        dim: of a layer's code; fewer where the layer is narrower.
        ranks: make codes' coordinates normal by their ranks first.
        jitter: noise added to a layer's code, in its coordinates' standard deviations: dead units
            make codes coincide, which has no entropy.

    Raises:
        ValueError: as `mutual_information`.

    >>> x = jax.random.normal(jax.random.key(0), (40, 2))
    >>> layers, labels = [x, jnp.maximum(x, 0)], (x[:, 0] > 0).astype(int)
    >>> path = lambda key: information_path(key, x, layers, labels, 2, dim=2)
    >>> [of_layers.shape for of_layers in jax.eval_shape(path, jax.random.key(1))]
    [(2,), (2,)]
    """
    keys = jax.random.split(key, 2 * len(layers) + 1)
    if ranks:
        code = gaussianise(code, key=keys[-1])
    codes = []
    for layer, first, second in zip(layers, keys[::2], keys[1::2], strict=False):
        flat = layer.reshape(len(layer), -1)
        short = principal_axes(flat, min(dim, flat.shape[1]))(flat)
        short += jitter * jnp.std(short, axis=0) * jax.random.normal(first, short.shape)
        short = gaussianise(short, key=second) if ranks else short
        # A direction without width is left out: codes of one length make one program.
        codes.append(jnp.pad(short, ((0, 0), (0, dim - short.shape[1]))))

    def point(short):
        to_input = mutual_information(code, short, estimator=estimator)
        to_label = mutual_information(short, labels, estimator=estimator, num_classes=num_classes)
        return to_input, to_label

    return jax.lax.map(point, jnp.stack(codes))
