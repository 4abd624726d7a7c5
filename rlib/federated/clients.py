"""What clients hold and how they train on it: data by client, a round's batches, local steps."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

Tree = Any
#: loss(params, batch, key) -> the loss of each example of the batch.
Losses = Callable[[Tree, Tree, Array], Float[Array, " batch"]]


class ClientData(NamedTuple):
    """Examples of all clients: each example once, and whose it is, padded.

    Fields:
        examples: tree of arrays with a leading axis over all examples.
        rows: i32[clients, most], positions of a client's examples; padding repeats the first.
        sizes: i32[clients], how many of them are real.
    """

    examples: Tree
    rows: Int[Array, "clients most"]
    sizes: Int[Array, " clients"]


def client_data(examples: Tree, parts: Sequence[np.ndarray]) -> ClientData:
    """Put a split (`data.partition_*`) into the padded form that a round takes.

    Raises:
        ValueError: no clients, an empty client, what is no position, or arrays of unequal length.

    >>> held = client_data({"x": np.arange(5.0)}, [np.array([0, 1, 4]), np.array([2])])
    >>> held.rows.tolist(), held.sizes.tolist()
    ([[0, 1, 4], [2, 2, 2]], [3, 1])
    """
    for part in map(np.asarray, parts):
        if part.ndim != 1 or (part.size and not np.issubdtype(part.dtype, np.integer)):
            raise ValueError(
                f"a client's positions are {part.dtype} {part.shape}, not integers (n,)"
            )
    sizes = np.array([len(part) for part in parts], np.int32)
    if not sizes.size or not sizes.all():
        empty = np.flatnonzero(sizes == 0).tolist()
        raise ValueError(f"clients {empty} of {sizes.size} have no examples; leave them out")
    lengths = {len(leaf) for leaf in jax.tree.leaves(examples)}
    if len(lengths) != 1:
        raise ValueError(f"arrays of {sorted(lengths)} examples; all need as many")
    rows = np.stack([np.pad(p, (0, sizes.max() - len(p)), constant_values=p[0]) for p in parts])
    if rows.min() < 0 or rows.max() >= max(lengths):
        raise ValueError(f"positions {rows.min()} to {rows.max()} of {max(lengths)} examples")
    held: Any = (examples, rows.astype(np.int32), sizes)
    return ClientData(*held)


@dataclasses.dataclass(frozen=True)
class LocalWork:
    """How much a client trains in a round: so many steps, or so many epochs of its own examples.

    With `steps` each batch is drawn from the client's examples with replacement. With `epochs` they
    are shuffled for every epoch, the last batch of an epoch may be smaller, and clients of fewer
    examples make fewer steps.

    Fields:
        batch_size: examples a step, or None for all of the client's at every step.
        steps, epochs: one of them.

    >>> LocalWork(batch_size=16, epochs=2).count(most=40)
    6
    """

    batch_size: int | None
    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        counts = [n for n in (self.steps, self.epochs) if n is not None]
        size = 1 if self.batch_size is None else self.batch_size
        if len(counts) != 1 or counts[0] < 1 or size < 1:
            raise ValueError(f"{self}: give steps or epochs, at least 1, of batches of at least 1")

    def count(self, most: int) -> int:
        """Steps of a client of `most` examples."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or 0) * math.ceil(most / (self.batch_size or most))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of one client in one round, along a leading axis of steps.

    Fields:
        rows: i32[steps, batch], positions of examples.
        weights: f32[steps, batch], 1 for an example, 0 for padding.
        keys: [steps], for the loss.
        ragged: whether steps may be all padding; such are left out.

    >>> key = jax.random.key(0)
    >>> work = LocalWork(batch_size=2, epochs=1)
    >>> batches = batches_of(work, key, rows=jnp.array([7, 8, 9, 7]), size=jnp.int32(3))
    >>> batches.weights.tolist(), float(batches.steps)
    ([[1.0, 1.0], [1.0, 0.0]], 2.0)
    """

    rows: Int[Array, "steps batch"]
    weights: Float[Array, "steps batch"]
    keys: Key[Array, " steps"]
    ragged: bool = dataclasses.field(metadata={"static": True})

    @property
    def steps(self) -> Float[Array, ""]:
        """How many steps are not padding."""
        return jnp.sum(jnp.any(self.weights > 0, axis=1)).astype(jnp.float32)


#: grad(params, batch) -> (mean loss, gradient) over the batch's examples.
Grad = Callable[[Tree, Batches], tuple[Float[Array, ""], Tree]]


def local_steps(
    step: Callable[[Tree, Batches], tuple[Tree, Tree]], carry: Tree, batches: Batches
) -> tuple[Tree, Tree]:
    """Run a client's steps, padding left out.

    Args:
        step: (carry, one batch) -> (carry, outputs), floats; added up in float32 at least.

    Returns:
        The last carry, and the mean of the outputs over the steps.

    >>> batches = Batches(
    ...     jnp.zeros((3, 1), int), jnp.array([[1.0], [1.0], [0.0]]),
    ...     jax.random.split(jax.random.key(0), 3), ragged=True,
    ... )
    >>> x, mean = local_steps(lambda x, batch: (x + 1, x), 5.0, batches)
    >>> float(x), float(mean)
    (7.0, 5.5)
    """
    one = jax.tree.map(lambda leaf: leaf[0], batches)
    like = jax.eval_shape(lambda c: step(c, one)[1], carry)
    wide = lambda leaf: jnp.promote_types(leaf.dtype, jnp.float32)  # sums of many steps
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf)), like)

    def live(carry: Tree, total: Tree, batch: Batches) -> tuple[Tree, Tree]:
        carry, out = step(carry, batch)
        return carry, jax.tree.map(jnp.add, total, out)

    def body(state: tuple[Tree, Tree], batch: Batches) -> tuple[tuple[Tree, Tree], None]:
        if not batches.ragged:
            return live(*state, batch), None
        skip = lambda carry, total, batch: (carry, total)
        return lax.cond(jnp.any(batch.weights > 0), live, skip, *state, batch), None

    carry = jax.tree.map(jnp.asarray, carry)
    (carry, total), _ = lax.scan(body, (carry, zeros), batches)
    return carry, jax.tree.map(lambda x: x / batches.steps, total)


def batches_of(work: LocalWork, key: Array, rows: Array, size: Array) -> Batches:
    most = rows.shape[0]
    steps, batch = work.count(most), work.batch_size or most
    draw_key, loss_key = jax.random.split(key)
    keys = jax.random.split(loss_key, steps)
    place = jnp.arange(most)
    if work.batch_size is None:
        index = jnp.broadcast_to(place, (steps, most))
        weights = jnp.broadcast_to((place < size).astype(jnp.float32), (steps, most))
        return Batches(rows[index], weights, keys, ragged=False)
    if work.steps is not None:
        index = jax.random.randint(draw_key, (steps, batch), 0, size)
        return Batches(rows[index], jnp.ones((steps, batch)), keys, ragged=False)
    epochs = work.epochs or 1
    bits = jax.random.bits(draw_key, (epochs, most), jnp.uint32) >> 1
    order = jnp.argsort(jnp.where(place < size, bits, jnp.uint32(2**32 - 1)), axis=1)
    padding = steps // epochs * batch - most
    order = jnp.pad(order, ((0, 0), (0, padding))).reshape(steps, batch)
    weights = jnp.pad((place < size).astype(jnp.float32), (0, padding))
    weights = jnp.tile(weights.reshape(-1, batch), (epochs, 1))
    return Batches(rows[order], weights, keys, ragged=True)


def gradient_of(loss: Losses, examples: Tree) -> Grad:
    def grad(params: Tree, batch: Batches) -> tuple[Array, Tree]:
        given = jax.tree.map(lambda x: x[batch.rows], examples)

        def mean(params: Tree) -> Array:
            losses = loss(params, given, batch.keys)
            if losses.shape != batch.weights.shape:
                raise ValueError(
                    f"the loss gave shape {losses.shape}; it must give one value for each of the "
                    f"{batch.weights.shape[0]} examples of the batch"
                )
            return jnp.sum(losses * batch.weights) / jnp.maximum(jnp.sum(batch.weights), 1)

        return jax.value_and_grad(mean)(params)

    return grad
