"""Where arrays live: logical axis names to mesh axes, batches over the data axis."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlib.parallel.workers import PerWorker

Tree = Any

#: Mesh axis of every logical axis name; names and mesh axes that a run lacks mean "not split".
LOGICAL_AXIS_RULES: dict[str, str | None] = {
    "batch": "data",
    "embed": None,
    "heads": "model",
    "kv_heads": None,
    "mlp": "model",
    "vocab": None,
    "layers": None,
}


def _on_mesh(spec: P, mesh: Mesh) -> P:
    return P(*(axis if axis in mesh.axis_names else None for axis in spec))


def parameter_specs(
    mesh: Mesh, params: Tree, rules: Mapping[str, str | None] = LOGICAL_AXIS_RULES
) -> Tree:
    """PartitionSpecs of an NNX state (or of its `eval_shape`); leaves without names get P()."""
    with nnx.logical_axis_rules(tuple(rules.items())):
        specs = nnx.get_partition_spec(params)
    return jax.tree.map(lambda spec: _on_mesh(spec, mesh), specs, is_leaf=_is_spec)


def state_specs(state: Tree, params: Tree, specs: Tree, worker_axis: str | None = None) -> Tree:
    """PartitionSpecs of an optimiser's state.

    A leaf that is shaped like a parameter, and whose path ends in that parameter's path, is split
    like it; other leaves are replicated. Under `PerWorker` a leading axis over the workers comes
    first, and a vector of another length than its parameter is split over all of its axes.

    Args:
        state, params: trees of arrays or `ShapeDtypeStruct`s, both of one device's shards if
            `worker_axis` is given, always without leading axes of workers.
        specs: as `params`, with a PartitionSpec at each leaf.
        worker_axis: mesh axis of `PerWorker` state; None for one worker, without that axis.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = jax.tree.leaves(specs, is_leaf=_is_spec)
    table = {
        tuple(map(str, path)): (leaf.shape, spec)
        for (path, leaf), spec in zip(paths, leaves, strict=True)
    }

    def parameter_of(path: Sequence[Any]) -> tuple[tuple[int, ...] | None, P]:
        names = tuple(map(str, path))
        for start in range(len(names)):
            if names[start:] in table:
                return table[names[start:]]
        return None, P()

    def spec_of(path: Sequence[Any], leaf: Any) -> P:
        shape, spec = parameter_of(path)
        return spec if shape == leaf.shape else P()

    def worker_spec_of(path: Sequence[Any], leaf: Any) -> P:
        shape, spec = parameter_of(path)
        if shape == leaf.shape:
            return P(worker_axis, *spec)
        axes = tuple(axis for axis in jax.tree.leaves(tuple(spec)) if axis is not None)
        return P(worker_axis, axes) if leaf.ndim == 1 and axes else P(worker_axis)

    def node_specs(path: Sequence[Any], node: Any) -> Any:
        if not isinstance(node, PerWorker):
            return spec_of(path, node)
        one = spec_of if worker_axis is None else worker_spec_of
        within = jax.tree_util.tree_map_with_path(
            lambda inner, leaf: one((*path, *inner), leaf), node.value
        )
        return PerWorker(within, node.on_resize)

    return jax.tree_util.tree_map_with_path(
        node_specs, state, is_leaf=lambda node: isinstance(node, PerWorker)
    )


def _is_spec(node: Any) -> bool:
    return isinstance(node, P)


def named(mesh: Mesh, specs: Tree) -> Tree:
    """A tree of PartitionSpecs as a tree of NamedShardings."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def batch_spec(mesh: Mesh, leading: int = 0) -> P:
    """Split the axis after `leading` unsplit ones over the mesh's data axis."""
    axis = LOGICAL_AXIS_RULES["batch"]
    return P(*[None] * leading, axis if axis in mesh.axis_names else None)


def data_axis_size(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape.get(LOGICAL_AXIS_RULES["batch"], 1)


def place(mesh: Mesh, tree: Tree, spec: P | None = None) -> Tree:
    """Put host arrays, the same ones on every process, on the mesh; replicated if `spec` is None.

    Raises ValueError if a split axis does not divide by its mesh axis.
    """
    sharding = NamedSharding(mesh, P() if spec is None else spec)

    def put(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        for size, axis in zip(host.shape, sharding.spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(
                    f"an axis of {size} does not divide by {axis}={mesh.shape[axis]} of the mesh"
                )
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def shard_batch(mesh: Mesh, batch: Tree) -> Tree:
    """Put a host batch on the mesh, its leading axis split over the data axis."""
    return place(mesh, batch, batch_spec(mesh))
