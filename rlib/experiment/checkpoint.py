"""Checkpoints of long trainings: asynchronous, and the last good one is found again."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

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
        self._manager = ocp.CheckpointManager(path, options=options)
        self._say = say

    def save(self, step: int, state: Any, history: Mapping[str, Any], data: Any = None) -> None:
        """Start to save; `data` is an iterator with `get_state`, or None."""
        items = {
            "state": ocp.args.StandardSave(state),
            "history": ocp.args.StandardSave({"loss": np.zeros(0), **history}),
        }
        if data is not None:
            items["data"] = ocp.args.JsonSave(data.get_state())
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, template: Any, data: Any = None) -> tuple[Any, History] | None:
        """State (placed as `template`) and history of the newest readable checkpoint, or None.

        A checkpoint that cannot be read is deleted with a warning, and the one before it tried.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        items: dict[str, Any] = {
            "state": ocp.args.StandardRestore(abstract),
            "history": ocp.args.StandardRestore(),
        }
        if data is not None:
            items["data"] = ocp.args.JsonRestore()
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._manager.restore(step, args=ocp.args.Composite(**items))
            except (ValueError, OSError, KeyError) as error:
                reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
                self._say(
                    f"checkpoint of step {step} cannot be read, trying the one before: {reason}"
                )
                self._manager.delete(step)
                continue
            if data is not None:
                data.set_state(found["data"])
            return found["state"], {k: np.asarray(v) for k, v in found["history"].items()}
        return None

    def close(self) -> None:
        """Wait for saves under way."""
        with contextlib.suppress(RuntimeError):
            self._manager.wait_until_finished()
        self._manager.close()
