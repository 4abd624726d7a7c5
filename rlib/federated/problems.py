"""Learning problems whose examples can be dealt to clients."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key
from numpy.typing import ArrayLike

from rlib import data, nn
from rlib.federated.clients import Losses

Tree = Any


class Classification(NamedTuple):
    """Labelled images and a network for them, as pure functions.

    Fields:
        train, test: {"x": f32[examples, ...], "y": i32[examples]}.
        init: key -> parameters.
        loss: cross-entropy of each example, in nats; for `make_rounds`.
        accuracy: (parameters, examples) -> the share that is right.
    """

    train: dict[str, Any]
    test: dict[str, Any]
    init: Callable[[Key[Array, ""]], Tree]
    loss: Losses
    accuracy: Callable[[Tree, Tree], Float[Array, ""]]


def classification(
    dataset: str,
    network: Callable[[nnx.Rngs], nnx.Module],
    *,
    flat: bool = False,
    shift: float = 0.0,
) -> Classification:
    """A data set by name and a network that gives logits.

    Args:
        dataset: as `data.images`, which scales pixels to [0, 1].
        network: makes it from random keys; (batch, height, width, channels) -> (batch, classes).
        flat: the network takes (batch, pixels).
        shift: subtracted from the pixels.

    Raises:
        DataUnavailable, ValueError: as `data.images`.

    >>> from rlib import data, federated, nn
    >>> make = lambda rngs: nn.Perceptron((64, 32, 10), rngs=rngs)
    >>> digits = classification("digits", make, flat=True)
    >>> parts = data.partition_dirichlet(digits.train["y"], 20, 0.5, size=64)
    >>> held = federated.client_data(digits.train, parts)
    >>> work = federated.LocalWork(batch_size=16, steps=10)
    >>> def end(rate, key):
    ...     algorithm = federated.fedavg(optax.sgd(rate))
    ...     rounds = federated.make_rounds(algorithm, digits.loss, work, clients=20, sampled=5)
    ...     done = federated.simulate(rounds, digits.init(key), held, 60, key=key)
    ...     return digits.accuracy(done.state.params, digits.test)
    >>> bool(jax.jit(end)(0.3, jax.random.key(0)) > 0.8)  # another rate: no other program
    True
    """

    def make(key: Array) -> Any:
        return nnx.split(network(nnx.Rngs(key)), nnx.Param, ...)

    graphdef, _, rest = make(jax.random.key(0))

    def examples(split: str) -> dict[str, Any]:
        x, y = data.images(dataset, split)
        return {"x": (x.reshape(len(x), -1) if flat else x) - np.float32(shift), "y": y}

    def logits(params: Tree, x: Array) -> Array:
        return nnx.merge(graphdef, params, rest)(x)

    def loss(params: Tree, batch: Tree, key: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, batch["x"]), batch["y"]
        )

    def accuracy(params: Tree, given: Tree) -> Array:
        right = lambda one: jnp.argmax(logits(params, one["x"][None])[0]) == one["y"]
        size = min(1000, len(given["y"]))  # at once, so that a large test set fits in memory
        return jnp.mean(jax.lax.map(right, given, batch_size=size))

    return Classification(
        train=examples("train"),
        test=examples("test"),
        init=lambda key: make(key)[1],
        loss=loss,
        accuracy=accuracy,
    )


def image_classification(
    dataset: str,
    *,
    hidden: Sequence[int] = (),
    widths: Sequence[int] = (),
    blocks: int = 1,
    groups: int = 8,
    shift: float = 0.0,
) -> Classification:
    """`classification` by a perceptron, or by a residual network where its widths are given.

    Args:
        dataset, shift: as `classification`.
        hidden: units of the perceptron's hidden layers.
        widths, blocks, groups: as `nn.ResNet`.

    Raises:
        DataUnavailable, ValueError: as `data.images`.

    >>> inputs = lambda **sizes: image_classification("digits", **sizes).test["x"].shape[1:]
    >>> inputs(hidden=(32,)), inputs(widths=(8, 16))
    ((64,), (8, 8, 1))
    """
    pixels, labels = data.images(dataset, "train")
    classes = int(labels.max()) + 1
    sizes = (pixels[0].size, *hidden, classes)

    def network(rngs: nnx.Rngs) -> nnx.Module:
        if not widths:
            return nn.Perceptron(sizes, rngs=rngs)
        return nn.ResNet(
            classes,
            in_channels=pixels.shape[-1],
            widths=widths,
            blocks=blocks,
            groups=groups,
            rngs=rngs,
        )

    return classification(dataset, network, flat=not widths, shift=shift)


def rounds_to(values: ArrayLike, target: float, every: int = 1) -> np.ndarray:
    """The first round, from 1, at which values reach a target; one more than all for none.

    Args:
        values: (..., looks), for example accuracies.
        every: rounds between two looks.

    >>> rounds_to([[0.5, 0.9, 0.8], [0.5, 0.6, 0.7]], 0.8, every=10)
    array([20, 31])
    """
    reached = np.asarray(values) >= target
    first = (reached.argmax(axis=-1) + 1) * every
    return np.where(reached.any(axis=-1), first, reached.shape[-1] * every + 1)
