"""The information plane of small networks during training, and what estimators make of it.

Shwartz-Ziv and Tishby, "Opening the Black Box of Deep Neural Networks via Information",
arXiv 1703.00810: every layer T of a network is a point (I(X;T), I(T;Y)), and training moves it.
All patterns of 12 bits are inputs, so that the informations are exact for binned outputs. Saxe et
al. ("On the Information Bottleneck Theory of Deep Learning", ICLR 2018) answer that what moves is
saturation seen through the bins; their rectified units and ranges are arguments here.

Training stores weights, nothing else; informations, ranges, gradients and accuracies are computed
from the stored weights, by as many estimators as one likes. A network is one vector (all kernels
and biases, layer by layer), samples are its last axis: batched products of such small matrices
are twice as fast so on a CPU. A sample is one word, its pattern with the label on top. Seeds share
the moves of a shuffle, not the patterns that are moved: see `record_trajectory`.

Deviations

| | paper | official code | here |
|---|---|---|---|
| rule | symmetric on 12 points of the sphere | a stored table | spherical, on an icosahedron |
| network | 12-10-7-5-4-3-2, sigmoid output | the same, softmax | softmax, whose difference is one |
| training | SGD, 85 % of the patterns | Adam 4e-4, batch 512, first 80 % of rows | arguments |
| mini-batches | not said | fixed, never shuffled | shuffled; `shuffle=False` for the code's |
| bins | 30 equal ones in [-1, 1] | 30 edges | 30 bins; `reference="idnns"` for 30 edges |
| unbounded outputs | none | binned in [-1, 1] as well | "fixed", "global" or "local" range |
| gradients | of an epoch | after each update, weights move | at frozen weights |
| repetitions | 50 | 1 by default | an axis |
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt
from scipy.optimize import brentq
from scipy.special import expit, xlogy

from rlib.information.discrete import (
    Reference,
    bin_codes,
    gaussian_entropy,
    information_plane_point,
    kde_entropy_bounds,
    output_range,
)
from rlib.parallel import map_over_mesh

__all__ = [
    "Training",
    "Trajectory",
    "accuracies",
    "bin_ranges",
    "binned",
    "cross_entropy",
    "gradient_phases",
    "gradient_snr",
    "icosahedral_levels",
    "icosahedral_rule",
    "information_trajectory",
    "init_network",
    "layer_outputs",
    "make_step",
    "noisy",
    "output_ranges",
    "patterns",
    "record_trajectory",
    "snapshot_epochs",
    "soft_labels",
    "split_layers",
]

RangePolicy = Literal["fixed", "global", "local"]
#: (outputs (rows, units), labels (rows,), low, high) -> values, such as (I(X;T), I(T;Y)).
Estimator = Callable[[Array, Array, Array, Array], Array]
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "linear": lambda x: x,
}
_OPTIMIZERS = {"adam": optax.adam, "sgd": optax.sgd}


# The rule


def icosahedral_levels() -> Float[np.ndarray, "4096"]:
    """f of all 12-bit patterns: their spectrum on the sphere, blind to rotations.

    Bits sit on the vertices v_i of an icosahedron, and f(x) = sum of (2l+1) x' P_l(C) x over the
    degrees l = 2, 4, 6, with Legendre polynomials P_l and C_ij = v_i . v_j. Pattern k has bit j of
    the number k at vertex j. Rounded: sums in another order would split the 28 levels.

    >>> levels = icosahedral_levels()
    >>> len(np.unique(levels)), float(np.median(levels))
    (28, 266.424)
    """
    golden = (1 + math.sqrt(5)) / 2
    corners = [(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    vertices = np.array([np.roll(corner, shift) for corner in corners for shift in range(3)])
    cosines = vertices @ vertices.T / (1 + golden**2)
    degrees = (2, 4, 6)
    weights = np.zeros(max(degrees) + 1)
    weights[list(degrees)] = [2 * degree + 1 for degree in degrees]
    kernel = np.polynomial.legendre.legval(cosines, weights)
    x = patterns(12).astype(np.float64)
    return np.einsum("ki,ij,kj->k", x, kernel, x).round(6)


def patterns(bits: int) -> Int[np.ndarray, "patterns bits"]:
    """All patterns of `bits` bits, pattern k with bit j of the number k in column j.

    >>> patterns(2).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    return (np.arange(1 << bits)[:, None] >> np.arange(bits)) & 1


def icosahedral_rule() -> tuple[Int[np.ndarray, "4096 12"], Int[np.ndarray, "4096"]]:
    """All 12-bit patterns and their classes: f above its median or not.

    >>> x, y = icosahedral_rule()
    >>> x.shape, int(y.sum())
    ((4096, 12), 1966)
    """
    levels = icosahedral_levels()
    return patterns(12), (levels > np.median(levels)).astype(np.int32)


def soft_labels(
    levels: Float[np.ndarray, " patterns"], information: float = 0.99
) -> Float[np.ndarray, "patterns 2"]:
    """p(y|x) with p(1|x) = sigmoid(gamma (f - theta)), gamma such that I(X;Y) is `information`.

    theta lies midway between the median level and the next one: gamma to infinity gives the classes
    of `icosahedral_rule`. Float64.

    Args:
        information: in bits, above 0 and below the entropy of those classes.

    Raises:
        ValueError: no gamma gives so much information, or all levels are the same.

    >>> soft_labels(icosahedral_levels()).shape
    (4096, 2)
    """
    f = np.asarray(levels, np.float64)
    middle = np.median(f)
    if not (f > middle).any():
        raise ValueError("no level lies above the median: there is one class")
    theta = (middle + f[f > middle].min()) / 2
    scaled = (f - theta) / np.abs(f - theta).min()

    def soft(log_gamma: float) -> np.ndarray:
        one = expit(np.exp(log_gamma) * scaled)
        return np.stack([1 - one, one], axis=1)

    def excess(log_gamma: float) -> float:
        p = soft(log_gamma)
        mean = p.mean(axis=0)
        nats = xlogy(p, p).sum(axis=1).mean() - xlogy(mean, mean).sum()
        return nats / math.log(2) - information

    if not excess(-20.0) < 0 < excess(5.0):
        raise ValueError(f"information={information} bits: no gamma gives I(X;Y) of that size")
    return soft(brentq(excess, -20.0, 5.0))


# The network


@dataclasses.dataclass(frozen=True)
class Training:
    """A network and how it is trained. Inputs are bits, two softmax outputs the classes.

    Fields:
        hidden: widths of the hidden layers.
        bits: inputs; all 2^bits patterns are the population.
        activation: of hidden layers: "tanh", "relu" or "linear".
        optimizer: "adam" or "sgd".
        learning_rate: constant.
        batch: samples a step; the last, incomplete batch of an epoch is left out.
        train_fraction: of the patterns.
        shuffle: draw the split and shuffle each epoch; if not, the first patterns, in fixed order.

    Raises:
        ValueError: a field that is not as described.

    >>> Training().widths, Training().steps_per_epoch
    ((12, 10, 7, 5, 4, 3, 2), 13)
    """

    hidden: tuple[int, ...] = (10, 7, 5, 4, 3)
    bits: int = 12
    activation: str = "tanh"
    optimizer: str = "adam"
    learning_rate: float = 4e-4
    batch: int = 256
    train_fraction: float = 0.85
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name, given, known in (
            ("activation", self.activation, _ACTIVATIONS),
            ("optimizer", self.optimizer, _OPTIMIZERS),
        ):
            if given not in known:
                raise ValueError(f"{name}={given!r}: choose one of {', '.join(known)}")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden={self.hidden}: at least one layer, of at least one unit")
        if not 1 <= self.bits <= 20:
            raise ValueError(f"bits={self.bits}: 1 to 20, for every pattern is enumerated")
        if not 0 < self.train_fraction <= 1 or self.train_size < 1:
            raise ValueError(f"train_fraction={self.train_fraction}: above 0, at most 1")
        if not 1 <= self.batch <= self.train_size:
            raise ValueError(f"batch={self.batch}: 1 to the {self.train_size} training patterns")

    @property
    def widths(self) -> tuple[int, ...]:
        """Of all layers, inputs and outputs included."""
        return (self.bits, *self.hidden, 2)

    @property
    def train_size(self) -> int:
        return int(self.train_fraction * (1 << self.bits))

    @property
    def steps_per_epoch(self) -> int:
        return self.train_size // self.batch


def init_network(key: Key[Array, ""], widths: Sequence[int]) -> Float[Array, " params"]:
    """Kernels from a normal of deviation 1 / sqrt(inputs) cut at two deviations, biases 0.

    >>> init_network(jax.random.key(0), (12, 10, 2)).shape
    (152,)
    """
    deviations = [
        part
        for m, n in pairwise(widths)
        for part in (np.full(n * m, 1 / math.sqrt(m)), np.zeros(n))
    ]
    scale = np.concatenate(deviations).astype(np.float32)
    return jax.random.truncated_normal(key, -2.0, 2.0, scale.shape) * scale


def split_layers(
    params: Float[Array, " params"], widths: Sequence[int]
) -> list[tuple[Float[Array, "outputs inputs"], Float[Array, " outputs"]]]:
    """(kernel, bias) of each layer.

    Raises:
        ValueError: another number of parameters than the widths have.

    >>> [(kernel.shape, bias.shape) for kernel, bias in split_layers(jnp.zeros(6), (1, 1, 2))]
    [((1, 1), (1,)), ((2, 1), (2,))]
    """
    layers, at = [], 0
    for m, n in pairwise(widths):
        layers.append((params[at : at + m * n].reshape(n, m), params[at + m * n : at + m * n + n]))
        at += (m + 1) * n
    if at != params.shape[0]:
        raise ValueError(f"widths {tuple(widths)} have {at} parameters, {params.shape[0]} given")
    return layers


def layer_outputs(
    params: Float[Array, " params"],
    x: Float[Array, "inputs samples"],
    widths: Sequence[int],
    activation: str = "tanh",
) -> list[Float[Array, "units samples"]]:
    """Outputs of the hidden layers, then the logits; samples on the last axis.

    Raises:
        ValueError: another number of parameters than the widths have.

    >>> params = jnp.array([2.0, -1.0, 0.0, 1.0, 0.0, 0.0])  # t = 2 x - 1, logits (0, t)
    >>> t, logits = layer_outputs(params, jnp.array([[0.0, 1.0]]), (1, 1, 2), "linear")
    >>> t.tolist(), logits.tolist()
    ([[-1.0, 1.0]], [[0.0, 0.0], [-1.0, 1.0]])
    """
    outputs = [x]
    layers = split_layers(params, widths)
    for kernel, bias in layers:
        x = jnp.matmul(kernel, outputs[-1], precision="highest") + bias[:, None]
        outputs.append(x if len(outputs) == len(layers) else _ACTIVATIONS[activation](x))
    return outputs[1:]


def _unpack(words: UInt[Array, " n"], bits: int) -> tuple[Array, Array]:
    """Patterns (bits, n) and labels (n,) of words."""
    x = (words >> jnp.arange(bits, dtype=jnp.uint32)[:, None]) & 1
    return x.astype(jnp.float32), (words >> bits) & 1


def cross_entropy(
    training: Training, params: Float[Array, " params"], words: UInt[Array, " n"]
) -> Float[Array, ""]:
    """Mean cross-entropy in nats over samples given as words: pattern, and label << bits.

    >>> training = Training(hidden=(1,), bits=1, batch=1)
    >>> float(cross_entropy(training, jnp.zeros(6), jnp.array([0b00, 0b11], jnp.uint32)))  # log 2
    0.693147...
    """
    x, y = _unpack(words, training.bits)
    logits = layer_outputs(params, x, training.widths, training.activation)[-1]
    # A softplus of the difference is the same, but its gradient takes log1p, half of a step on CPU.
    log_p = jax.nn.log_softmax(logits, axis=0)
    return -jnp.mean(jnp.where(y == 1, log_p[1], log_p[0]))


def make_step(
    training: Training,
) -> tuple[Callable[[Array], Any], Callable[[Any, Array], Any]]:
    """(init, step) of the optimiser: params -> state, and (state, words of a batch) -> state.

    >>> training = Training((1,), bits=1, batch=1, optimizer="sgd", learning_rate=1.0)
    >>> init, step = make_step(training)
    >>> jax.jit(step)(init(jnp.zeros(6)), jnp.array([0b11], jnp.uint32))[0]  # biases of the logits
    Array([ 0. ,  0. ,  0. ,  0. , -0.5,  0.5], dtype=float32)
    """
    optimizer = _OPTIMIZERS[training.optimizer](training.learning_rate)
    gradient = jax.grad(functools.partial(cross_entropy, training))

    def init(params: Array) -> Any:
        return params, optimizer.init(params)

    def step(state: Any, words: Array) -> Any:
        params, inner = state
        updates, inner = optimizer.update(gradient(params, words), inner, params)
        return optax.apply_updates(params, updates), inner

    return init, step


# Trajectories


class Trajectory(NamedTuple):
    """Networks along their training.

    Fields:
        epochs: of the snapshots.
        params: of each seed and snapshot.
        train: the words (pattern, and label << bits) each seed was trained on.
    """

    epochs: Int[np.ndarray, " snapshots"]
    params: Float[np.ndarray, "seeds snapshots params"]
    train: UInt[np.ndarray, "seeds samples"]


def snapshot_epochs(epochs: int, count: int) -> Int[np.ndarray, " snapshots"]:
    """0 and at most `count` - 1 epochs evenly spaced in their logarithm, the last one `epochs`.

    Raises:
        ValueError: `epochs` below 1 or `count` below 2.

    >>> snapshot_epochs(100, 6).tolist()
    [0, 1, 3, 10, 32, 100]
    """
    if epochs < 1 or count < 2:
        raise ValueError(f"epochs={epochs}, count={count}: at least 1 and 2")
    return np.unique(np.append(0, np.geomspace(1, epochs, count - 1).round().astype(int)))


def _moves(key: Key[Array, ""], size: int) -> UInt[Array, " size"]:
    """A random permutation: random bits above the numbers 0 to size - 1, sorted.

    Several times faster than `jax.random.permutation`. Of two numbers that draw the same random
    bits, 20 for a size of 4096, the smaller goes first.
    """
    mask = jnp.uint32((1 << max(1, (size - 1).bit_length())) - 1)
    noise = jax.random.bits(key, (size,), jnp.uint32)
    return jnp.sort((noise & ~mask) | jnp.arange(size, dtype=jnp.uint32)) & mask


@functools.lru_cache(maxsize=16)
def _programs(training: Training, mesh: Mesh | None) -> tuple[Callable, Callable]:
    """(begin, advance) for all seeds: keys, table -> words, state; some epochs from a state."""
    init, step = make_step(training)
    steps, batch, size = training.steps_per_epoch, training.batch, training.train_size

    def begin(key_data: Array, table: Array) -> tuple[Array, Any]:
        weights, split = jax.random.split(jax.random.wrap_key_data(key_data))
        words = table[_moves(split, table.shape[0])] if training.shuffle else table
        return words[:size], init(init_network(weights, training.widths))

    def advance(words: Array, state: Any, key_data: Array, first: Array, count: Array) -> Any:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), 1)

        def epoch(number: Array, state: Any) -> Any:
            order = words
            if training.shuffle:
                order = words[_moves(jax.random.fold_in(key, number), size)]
            batches = order[: steps * batch].reshape(steps, batch)
            return lax.scan(lambda s, b: (step(s, b), None), state, batches)[0]

        return lax.fori_loop(first, first + count, epoch, state)

    return (
        map_over_mesh(jax.vmap(begin, in_axes=(0, None)), mesh, shared=1),
        map_over_mesh(jax.vmap(advance, in_axes=(0, 0, None, None, None)), mesh, shared=3),
    )


def _checked(labels: Int[np.ndarray, " patterns"], n: int) -> UInt[np.ndarray, " patterns"]:
    given = np.asarray(labels)
    if given.shape != (n,) or not np.isin(given, (0, 1)).all():
        raise ValueError(f"labels: 0 or 1 for each of the {n} patterns; got shape {given.shape}")
    return given.astype(np.uint32)


def record_trajectory(
    training: Training,
    labels: Int[np.ndarray, " patterns"],
    epochs: Sequence[int] | np.ndarray,
    keys: Key[Array, " seeds"],
    *,
    mesh: Mesh | None = None,
    chunk: int = 50,
    on_chunk: Callable[[int], None] | None = None,
) -> Trajectory:
    """Train one network a key, all at once, and store their weights at some epochs.

    A seed lays its training patterns out in a random order of its own; each epoch then draws one
    permutation of places for all seeds, by the first key. So every seed sees a uniform order in
    every epoch, independent of its other epochs, and within an epoch seeds are independent. One
    sort serves all; one for each of 50 seeds took two thirds of the time of their training.

    Args:
        labels: 0 or 1 of every pattern, of `icosahedral_rule` or one's own rule.
        epochs: when to store, in ascending order, for example of `snapshot_epochs`.
        keys: one a seed: of its weights, split and order; the first also of the shuffles.
        mesh: seeds are split over its data axis.
        chunk: epochs a device call.
        on_chunk: called with the number of epochs done after each call; may raise to stop.

    Raises:
        ValueError: labels or epochs are not as described, or some weights are no longer finite.

    >>> training = Training(hidden=(3,), bits=4, batch=4)
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> record_trajectory(training, np.arange(16) % 2, [0, 2], keys).params.shape
    (2, 2, 23)
    """
    n = 1 << training.bits
    table = np.arange(n, dtype=np.uint32) | (_checked(labels, n) << training.bits)
    at = np.asarray(epochs)
    if at.ndim != 1 or at.size == 0 or at[0] < 0 or (np.diff(at) <= 0).any():
        raise ValueError(f"epochs={at.tolist()}: at least one, from 0, ascending")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: at least 1")
    begin, advance = _programs(training, mesh)
    key_data = np.asarray(jax.random.key_data(keys))
    if len(keys) == 0:
        raise ValueError("keys: at least one")
    words, state = begin(key_data, table)
    done, stored = 0, []
    for target in at.tolist():
        while done < target:
            count = min(chunk, target - done)
            state = advance(words, state, key_data[0], done, count)
            done += count
            if on_chunk is not None:
                on_chunk(done)
        stored.append(state[0])
    params = np.stack(stored, axis=1)
    if not np.isfinite(params).all():
        raise ValueError(
            f"the weights are not finite: lower learning_rate={training.learning_rate}"
        )
    return Trajectory(at, params, words)


def _by_snapshot(
    training: Training, function: Callable, mesh: Mesh | None, shared: int = 0
) -> Callable[..., np.ndarray]:
    """Program of function(outputs of all layers (rows, units), others) for seeds and snapshots.

    It takes the weights, then the others, with axes (seeds, snapshots); the last `shared` ones
    are the same for all. Outputs are of all patterns, the last ones softmax.
    """
    return _of_network(training.widths, training.activation, function, mesh, shared)


# However it was trained: compiling takes longer than most calls.
@functools.lru_cache(maxsize=64)
def _of_network(
    widths: tuple[int, ...], activation: str, function: Callable, mesh: Mesh | None, shared: int
) -> Callable[..., np.ndarray]:
    x = patterns(widths[0]).T.astype(np.float32)

    def of_seed(*args: Any) -> Array:
        own, same = args[: len(args) - shared], args[len(args) - shared :]

        def one(params: Array, *others: Any) -> Array:
            *outputs, logits = layer_outputs(params, jnp.asarray(x), widths, activation)
            outputs.append(jax.nn.softmax(logits, axis=0))
            return function([t.T for t in outputs], *others, *same)

        return lax.map(lambda at: one(*at), own)

    def of_seeds(*args: Any) -> Array:
        axes = (0,) * (len(args) - shared) + (None,) * shared
        return jax.vmap(of_seed, in_axes=axes)(*args)

    return map_over_mesh(of_seeds, mesh, shared)


def _ranges(outputs: list[Array]) -> Array:
    return jnp.stack([output_range(t) for t in outputs])


@functools.lru_cache(maxsize=64)
def _points(estimator: Estimator) -> Callable:
    def points(outputs: list[Array], bounds: Array, labels: Array) -> Array:
        pairs = zip(outputs, bounds, strict=True)
        return jnp.stack([estimator(t, labels, low, high) for t, (low, high) in pairs])

    return points


def _hits(outputs: list[Array], seen: Array, labels: Array) -> Array:
    right = (jnp.argmax(outputs[-1], axis=1) == labels).astype(jnp.float32)
    masks = jnp.stack([seen, 1 - seen])
    return masks @ right / jnp.sum(masks, axis=1)


def output_ranges(
    training: Training, params: np.ndarray, *, mesh: Mesh | None = None
) -> Float[np.ndarray, "seeds snapshots layers 2"]:
    """(smallest, largest) output of each layer over all patterns.

    >>> training = Training((1,), bits=1, activation="linear", batch=1)
    >>> params = np.array([[[2.0, -1.0, 0.0, 1.0, 0.0, 0.0]]], np.float32)  # t = 2 x - 1
    >>> output_ranges(training, params)[0, 0, 0].tolist()
    [-1.0, 1.0]
    """
    return _by_snapshot(training, _ranges, mesh)(params)


def bin_ranges(
    ranges: Float[np.ndarray, "seeds snapshots layers 2"], policy: RangePolicy
) -> Float[np.ndarray, "seeds snapshots layers 2"]:
    """What bins cover, by policy; the last layer is softmax and always binned in [0, 1].

    Args:
        ranges: of `output_ranges`.
        policy: "fixed" is [-1, 1]; "global" the range of a layer over its whole training, "local"
            at each snapshot. Each gives another picture; `binned` takes what is returned here.

    Raises:
        ValueError: another policy.

    >>> bin_ranges(np.array([[[[0, 2], [0, 1]], [[0, 6], [0, 1]]]]), "global")[0, :, 0].tolist()
    [[0.0, 6.0], [0.0, 6.0]]
    """
    made = np.array(ranges, np.float32)
    match policy:
        case "fixed":
            made[...] = (-1.0, 1.0)
        case "global":
            made[..., 0] = made[..., 0].min(axis=1, keepdims=True)
            made[..., 1] = made[..., 1].max(axis=1, keepdims=True)
        case "local":
            pass
        case _:
            raise ValueError(f'policy={policy!r}: choose "fixed", "global" or "local"')
    made[..., -1, :] = (0.0, 1.0)
    return made


@functools.cache
def binned(num_bins: int = 30, reference: Reference | None = None) -> Estimator:
    """The estimator of `information_trajectory` that bins each unit; arguments as `bin_codes`.

    >>> outputs, labels = jnp.array([[-0.5], [0.5]]), jnp.array([0, 1])
    >>> jax.jit(binned(num_bins=2))(outputs, labels, -1.0, 1.0)
    Array([1., 1.], dtype=float32)
    """

    def estimate(outputs: Array, labels: Array, low: Array, high: Array) -> Array:
        return information_plane_point(
            bin_codes(outputs, num_bins, low, high, reference=reference), labels
        )

    return estimate


@functools.cache
def noisy(noise_var: float) -> Estimator:
    """The estimator that adds Gaussian noise: (lower, upper) bound on I(X; T + noise) in bits.

    Args:
        noise_var: of each unit, as `kde_entropy_bounds`; the range is not used.

    >>> outputs, labels = jnp.array([[-0.5], [0.5]]), jnp.array([0, 1])
    >>> noisy(0.001)(outputs, labels, -1.0, 1.0).round(3)
    Array([1., 1.], dtype=float32)
    """

    def estimate(outputs: Array, labels: Array, low: Array, high: Array) -> Array:
        nats = kde_entropy_bounds(outputs, noise_var)
        return (nats - gaussian_entropy(outputs.shape[1], noise_var)) / math.log(2)

    return estimate


def information_trajectory(
    training: Training,
    labels: Int[np.ndarray, " patterns"],
    params: Float[np.ndarray, "seeds snapshots params"],
    ranges: Float[np.ndarray, "seeds snapshots layers 2"],
    estimator: Estimator | None = None,
    *,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "seeds snapshots layers 2"]:
    """(I(X;T), I(T;Y)) of every hidden layer and the softmax output, over all patterns.

    Args:
        params: of a `Trajectory`.
        ranges: what an estimator that bins covers, of `bin_ranges`.
        estimator: `binned()` by default, in bits; `noisy` gives bounds on I(X; T + noise) instead.

    Raises:
        ValueError: labels that are not 0 or 1 for each pattern.

    >>> training = Training((1,), bits=1, activation="linear", batch=1)
    >>> params = np.array([[[2.0, -1.0, 0.0, 1.0, 0.0, 0.0]]], np.float32)  # t = 2 x - 1
    >>> ranges = bin_ranges(output_ranges(training, params), "fixed")
    >>> information_trajectory(training, np.array([0, 1]), params, ranges)[0, 0, 0].tolist()
    [1.0, 1.0]
    """
    known = _checked(labels, 1 << training.bits).astype(np.int32)
    program = _by_snapshot(training, _points(estimator or binned()), mesh, shared=1)
    return program(params, ranges, known)


def accuracies(
    training: Training,
    labels: Int[np.ndarray, " patterns"],
    trajectory: Trajectory,
    *,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, "seeds snapshots 2"]:
    """Accuracy on the training patterns and on all others (nan if there are none).

    Raises:
        ValueError: labels that are not 0 or 1 for each pattern.

    >>> training = Training((1,), bits=1, activation="linear", batch=1)
    >>> params = np.array([[[2.0, -1.0, 0.0, 1.0, 0.0, 0.0]]], np.float32)  # says: class x
    >>> trajectory = Trajectory(np.array([0]), params, np.array([[0]], np.uint32))  # saw x = 0
    >>> accuracies(training, np.array([0, 0]), trajectory).tolist()
    [[[1.0, 0.0]]]
    """
    known = _checked(labels, 1 << training.bits).astype(np.int32)
    seeds, snapshots, _ = trajectory.params.shape
    seen = np.zeros((seeds, 1 << training.bits), np.float32)
    index = (trajectory.train & ((1 << training.bits) - 1)).astype(np.int64)
    np.put_along_axis(seen, index, 1.0, axis=1)
    repeated = np.broadcast_to(seen[:, None], (seeds, snapshots, seen.shape[1]))
    program = _by_snapshot(training, _hits, mesh, shared=1)
    return program(trajectory.params, repeated, known)


# Gradients


class GradientPhase(NamedTuple):
    """Size of the mean gradient and of its fluctuation over mini-batches, of one tensor w.

    Fields:
        mean: norm of the mean over mini-batches, over the norm of w.
        std: norm of the elementwise standard deviation, over the norm of w.
        snr: mean / std. Above 1 is called drift, below diffusion; 0 if both vanish.
    """

    mean: Float[Array, ""]
    std: Float[Array, ""]
    snr: Float[Array, ""]


def gradient_snr(loss_fn: Callable[[Any, Any], Array], params: Any, batches: Any) -> Any:
    """The gradient's `GradientPhase` of each tensor of `params`, at frozen weights.

    Args:
        loss_fn: (params, batch) -> loss.
        batches: as a batch, with a leading axis over mini-batches.

    >>> loss = lambda w, x: jnp.sum(w * x)
    >>> gradient_snr(loss, jnp.ones(1), jnp.array([[3.0], [1.0]]))
    GradientPhase(mean=Array(2., ...), std=Array(1., ...), snr=Array(2., ...))
    """
    gradients = lax.map(lambda batch: jax.grad(loss_fn)(params, batch), batches)

    def ratio(a: Array, b: Array) -> Array:
        return jnp.where(a > 0, a / b, 0.0)

    def phase(w: Array, g: Array) -> GradientPhase:
        mean, std = (jnp.sqrt(jnp.sum(jnp.square(s(g, axis=0)))) for s in (jnp.mean, jnp.std))
        size = jnp.sqrt(jnp.sum(jnp.square(w)))
        return GradientPhase(ratio(mean, size), ratio(std, size), ratio(mean, std))

    return jax.tree.map(phase, params, gradients)


def gradient_phases(
    training: Training, trajectory: Trajectory, *, mesh: Mesh | None = None
) -> Float[np.ndarray, "seeds snapshots layers 3"]:
    """`gradient_snr` (mean, std, snr) of each layer's kernel, over one epoch of mini-batches.

    >>> training = Training((1,), bits=1, activation="linear", batch=1, train_fraction=1.0)
    >>> params = np.array([[[2.0, -1.0, 0.0, 1.0, 0.0, 0.0]]], np.float32)  # t = 2 x - 1
    >>> trajectory = Trajectory(np.array([0]), params, np.array([[0b00, 0b01]], np.uint32))
    >>> round(float(gradient_phases(training, trajectory)[0, 0, 1, 2]), 4)  # tanh(1/2)
    0.4621
    """
    return _phases(training, mesh)(trajectory.params, trajectory.train)


@functools.lru_cache(maxsize=16)
def _phases(training: Training, mesh: Mesh | None) -> Callable:
    widths, steps, batch = training.widths, training.steps_per_epoch, training.batch

    def loss(layers: list[tuple[Array, Array]], words: Array) -> Array:
        flat = jnp.concatenate([part.reshape(-1) for layer in layers for part in layer])
        return cross_entropy(training, flat, words)

    def of_seed(params: Array, words: Array) -> Array:
        batches = words[: steps * batch].reshape(steps, batch)

        def one(params: Array) -> Array:
            phases = gradient_snr(loss, split_layers(params, widths), batches)
            return jnp.stack([jnp.stack(kernel) for kernel, _ in phases])

        return lax.map(one, params)

    return map_over_mesh(jax.vmap(of_seed), mesh)
