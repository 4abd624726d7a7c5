"""Where arrays live: logical axis names to mesh axes, batches over the data axis."""

from collections.abc import Callable, Mapping, Sequence
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
    """PartitionSpecs of an NNX state (or of its `eval_shape`); leaves without names get P().

    >>> mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    >>> w = nnx.Param(np.zeros((3, 8)), out_sharding=("embed", "mlp"), eager_sharding=False)
    >>> parameter_specs(mesh, {"w": w})["w"].get_value() == P(None, "model")
    True
    """
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

    >>> import optax
    >>> params = {"w": np.zeros((4, 2), np.float32)}
    >>> state = jax.eval_shape(optax.scale_by_adam().init, params)
    >>> specs = state_specs(state, params, {"w": P("model")})
    >>> specs.mu["w"] == specs.nu["w"] == P("model"), specs.count == P()
    (True, True)
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
    """A tree of PartitionSpecs as a tree of NamedShardings.

    >>> mesh = Mesh(jax.devices(), "data")
    >>> shardings = named(mesh, {"x": P("data"), "w": P()})
    >>> shardings["x"].shard_shape((2 * mesh.size, 3)), shardings["w"].shard_shape((3,))
    ((2, 3), (3,))
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def batch_spec(mesh: Mesh, leading: int = 0) -> P:
    """Split the axis after `leading` unsplit ones over the mesh's data axis.

    >>> mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    >>> batch_spec(mesh, leading=1) == P(None, "data")
    True
    """
    axis = LOGICAL_AXIS_RULES["batch"]
    return P(*[None] * leading, axis if axis in mesh.axis_names else None)


def data_axis_size(mesh: Mesh) -> int:
    """Into how many parts a batch is split.

    >>> data_axis_size(jax.sharding.AbstractMesh((4, 2), ("data", "model")))
    4
    """
    return mesh.shape.get(LOGICAL_AXIS_RULES["batch"], 1)


def place(mesh: Mesh, tree: Tree, spec: P | None = None) -> Tree:
    """Put host arrays, the same ones on every process, on the mesh; replicated if `spec` is None.

    Raises ValueError if a split axis does not divide by its mesh axis.

    >>> mesh = Mesh(jax.devices(), "data")
    >>> w = place(mesh, np.ones(3))
    >>> w.sharding.is_fully_replicated, len(w.addressable_shards) == mesh.size
    (True, True)
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
    """Put a host batch on the mesh, its leading axis split over the data axis.

    Raises:
        ValueError: the leading axis does not divide by the data axis of the mesh.

    >>> mesh = Mesh(jax.devices(), "data")
    >>> x = shard_batch(mesh, np.zeros((2 * mesh.size, 3)))
    >>> {shard.data.shape for shard in x.addressable_shards}
    {(2, 3)}
    """
    return place(mesh, batch, batch_spec(mesh))


def map_over_mesh(
    function: Callable[..., Tree], mesh: Mesh | None, shared: int = 0
) -> Callable[..., Tree]:
    """A program of many independent rows (seeds, networks), split over the mesh's data axis.

    Args:
        function: of arrays with a leading axis over some of the rows, often a `jax.vmap`; so are
            its results. Its last `shared` arguments are whole, and the same for all rows.
        mesh: None for one device.

    Returns:
        The function of all rows, jitted. It takes host arrays, the same ones on every process,
        and gives host arrays on every process. Where rows do not divide by the mesh's axis, the
        last one is computed again and dropped.

    >>> program = map_over_mesh(lambda x, scale: scale * x, Mesh(jax.devices(), "data"), shared=1)
    >>> program(np.arange(3.0), 2.0).tolist()
    [0.0, 2.0, 4.0]
    """

    def over(*args: Tree) -> Tree:
        if mesh is None:
            return function(*args)
        split = batch_spec(mesh)
        specs = (split,) * (len(args) - shared) + (P(),) * shared
        # Rows know nothing of each other: nothing needs to be proven about replication.
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False
        )
        return mapped(*args)

    program = jax.jit(over, out_shardings=None if mesh is None else named(mesh, P()))

    def call(*args: Tree) -> Tree:
        own, same = args[: len(args) - shared], args[len(args) - shared :]
        rows = len(jax.tree.leaves(own)[0])
        if mesh is not None:
            parts = data_axis_size(mesh)
            index = np.minimum(np.arange(-(-rows // parts) * parts), rows - 1)
            own = shard_batch(mesh, jax.tree.map(lambda x: np.asarray(x)[index], own))
        return jax.tree.map(lambda x: np.asarray(x)[:rows], program(*own, *same))

    return call
