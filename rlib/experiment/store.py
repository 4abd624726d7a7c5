"""Files of a run: atomic writes, cached units of work, and the work directory's identity."""

import errno
import fcntl
import io
import json
import os
import uuid
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from rlib.experiment.config import first_difference
from rlib.experiment.errors import UsageError

Values = dict[str, Any]


def encode(value: Mapping[str, Any]) -> bytes:
    """A nested dictionary of arrays, numbers and strings as a npz file, which carries checksums."""
    leaves: dict[str, np.ndarray] = {}

    def collect(node: Mapping[str, Any], prefix: str) -> None:
        for key, item in node.items():
            if "/" in key:
                raise ValueError(f"key {key!r} of a cached value holds a slash")
            if isinstance(item, Mapping):
                collect(item, f"{prefix}{key}/")
                continue
            array = np.asarray(item)
            if array.dtype == object:
                raise TypeError(f"{prefix}{key}: {type(item).__name__} cannot be cached")
            leaves[prefix + key] = array

    collect(value, "")
    buffer = io.BytesIO()
    np.savez(buffer, **leaves)  # type: ignore[arg-type]
    return buffer.getvalue()


def decode(data: bytes) -> Values:
    """Inverse of `encode`; scalars come back as Python numbers. ValueError if damaged."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            leaves = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"damaged: {error}") from error
    value: Values = {}
    for key, array in leaves.items():
        *parents, leaf = key.split("/")
        node = value
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array.item() if array.ndim == 0 else array
    return value


def write_atomic(path: epath.Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_trouble(error: OSError, workdir: Any) -> str | None:
    """One line for a write that failed; None for other trouble."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {workdir} is full; what was written before is safe: "
            "make room and run the same command with the same --workdir"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"cannot write to {error.filename or workdir}: {error.strerror or error}"
    return None


def _is_foreign(path: epath.Path) -> bool:
    """Whether a file is none of those that a run makes before its config.json is there."""
    return path.name != "lock" and not path.name.startswith(".config.json")


class WorkDir:
    """A run's folder. It belongs to one experiment and configuration, and to one run at a time.

    Args:
        path: created if missing; "gs://..." works, without the lock.
        identity: {"experiment", "preset", "config"}, as JSON would give it back.

    Raises:
        UsageError: the folder is another run's, or cannot be written. Nothing is touched.
    """

    def __init__(self, path: str, identity: Mapping[str, Any]):
        # Orbax takes absolute paths only.
        self.path = epath.Path(path if "://" in path else os.path.abspath(path))
        self._lock: IO[str] | None = None
        stored = self.path / "config.json"
        try:
            if stored.exists():
                self._compare(json.loads(stored.read_text()), identity)
            elif self.path.exists() and any(map(_is_foreign, self.path.iterdir())):
                raise UsageError(f"{path} holds other files and no run; choose a new --workdir")
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            if not stored.exists():
                write_atomic(stored, json.dumps(identity, indent=1).encode())
        except ValueError as error:
            raise UsageError(f"{stored} is damaged; choose a new --workdir") from error
        except OSError as error:
            raise UsageError(write_trouble(error, path) or f"{path}: {error}") from error

    def _compare(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        for name in ("experiment", "config"):
            if name not in there:
                raise UsageError(f"{self.path}/config.json is not a run's; choose a new --workdir")
        if there["experiment"] != here["experiment"]:
            raise UsageError(
                f"{self.path} belongs to experiment {there['experiment']!r}, "
                f"this is {here['experiment']!r}; choose another --workdir"
            )
        difference = first_difference(here["config"], there["config"])
        if difference:
            raise UsageError(
                f"{self.path} has another config: {difference}; choose another --workdir"
            )

    def _take_lock(self) -> IO[str] | None:
        if "://" in os.fspath(self.path):
            return None
        handle = open(self.path / "lock", "a")  # noqa: SIM115  (held until the run ends)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.close()
            raise UsageError(
                f"another run is at work in {self.path}; wait for it or choose another --workdir"
            ) from error
        return handle

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def unit(self, key: str) -> epath.Path:
        return self.path / "cache" / f"{key}.npz"
