"""Data sets on disk: prepared by TFDS, verified when read, prepared again when damaged."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlib.data import sources
from rlib.data.registry import NO_DOWNLOAD, DataUnavailable, Info, info, names, unknown


def data_dir() -> str:
    """The data directory: `RLIB_DATA_DIR`, else `TFDS_DATA_DIR`, else `rlib/datasets` in the cache.

    The cache is `XDG_CACHE_HOME`, else `~/.cache`. Our own sets lie in the subfolder `rlib`, so
    that no other library's folder is taken for ours. They never lie in a bucket (`gs://`): if that
    is the data directory, they lie in the cache.

    >>> from unittest import mock
    >>> with mock.patch.dict(os.environ, RLIB_DATA_DIR="/data/of/all"):
    ...     data_dir()
    '/data/of/all'
    """
    chosen = os.environ.get("RLIB_DATA_DIR") or os.environ.get("TFDS_DATA_DIR")
    return os.path.expanduser(chosen) if chosen else _cache_dir()


def arrays(name: str, split: str = "train") -> dict[str, np.ndarray]:
    """A whole split in memory; the leading axis counts its examples.

    Our own sets have these features (`info` tells shapes, units, licence and source of each):

    - `"photographs/camera"`, ...: `image` uint8 (1, H, W, C), C = 1 for a grey one, else 3;
    - `"sounds/chime-success"`, ...: `waveform` float32 (1, T, C) in [-1, 1], `rate` int32 (1,), Hz;
    - `"digits"`, `"mnist_5k"`: `image` uint8 (N, H, W, 1), `label` int64 (N,);
    - `"diamonds"` and the other tables: `x` float32 (N, D), `y` float32 (N,), unscaled;
    - `"python_source"`, `"python_docs"`, `"messages/sw"`, ...: `tokens` uint8 (N, 256), bytes of
      the installed Python's standard library and language reference, of Django's messages in a
      language. Rows follow each other, `reshape(-1)` is the text, and a zero ends each piece.

    Pictures and sounds have the split `train` only; the others have `train` and `test`, 80 to 20 by
    one fixed permutation, or text by file. TFDS slices such as `"train[:10%]"` work. An own set is
    prepared when it is first used, in seconds; what was read before comes from memory.

    Args:
      name: an own name (`names()`) or a public TFDS name, such as `"cifar10"`.
      split: as in TFDS.

    Returns:
      A dictionary of read-only arrays, one for each feature.

    Raises:
      DataUnavailable: not prepared, not known, or inside a package that is not installed.
      ValueError: no such split, or examples of different shapes, which fit no array.

    >>> digits = arrays("digits")
    >>> digits["image"].shape, digits["label"].shape
    ((1438, 8, 8, 1), (1438,))
    """
    return dict(_cached_arrays(name, split, data_dir()))


def images(name: str, split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """A labelled set of pictures, as most models take it.

    Returns:
      Pixels, float32 (N, H, W, C), 1 for the largest value that the set's format has (16 for
      "digits", 255 for bytes); labels, int32 (N,).

    Raises:
      DataUnavailable, ValueError: as `arrays`; a set without `image` and `label`, or whose pixels
        are no integers.

    >>> pixels, labels = images("digits")
    >>> pixels.shape, float(pixels.max()), labels.dtype
    ((1438, 8, 8, 1), 1.0, dtype('int32'))
    """
    features = arrays(name, split)
    if not {"image", "label"} <= set(features):
        raise ValueError(f"{name} has {', '.join(features)}, and no images with labels")
    if not np.issubdtype(features["image"].dtype, np.integer):
        raise ValueError(
            f"{name} has pixels of {features['image'].dtype}, and no known largest one"
        )
    largest = np.float32(16 if name == "digits" else np.iinfo(features["image"].dtype).max)
    return features["image"] / largest, features["label"].astype(np.int32)


def prepare(name: str) -> None:
    """Prepares a data set; a public one is downloaded, which nothing else in rlib ever does.

    Raises:
      DataUnavailable: unknown name, or TensorFlow is missing, which public sets need once.

    >>> prepare("digits")  # from now on `arrays` and `stream` only read
    """
    if name in names():
        arrays(name)
        return
    builder = _public_builder(name)
    if importlib.util.find_spec("tensorflow") is None:
        raise DataUnavailable(
            f"preparing the public data set {name!r} needs TensorFlow: "
            f"pip install -e '.[paper]'; {NO_DOWNLOAD}"
        )
    builder.download_and_prepare(file_format="array_record")


def public_source(name: str, split: str) -> Any:
    """Random access to a prepared public set, as TFDS's data source.

    Raises:
      DataUnavailable: unknown, not prepared, or in a format that only TensorFlow reads.
    """
    builder = _public_builder(name)
    missing = f"is not prepared in {data_dir()}"
    if (builder.data_path / "dataset_info.json").exists():
        try:
            return _source(builder, name, split)
        except NotImplementedError:
            missing = f"in {data_dir()} is not array_record (use another RLIB_DATA_DIR)"
    raise DataUnavailable(
        f"data set {name!r} {missing}: pip install -e '.[paper]', then "
        f"python -m rlib.data prepare {name}; {NO_DOWNLOAD}"
    )


def gather(source: Any, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Some examples of a TFDS data source, each feature as one array of its declared type.

    Raises:
      ValueError: a feature is missing from a record, nested, or differs in shape between records.
    """
    examples = source.__getitems__([int(row) for row in rows])
    stacked = {}
    for key, feature in sorted(source.dataset_info.features.items()):
        values = [np.asarray(example[key]) for example in examples]
        if values[0].dtype == object or len({value.shape for value in values}) > 1:
            raise ValueError(f"feature {key!r} is empty, nested or of varying shape: no array fits")
        stacked[key] = np.stack(values)
        if stacked[key].ndim == 1 and stacked[key].dtype.kind in "biuf":  # came as Python's numbers
            stacked[key] = stacked[key].astype(feature.np_dtype, copy=False)
    return stacked


@functools.lru_cache(maxsize=64)
def _cached_arrays(name: str, split: str, directory: str) -> dict[str, np.ndarray]:
    if name in names():
        columns = _own_arrays(info(name), split)
    else:
        source = public_source(name, split)
        columns = gather(source, range(len(source)))
    for column in columns.values():
        column.setflags(write=False)
    return columns


def _cache_dir() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "rlib", "datasets")


def _roots() -> tuple[Path, Path]:
    """The folder of our own sets, and the one that stands in when that cannot be written."""
    local = _cache_dir() if "://" in data_dir() else data_dir()
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(local, "rlib"), Path(tempfile.gettempdir(), f"rlib-{user}", "datasets", "rlib")


@functools.cache
def _warn_once(message: str) -> None:
    logging.getLogger("rlib.data").warning(message)


def _source(builder: Any, name: str, split: str) -> Any:
    with contextlib.suppress(ValueError):  # TFDS's message is several lines long
        source = builder.as_data_source(split)
        if len(source):
            return source
    raise ValueError(
        f"data set {name!r} has no examples in split {split!r}: its splits are "
        f"{', '.join(builder.info.splits)}, and slices of them such as 'train[:10%]'"
    )


def _public_builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    # Anything but set/config:version, a namespace above all, would let TFDS ask the network.
    if not re.fullmatch(r"\w+(/[\w.+-]+)?(:[\d.*]+)?", name):
        raise unknown(name)
    try:
        return tfds.builder(name, data_dir=data_dir())
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError, ImportError):
        raise unknown(name) from None


class _Damaged(Exception):
    """A prepared folder does not hold what it should."""


@contextlib.contextmanager
def _any_error_is_damage() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # JSON, protobuf and array_record each raise their own
        raise _Damaged(str(error).partition("\n")[0][:200]) from error


def _own_arrays(row: Info, split: str) -> dict[str, np.ndarray]:
    # Other processes may prepare or discard the same folder meanwhile. Each does so by one rename,
    # so the worst that can happen to us is another turn of this loop.
    problem = f"data set {row.name!r} is missing from {_roots()[0]}"
    for _ in range(3):
        for folder in (root / row.name / row.version for root in _roots()):
            if os.path.isdir(folder):
                try:
                    return _read_prepared(folder, row, split)
                except _Damaged as error:
                    problem = f"data set {row.name!r} in {folder} is damaged ({error})"
                    _warn_once(f"{problem}: preparing it again")
                    _discard(folder)
        _prepare_own(row)
    raise DataUnavailable(f"{problem}, and what lies there must be removed; {NO_DOWNLOAD}")


def _read_prepared(folder: Path, row: Info, split: str) -> dict[str, np.ndarray]:
    import tensorflow_datasets as tfds

    with _any_error_is_damage():
        builder = tfds.builder_from_directory(folder)
        found = sum(part.num_examples for part in builder.info.splits.values())
        if found != row.examples:
            raise ValueError(f"{found} examples instead of {row.examples}")
    source = _source(builder, row.name, split)
    with _any_error_is_damage():  # array_record compares the hash of every chunk that it reads
        return gather(source, range(len(source)))


def _discard(folder: Path) -> None:
    with contextlib.suppress(OSError):
        bin_ = tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True)
        with bin_ as path:
            os.rename(folder, Path(path, "damaged"))


def _prepare_own(row: Info) -> None:
    examples = sources.read(row)
    preferred, fallback = _roots()
    for root in (preferred, fallback):
        final = root / row.name / row.version
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            workspace = tempfile.TemporaryDirectory("", ".new-", root, ignore_cleanup_errors=True)
            with workspace as path:
                built = _build(row, examples, path)
                with contextlib.suppress(OSError):  # another process was first: its copy serves
                    os.rename(built, final)
            return
        except OSError as error:
            if root == preferred:
                _warn_once(f"cannot write to {root} ({error.strerror or error}): using {fallback}")
    raise DataUnavailable(
        f"no folder for data set {row.name!r} can be written: set RLIB_DATA_DIR; {NO_DOWNLOAD}"
    )


def _build(row: Info, examples: dict[str, dict[str, np.ndarray]], workspace: str) -> str:
    """Prepares one own set below `workspace`, without TFDS's chatter, and returns its folder."""
    import tensorflow_datasets as tfds

    family, _, config = row.name.partition("/")

    def feature(key: str, column: np.ndarray) -> Any:  # not Image: it needs TensorFlow to encode
        if key == "label":
            return tfds.features.ClassLabel(num_classes=int(column.max()) + 1)
        if column.ndim == 1:
            return tfds.features.Scalar(column.dtype)
        return tfds.features.Tensor(shape=column.shape[1:], dtype=column.dtype)

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore
        name = family
        VERSION = tfds.core.Version(row.version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
        url_infos = None  # there are none, and TFDS's search for them needs importlib_resources

        def _info(self):
            features = {key: feature(key, column) for key, column in examples["train"].items()}
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{row.what}. Read from the package {row.package}.",
                features=tfds.features.FeaturesDict(features),
                license=row.licence,
                disable_shuffling=True,  # examples stay in the order of their source
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in examples}

        def _generate_examples(self, split):
            for i, values in enumerate(zip(*examples[split].values(), strict=True)):
                yield i, dict(zip(examples[split], values, strict=True))

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder = Builder(data_dir=workspace)
        builder.download_and_prepare(file_format="array_record")
    return builder.data_dir
