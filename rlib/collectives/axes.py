"""Named axes of workers, under `shard_map` and under `vmap` alike."""

from typing import Any

import jax
from jax import lax
from jaxtyping import Array

Tree = Any


def varying_axes(x: Array) -> frozenset[str]:
    """Mesh axes over which a value differs, by its type under `shard_map`; empty elsewhere.

    >>> mesh = jax.sharding.Mesh(jax.devices(), "workers")
    >>> show = lambda x, w: print(*varying_axes(x), *varying_axes(w))
    >>> show = jax.shard_map(show, mesh=mesh, in_specs=(jax.P("workers"), jax.P()), out_specs=None)
    >>> jax.eval_shape(show, jax.numpy.ones(mesh.size), jax.numpy.ones(3))  # x varies, w does not
    workers
    """
    kind = jax.typeof(x)
    return frozenset(kind.vma if hasattr(kind, "vma") else kind.mat.varying)


def is_manual(axis_name: str) -> bool:
    """Whether the axis is one of a surrounding `shard_map` (else, if bound, of a `vmap`)."""
    return axis_name in jax.sharding.get_abstract_mesh().manual_axes


def vary(tree: Tree, axis_name: str) -> Tree:
    """Let the type say that values may differ between workers; the values stay.

    >>> mesh = jax.sharding.Mesh(jax.devices(), "workers")
    >>> show = lambda w: print(*varying_axes(vary(w, "workers")))
    >>> show = jax.shard_map(show, mesh=mesh, in_specs=jax.P(), out_specs=None)
    >>> jax.eval_shape(show, jax.numpy.ones(3))
    workers
    """
    if not is_manual(axis_name):
        return tree
    cast = lambda x: lax.pcast(x, (axis_name,), to="varying")
    return jax.tree.map(lambda x: x if axis_name in varying_axes(x) else cast(x), tree)


def all_gather(x: Array, axis_name: str) -> Array:
    """(...) of each worker -> (n, ...), the same on all workers, which its type says.

    >>> of_all = jax.vmap(lambda x: all_gather(x, "workers"), axis_name="workers")
    >>> of_all(jax.numpy.array([1.0, 2.0])).tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """
    if is_manual(axis_name):
        return lax.all_gather(vary(x, axis_name), axis_name, to="invarying")
    return lax.all_gather(x, axis_name)


def require_axis(axis_name: str | None, who: str) -> None:
    """Refuse, while tracing, an axis that is not bound here; None is one worker.

    Raises:
        ValueError: says how `who` is called with workers, and without.

    >>> require_axis("workers", "my_mean")
    Traceback (most recent call last):
    ValueError: my_mean: no axis 'workers' here; call it inside shard_map or ...
    """
    try:
        if axis_name is not None:
            lax.axis_index(axis_name)
    except NameError as error:
        raise ValueError(
            f"{who}: no axis {axis_name!r} here; call it inside shard_map or "
            f"vmap(axis_name={axis_name!r}), for example by make_train_step(worker_axis="
            f"{axis_name!r}), or build it with axis_name=None for one worker"
        ) from error


def require_local(updates: Tree, axis_name: str | None, who: str) -> None:
    """Refuse, while tracing, updates that are the same on all workers.

    Raises:
        ValueError: the axis is not bound, or an update does not vary over it: it was averaged
            before, and there is nothing left to compress.

    >>> mesh = jax.sharding.Mesh(jax.devices(), "workers")
    >>> check = lambda g: require_local(g, "workers", "my_optimiser")
    >>> check = jax.shard_map(check, mesh=mesh, in_specs=jax.P(), out_specs=None)
    >>> jax.eval_shape(check, {"w": jax.numpy.ones(3)})
    Traceback (most recent call last):
    ValueError: my_optimiser: the update ['w'] is the same on all workers of 'workers'; ...
    """
    require_axis(axis_name, who)
    if axis_name is None or not is_manual(axis_name):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        if axis_name not in varying_axes(leaf):
            raise ValueError(
                f"{who}: the update {jax.tree_util.keystr(path)} is the same on all workers of "
                f"{axis_name!r}; give local gradients (rlib.parallel.local_value_and_grad)"
            )
