"""Workers of distributed training: local gradients, and state that differs between workers."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from rlib.collectives import vary

Tree = Any
Resize = Literal["mean", "zeros", "concatenate"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerWorker:
    """State that every worker has for itself.

    Inside a worker (`shard_map` or `vmap`) `value` is the worker's own; outside it has a leading
    axis, split over the worker axis. Sharding, checkpoints and a change of the number of workers
    follow from this marker alone.

    Fields:
        value: a tree of arrays.
        on_resize: what a checkpoint of another number of workers turns into: "mean" gives every
            worker the mean, so that means over workers stay; "zeros" starts anew; "concatenate"
            reads the workers' vectors as one, padded at its end, and cuts it anew.

    >>> error = PerWorker({"w": jnp.zeros((2, 3))}, on_resize="zeros")  # of two workers
    >>> jax.tree.map(jnp.shape, error)
    PerWorker(value={'w': (2, 3)}, on_resize='zeros')
    """

    value: Tree
    on_resize: Resize = dataclasses.field(default="mean", metadata={"static": True})


def is_per_worker(node: Any) -> bool:
    """Whether a node of a tree is `PerWorker` state; also an `is_leaf`.

    >>> state = {"count": 0, "error": PerWorker(jnp.zeros((2, 3)))}
    >>> [is_per_worker(node) for node in jax.tree.leaves(state, is_leaf=is_per_worker)]
    [False, True]
    """
    return isinstance(node, PerWorker)


def resize_workers(old: PerWorker, shapes: Tree, shards: Tree | None = None) -> PerWorker:
    """State of another number of workers, by its marker's policy.

    Args:
        old: with leading axis n.
        shapes: tree of the new shapes, leading axis included.
        shards: for "concatenate", into how many parts of its own length each worker's vector is
            split by the mesh's other axes; 1 if None.

    Raises:
        ValueError: the shapes differ in more than the number of workers; under "concatenate", in
            their number of axes.

    >>> state = PerWorker(jnp.array([[1.0], [3.0]]))
    >>> resize_workers(state, (4, 1)).value.ravel().tolist()
    [2.0, 2.0, 2.0, 2.0]
    """

    def resize(value: Array, shape: tuple[int, ...], parts: int) -> Array:
        alike = value.shape[1:] == shape[1:]
        if not alike and (old.on_resize != "concatenate" or len(shape) != value.ndim):
            raise ValueError(f"{value.shape} of other workers does not turn into {shape}")
        if old.on_resize == "zeros":
            return jnp.zeros(shape, value.dtype)
        if old.on_resize == "mean":
            return jnp.broadcast_to(value.mean(axis=0).astype(value.dtype), shape)
        whole = value.reshape(value.shape[0], parts, -1).swapaxes(0, 1).reshape(parts, -1)
        size = shape[0] * shape[1] // parts
        whole = jnp.pad(whole, ((0, 0), (0, max(0, size - whole.shape[1]))))[:, :size]
        return whole.reshape(parts, shape[0], -1).swapaxes(0, 1).reshape(shape)

    is_shape = lambda node: isinstance(node, tuple) and all(isinstance(n, int) for n in node)
    leaves = jax.tree.leaves(old.value)
    targets = jax.tree.leaves(shapes, is_leaf=is_shape)
    counts = [1] * len(leaves) if shards is None else jax.tree.leaves(shards)
    structure: Any = jax.tree.structure(old.value)
    resized = [resize(*each) for each in zip(leaves, targets, counts, strict=True)]
    return PerWorker(structure.unflatten(resized), old.on_resize)


def local_value_and_grad(
    loss_fn: Callable[..., Any], axis_name: str, *, has_aux: bool = False
) -> Callable[..., Any]:
    """`jax.value_and_grad` by the first argument, whose gradient stays the worker's own.

    Under `shard_map` the gradient of replicated parameters would arrive summed over the axis: the
    parameters are made varying first. No collective is compiled.

    >>> local = local_value_and_grad(lambda w, x: w * x, "workers")
    >>> losses, gradients = jax.vmap(local, (None, 0), axis_name="workers")(2.0, jnp.arange(3.0))
    >>> losses.tolist(), gradients.tolist()  # of each worker, where x is 0, 1 and 2
    ([0.0, 2.0, 4.0], [0.0, 1.0, 2.0])
    """
    differentiate = jax.value_and_grad(loss_fn, has_aux=has_aux)
    return lambda params, *args: differentiate(vary(params, axis_name), *args)


def on_one_device(
    optimizer: optax.GradientTransformation, workers: int, axis_name: str
) -> optax.GradientTransformationExtraArgs:
    """A distributed optimiser with all of its workers on one device, by `vmap`.

    `update` takes local gradients stacked along a leading axis of workers and returns the one
    update that all of them agree on; the state keeps every worker's copy.

    >>> mean = optax.stateless(lambda g, _: jax.lax.pmean(g, "data"))
    >>> tx = on_one_device(mean, 2, "data")
    >>> tx.update(jnp.array([[1.0], [3.0]]), tx.init(jnp.zeros(1)))[0]
    Array([2.], dtype=float32)
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Tree) -> Tree:
        return jax.vmap(lambda _: inner.init(params), axis_name=axis_name)(jnp.arange(workers))

    def update(updates: Tree, state: Tree, params: Tree = None, **extra: Any):
        one = lambda g, s: inner.update(g, s, params, **extra)
        agreed, state = jax.vmap(one, axis_name=axis_name)(updates, state)
        return jax.tree.map(lambda x: x[0], agreed), state

    return optax.GradientTransformationExtraArgs(init, update)
