"""Python's standard library as bytes of text: no package to install, some megabytes, real code."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import sysconfig
from pathlib import Path

import numpy as np

TEXTS = ("python_source",)  # sets whose examples follow each other, and so can be cut anew
WINDOW = 256  # bytes in an example
VERSION = "{}.{}.{}".format(*sys.version_info)  # of the text is that of Python

# Left out: tests (the larger half), tables of code points, documentation as one string, and what
# distributions ship apart or Python has dropped, so that the same version is the same text.
_LEFT_OUT = {
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}


def files(split: str) -> list[tuple[str, Path]]:
    """The split's sources, sorted by their name below the library's folder.

    A file is in `test` if the first byte of its name's SHA-256 divides by five: whatever the other
    files are, so it stays there when Python is upgraded.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for module in sys.stdlib_module_names - _LEFT_OUT:
        for path in [folder / f"{module}.py", *(folder / module).rglob("*.py")]:
            name = path.relative_to(folder)
            test = hashlib.sha256(name.as_posix().encode()).digest()[0] % 5 == 0
            wanted = test == (split == "test") and not _LEFT_OUT.intersection(name.parts)
            if wanted and os.access(path, os.R_OK):
                found.append((name.as_posix(), path))
    return sorted(found)


def python_source(split: str) -> np.ndarray:
    """The split's text as uint8 (N, WINDOW): each file and a zero, one after the other, cut.

    No source holds a zero byte. The last incomplete window is dropped.
    """
    text = b"".join(path.read_bytes() + b"\0" for _, path in files(split))
    windows = len(text) // WINDOW
    return np.frombuffer(text, np.uint8, windows * WINDOW).reshape(windows, WINDOW)


def cut(tokens: np.ndarray, length: int) -> np.ndarray:
    """The same text in windows of another length, as a view.

    Raises:
      ValueError: the text is shorter than one window.
    """
    if not 1 <= length <= tokens.size:
        raise ValueError(f"length {length} is not in 1 .. {tokens.size}, the bytes of the text")
    windows = tokens.size // length
    return tokens.reshape(-1)[: windows * length].reshape(windows, length)


@functools.cache
def examples() -> int:
    """How many windows the splits have together, from the sizes of the files."""
    sizes = [[path.stat().st_size + 1 for _, path in files(s)] for s in ("train", "test")]
    return sum(sum(split) // WINDOW for split in sizes)
