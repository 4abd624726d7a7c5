"""CS-IB: the information bottleneck for regression from the Cauchy-Schwarz divergence.

Yu, Yu, Lokse, Jenssen and Principe, "Cauchy-Schwarz Divergence Information Bottleneck for
Regression", arXiv 2404.17951. With t = encoder(x) and yhat = decoder(t), on one batch,

    loss = D_CS( p(y given x) ; q(yhat given x) ) + beta I_CS(x; t)

Both terms are ratios of sums over kernel matrices (`rlib.information.kernels`): no decoder
distribution, hence no squared error, and no bound on the mutual information.

Deviations

| | paper | official code | here |
|---|---|---|---|
| prediction term | D_CS | sum of squared errors / ln 2, by a bug (below) | D_CS; `variant=` |
| I(x; t) | I_CS | normalised by I_CS(x; x) and I_CS(t; t) | normalised; `normalized=False` |
| denominators of D_CS | not seen | sums of K^2 | those; `denominator=` |
| unit | nats | bits, so that the loss is 1.44 times ours | nats |
| widths | not seen | 1 for x, y and t | 1; any, or "median" for x and t |
| encoder | not seen | its head of deviations is never used | `stochastic=` |
| layer after the encoder | - | one more affine layer, of the means | none |
| standardised by | not seen | all data, test data too | experiments: training data |
| epoch kept | not seen | the best on test data | experiments: the last |
| published PGD | - | 5 steps of 0.05 for a distance of 0.3, never reached | `rlib.nn.pgd`, any |

The bug: the script calls its D_CS with vectors y and yhat of shape (n,), which its kernel takes for
one sample of n features. All kernels within y and within yhat are then 1, and all between them
exp(-sum of squared errors / 2): what the script minimises is the squared error plus beta I_CS.

Rivals, all with the squared error: VIB (Alemi et al., arXiv 1612.00410), NIB (Kolchinsky et al.,
arXiv 1705.02436; its penalty is `rlib.information.kolchinsky_bound`, squared in arXiv 1808.07593,
its exponential in 1911.11000), the HSIC bottleneck as a penalty (Wang et al., arXiv 2106.02734).
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from rlib import nn
from rlib.information import kernels
from rlib.information.gaussian import SD_FLOOR
from rlib.information.kernels import Scalar
from rlib.information.rows import matrices, positive

Width = float | Scalar | Literal["median"]


class Encoded(NamedTuple):
    """What a `CSIBRegressor` returns.

    Fields:
        prediction: yhat, (n, outputs).
        code: t, (n, latent), from which yhat was decoded: the mean, or a sample.
        mean, deviation: of the code's normal distribution, (n, latent); deviation 0 where the
            encoder is deterministic.
    """

    prediction: Float[Array, "n outputs"]
    code: Float[Array, "n latent"]
    mean: Float[Array, "n latent"]
    deviation: Float[Array, "n latent"]


class CSIBRegressor(nnx.Module):
    """Encoder of two hidden layers, decoder of one; ReLU.

    Args:
        inputs, outputs: features of x and y.
        hidden: width of all hidden layers.
        latent: features of the code t.
        stochastic: the encoder returns a normal distribution (VIB and NIB need one).

    >>> make = lambda: CSIBRegressor(3, 1, hidden=8, latent=2, stochastic=True, rngs=nnx.Rngs(0))
    >>> encode = lambda x, key: make()(x, key=key)
    >>> out = jax.eval_shape(encode, jnp.ones((5, 3)), jax.random.key(0))
    >>> out.prediction.shape, out.code.shape
    ((5, 1), (5, 2))
    """

    def __init__(
        self,
        inputs: int,
        outputs: int = 1,
        *,
        hidden: int = 128,
        latent: int = 32,
        stochastic: bool = False,
        rngs: nnx.Rngs,
    ):
        codes = 2 * latent if stochastic else latent
        self.encoder = nn.Perceptron((inputs, hidden, hidden, codes), rngs=rngs)
        self.decoder = nn.Perceptron((latent, hidden, outputs), rngs=rngs)
        self.stochastic = stochastic

    def __call__(
        self, x: Float[Array, "n inputs"], *, key: Key[Array, ""] | None = None
    ) -> Encoded:
        """Predictions; with a key a stochastic encoder samples its code, else it takes the mean."""
        mean = self.encoder(x)
        deviation = jnp.zeros_like(mean)
        if self.stochastic:
            mean, raw = jnp.split(mean, 2, axis=-1)
            # Never 0: the penalties hold its logarithm.
            deviation = jax.nn.softplus(raw) + 1e-3
        code = mean
        if self.stochastic and key is not None:
            code = mean + deviation * jax.random.normal(key, mean.shape, mean.dtype)
        return Encoded(self.decoder(code), code, mean, deviation)


class CSIBTerms(NamedTuple):
    """The two terms of `cs_ib_loss`: `prediction` and `compression`, which beta multiplies."""

    prediction: Scalar
    compression: Scalar


def cs_ib_loss(
    x: Float[Array, "n d"],
    y: Float[Array, "n c"],
    yhat: Float[Array, "n c"],
    t: Float[Array, "n k"],
    beta: float | Scalar,
    *,
    sigma_x: Width = 1.0,
    sigma_y: float | Scalar = 1.0,
    sigma_t: Width = 1.0,
    variant: Literal["paper", "official"] = "paper",
    normalized: bool = True,
    denominator: kernels.Denominator = "sum_of_squares",
    block: int | None = 256,
    axis_name: str | None = None,
) -> tuple[Scalar, CSIBTerms]:
    """The objective of one batch (arXiv 2404.17951): loss, and its terms without beta.

    The gradient of the prediction term vanishes where abs(y - yhat) is far beyond sigma_y:
    standardise y. It depends on n: drop a last, shorter batch. NaN or infinite values among traced
    inputs give NaN (`rlib.optim` can skip such steps), others raise; finite ones never give NaN,
    within the range that `rlib.information.kernels` states.

    Args:
        x, y: inputs and targets; y as columns, (n, 1) for numbers.
        yhat, t: predictions and codes.
        beta: weight of the compression, >= 0. It may be traced; a plain 0 computes no I_CS.
        sigma_x, sigma_y, sigma_t: kernel widths; "median": `kernels.median_distance` of this batch,
            its gradient stopped. A width far below x's distances, as 1 is among ten standardised
            features, compares every y with its own yhat alone; a large one smooths over x.
        variant: "official" has the published script's prediction term, the sum of squared errors /
            (sigma_y^2 ln 2), for one target (c = 1).
        normalized: of `kernels.cs_mutual_information`.
        denominator, block, axis_name: see `rlib.information.kernels`.

    Raises:
        ValueError: another variant, a beta below 0 or not finite, or as `rlib.information.kernels`.

    >>> x = jnp.array([[0.0], [1.0]])
    >>> loss, terms = cs_ib_loss(x, x, x[::-1], x, 0.5)
    >>> round(float(terms.prediction), 4), round(float(terms.compression), 4)
    (0.2402, 1.0)
    """
    if variant not in ("paper", "official"):
        raise ValueError(f'cs_ib_loss: variant={variant!r}: choose "paper" or "official"')
    penalised = isinstance(beta, jax.core.Tracer) or float(beta) != 0
    if not isinstance(beta, jax.core.Tracer) and not 0 <= float(beta) < math.inf:
        raise ValueError(f"cs_ib_loss: beta={beta}: finite and at least 0")
    width_x = _width("sigma_x", sigma_x, x, axis_name)
    if variant == "official":
        prediction = _official_prediction(y, yhat, sigma_y, axis_name)
    else:
        prediction = kernels.conditional_cs_divergence(
            x, y, yhat, width_x, sigma_y, denominator=denominator, block=block, axis_name=axis_name
        )
    if not penalised:
        return prediction, CSIBTerms(prediction, jnp.zeros_like(prediction))
    width_t = _width("sigma_t", sigma_t, t, axis_name)
    compression = kernels.cs_mutual_information(
        x, t, width_x, width_t, normalized=normalized, block=block, axis_name=axis_name
    )
    return prediction + beta * compression, CSIBTerms(prediction, compression)


def _width(name: str, sigma: Width, values: Array, axis_name: str | None) -> float | Scalar:
    if not isinstance(sigma, str):
        return sigma
    if sigma != "median":
        raise ValueError(f'{name}={sigma!r}: a number or "median"')
    return kernels.median_distance(values, axis_name=axis_name)


def _official_prediction(y: Array, yhat: Array, sigma_y, axis_name: str | None) -> Scalar:
    """What D_CS in bits becomes where all of y is one sample: -2 log2 of one kernel."""
    positive("cs_ib_loss", sigma_y=sigma_y)
    y, yhat = matrices("cs_ib_loss", y=y, yhat=yhat)
    if y.shape != yhat.shape or y.shape[1] != 1:
        raise ValueError(
            'cs_ib_loss: variant="official" is of one target, y and yhat (n, 1); got shapes '
            f"{y.shape} and {yhat.shape}"
        )
    squares = jnp.sum(jnp.square(y - yhat))
    squares = squares if axis_name is None else jax.lax.psum(squares, axis_name)
    return squares / (jnp.square(sigma_y) * math.log(2))


# The rivals: an error plus beta times a penalty


def squared_error(y: Float[Array, "n c"], yhat: Float[Array, "n c"]) -> Scalar:
    """Mean squared error; the squared unit of y.

    >>> float(squared_error(jnp.array([[1.0], [3.0]]), jnp.array([[2.0], [1.0]])))
    2.5
    """
    _same_shapes("squared_error", y, yhat)
    return jnp.mean(jnp.square(y - yhat))


def huber_error(
    y: Float[Array, "n c"], yhat: Float[Array, "n c"], delta: float | Scalar = 1.0
) -> Scalar:
    """Mean of e^2 / 2 where abs(e) <= delta, else delta (abs(e) - delta / 2); Huber 1964.

    Args:
        y, yhat: targets and predictions.
        delta: in the unit of y, positive.

    >>> float(huber_error(jnp.array([[1.0], [3.0]]), jnp.array([[1.0], [0.0]]), 1.0))
    1.25
    """
    _same_shapes("huber_error", y, yhat)
    positive("huber_error", delta=delta)
    return jnp.mean(optax.losses.huber_loss(yhat, y, delta=delta))


def vib_rate(mean: Float[Array, "n k"], deviation: Float[Array, "n k"]) -> Scalar:
    """Mean KL(N(mean, deviation^2) || N(0, 1)) in nats: VIB's bound on I(x; t).

    Args:
        mean, deviation: of each example's code; deviations are floored at 1e-10.

    >>> float(vib_rate(jnp.array([[2.0]]), jnp.array([[1.0]])))
    2.0
    """
    _same_shapes("vib_rate", mean, deviation)
    deviation = jnp.maximum(deviation, SD_FLOOR)
    nats = (jnp.square(mean) + jnp.square(deviation) - 1) / 2 - jnp.log(deviation)
    return jnp.mean(jnp.sum(nats, axis=1))


def hsic_penalty(
    x: Float[Array, "n d"],
    y: Float[Array, "n c"],
    t: Float[Array, "n k"],
    *,
    weight_y: float | Scalar = 1.0,
    sigma_x: Width = "median",
    sigma_y: Width = "median",
    sigma_t: Width = "median",
    block: int | None = 256,
    axis_name: str | None = None,
) -> Scalar:
    """HSIC(x, t) - weight_y HSIC(y, t), both normalised (arXiv 2106.02734).

    Args:
        x, y, t: inputs, targets and codes.
        weight_y: of what the code shall keep.
        sigma_x, sigma_y, sigma_t: kernel widths, as in `cs_ib_loss`.

    >>> x = jnp.array([[0.0], [1.0], [3.0]])
    >>> round(float(hsic_penalty(x, x, x, weight_y=0.25)), 4)
    0.75
    """
    widths = [
        _width(name, sigma, values, axis_name)
        for name, sigma, values in (
            ("sigma_x", sigma_x, x),
            ("sigma_y", sigma_y, y),
            ("sigma_t", sigma_t, t),
        )
    ]
    shared = {"normalized": True, "block": block, "axis_name": axis_name}
    of_x = kernels.hsic(x, t, widths[0], widths[2], **shared)  # type: ignore[arg-type]
    of_y = kernels.hsic(y, t, widths[1], widths[2], **shared)  # type: ignore[arg-type]
    return of_x - weight_y * of_y


def _same_shapes(who: str, a: Array, b: Array) -> None:
    if jnp.shape(a) != jnp.shape(b) or jnp.ndim(a) != 2 or jnp.size(a) == 0:
        raise ValueError(
            f"{who}: two matrices of one shape, not empty; got {jnp.shape(a)} and {jnp.shape(b)} "
            "(with (n,) and (n, 1) all pairs would be compared)"
        )
