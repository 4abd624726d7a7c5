"""Checkpoints of long trainings: asynchronous, and the last good one is found again."""

import contextlib
import logging
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from rlib.experiment.errors import UsageError
from rlib.parallel import PerWorker, is_per_worker, resize_workers

History = dict[str, np.ndarray]


class Checkpoints:
    """The checkpoints of one training; the newest two are kept.

    Args:
        path: folder of this training alone.
        say: where a warning goes.
    """

    def __init__(self, path: epath.Path, say: Callable[[str], None]):
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        self._path = path
        self._manager = ocp.CheckpointManager(path, options=options)
        self._say = say

    def save(self, step: int, state: Any, history: Mapping[str, Any], data: Any = None) -> None:
        """Start to save; `data` is an iterator with `get_state`, or None."""
        items = {
            "state": ocp.args.StandardSave(state),
            "history": ocp.args.StandardSave(dict(history)),
            "layout": ocp.args.JsonSave(
                {
                    "shapes": _shapes(state),
                    "workers": _workers(state),
                    "checksum": _checksum(state),
                }
            ),
        }
        if data is not None:
            items["data"] = ocp.args.JsonSave(data.get_state())
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, template: Any, data: Any = None) -> tuple[Any, History] | None:
        """State (placed as `template`) and history of the newest readable checkpoint, or None.

        A checkpoint that cannot be read is set aside with a warning, and the one before it tried.
        State of another number of workers is converted by its `PerWorker` policy, and said.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._read(step, template, data)
            except UsageError:
                raise
            except Exception as error:  # damaged files end in whatever TensorStore raises
                reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
                self._say(
                    f"checkpoint of step {step} cannot be read, trying the one before: {reason}"
                )
                self._set_aside(step)
        return None

    def _read(self, step: int, template: Any, data: Any) -> tuple[Any, History]:
        items = {"layout": ocp.args.JsonRestore()}
        layout = self._manager.restore(step, args=ocp.args.Composite(**items))["layout"]
        stored, here = layout["workers"], _workers(template)
        other = UsageError(
            f"the checkpoint of step {step} holds a state of other shapes than this program's; "
            "choose a new --workdir, or the code that wrote it"
        )
        if len(stored["shapes"]) != len(here["shapes"]):
            raise other
        expected = template if stored == here else _with_layout(template, stored)
        if layout["shapes"] != _shapes(expected):
            raise other
        items = {
            "state": ocp.args.StandardRestore(
                jax.tree.map(ocp.utils.to_shape_dtype_struct, expected)
            ),
            "history": ocp.args.StandardRestore(),
        }
        if data is not None:
            items["data"] = ocp.args.JsonRestore()
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        state = found["state"]
        written, read = layout["checksum"], _checksum(state)
        if None not in (written, read) and written != read:
            raise ValueError("its numbers are not those that were written")
        if stored != here:
            try:
                state = _resized(state, template, stored)
            except ValueError as error:
                raise other from error
            old, new = (layout["shapes"][0][0] for layout in (stored, here))
            self._say(f"the state of {old} workers was converted to {new}")
        if data is not None:
            data.set_state(found["data"])
        return state, {k: np.asarray(v) for k, v in found["history"].items()}

    def _set_aside(self, step: int) -> None:
        """Rename a checkpoint, so that it is neither read again nor lost."""
        with contextlib.suppress(OSError):
            (self._path / str(step)).rename(self._path / f"unreadable-{step}")
        self._manager.reload()

    def close(self) -> None:
        """Wait for saves under way; a save that failed raises here."""
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()


def _checksum(tree: Any) -> int | None:
    """Of all bits; None for arrays of which this process holds a part only."""
    leaves = jax.tree.leaves(tree)
    if not all(leaf.is_fully_addressable for leaf in leaves):
        return None
    total = 0
    for leaf in leaves:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), total)
    return total


def _shapes(tree: Any) -> list[list[int]]:
    return [list(leaf.shape) for leaf in jax.tree.leaves(tree)]


def _workers(state: Any) -> dict[str, list]:
    """Shapes of all `PerWorker` leaves, and into how many parts their vectors are split."""
    nodes = [n for n in jax.tree.leaves(state, is_leaf=is_per_worker) if is_per_worker(n)]
    leaves = jax.tree.leaves(nodes)
    return {"shapes": [list(x.shape) for x in leaves], "shards": [_parts(x) for x in leaves]}


def _parts(leaf: Any) -> int:
    spec: Any = getattr(leaf.sharding, "spec", ())
    axes = spec[1] if leaf.ndim == 2 and len(spec) > 1 and spec[1] is not None else ()
    axes = (axes,) if isinstance(axes, str) else axes
    return math.prod(leaf.sharding.mesh.shape[axis] for axis in axes)


def _with_layout(abstract: Any, layout: dict[str, list]) -> Any:
    """The template of a checkpoint of other workers: its own shapes, on every device whole."""
    shapes = iter(layout["shapes"])

    def whole(leaf: Any) -> Any:
        sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(tuple(next(shapes)), leaf.dtype, sharding=sharding)

    return _map_workers(lambda node: jax.tree.map(whole, node), abstract)


def _resized(state: Any, template: Any, stored: dict[str, list]) -> Any:
    if stored["shards"] != _workers(template)["shards"]:
        raise UsageError("the number of workers and the tensor sharding changed at once; keep one")
    shards = iter(stored["shards"])
    nodes = iter(n for n in jax.tree.leaves(template, is_leaf=is_per_worker) if is_per_worker(n))

    def resize(node: PerWorker) -> PerWorker:
        like = next(nodes)
        shapes = jax.tree.map(lambda x: x.shape, like.value)
        resized = resize_workers(node, shapes, jax.tree.map(lambda _: next(shards), node.value))
        return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), resized, like)

    return _map_workers(resize, state)


def _map_workers(change: Callable[[PerWorker], Any], tree: Any) -> Any:
    return jax.tree.map(
        lambda node: change(node) if is_per_worker(node) else node, tree, is_leaf=is_per_worker
    )
