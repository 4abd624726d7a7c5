"""Texts as bytes: Python's sources and documentation, and Django's messages in many languages.

A text is a row of pieces (files, topics, messages), each followed by a zero, which none holds. A
piece is in `test` if the first byte of the SHA-256 of its name divides by five: whatever the other
pieces are, so it stays there when the package is upgraded, and a message is in the same split in
all languages.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

WINDOW = 256  # bytes in an example

# Left out of the sources: tests (the larger half), tables of code points, documentation as one
# string, and what distributions ship apart or Python has dropped, so that the same version is the
# same text.
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

# From the longest to the shortest, which differ by two orders of magnitude.
_CODES = "en ru el ar uk fr ja de es tr fi zh_Hans is vi cy sw ta pa ig my am kab lb"
LANGUAGES = tuple(_CODES.split())


def is_text(name: str) -> bool:
    """Whether the set's examples follow each other, and so can be cut anew."""
    return name in ("python_source", "python_docs") or name.startswith("messages/")


def version(name: str) -> str:
    """Of the text, three numbers: that of its package."""
    if not name.startswith("messages/"):
        return "{}.{}.{}".format(*sys.version_info)
    try:
        numbers = re.findall(r"\d+", importlib.metadata.version("django"))
    except importlib.metadata.PackageNotFoundError:
        numbers = []
    return ".".join([*numbers, "0", "0", "0"][:3])


def pieces(name: str, split: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the split's pieces, sorted by name."""
    for key, text in _all_pieces(name):
        if _in_test(key) == (split == "test"):
            yield key, text if isinstance(text, bytes) else text.read_bytes()


def tokens(name: str, split: str) -> np.ndarray:
    """The split's text as uint8 (N, WINDOW): each piece and a zero, one after the other, cut.

    The last incomplete window is dropped.
    """
    text = b"".join(piece + b"\0" for _, piece in pieces(name, split))
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
def examples(name: str) -> int:
    """How many windows the splits have together; of files, from their sizes."""
    sizes = {True: 0, False: 0}
    for key, text in _all_pieces(name):
        size = len(text) if isinstance(text, bytes) else text.stat().st_size
        sizes[_in_test(key)] += size + 1
    return sum(size // WINDOW for size in sizes.values())


def _in_test(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % 5 == 0


def _all_pieces(name: str) -> list[tuple[str, bytes | Path]]:
    if name == "python_source":
        return sorted(_sources())
    if name == "python_docs":
        return sorted(_topics())
    return sorted(_messages(name.partition("/")[2]))


def _sources() -> Iterator[tuple[str, Path]]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for module in sys.stdlib_module_names - _LEFT_OUT:
        for path in [folder / f"{module}.py", *(folder / module).rglob("*.py")]:
            name = path.relative_to(folder)
            if not _LEFT_OUT.intersection(name.parts) and os.access(path, os.R_OK):
                yield name.as_posix(), path


def _topics() -> Iterator[tuple[str, bytes]]:
    """The language reference, as `help()` shows it."""
    if importlib.util.find_spec("pydoc_data") is not None:
        from pydoc_data.topics import topics

        for name, text in topics.items():
            yield name, text.encode()


def _messages(language: str) -> Iterator[tuple[str, bytes]]:
    """Translations by their English original; English itself is the originals."""
    spec = importlib.util.find_spec("django")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent
    found: dict[str, str] = {}
    # Sorted, and the first translation stays: a message may be in several catalogues.
    for path in sorted(folder.rglob(f"locale/{language}/LC_MESSAGES/*.po")):
        for original, forms in _catalogue(path.read_text("utf-8")):
            text = original if language == "en" else "\n".join(filter(None, forms))
            if original and text:
                found.setdefault(original, text)
    for original, text in found.items():
        yield original, text.encode()


def _catalogue(text: str) -> Iterator[tuple[str, list[str]]]:
    """Originals and translations (one, or one for each plural) of a .po file's entries."""
    line = r'"(?:[^"\\]|\\.)*"\s*'
    for entry in text.split("\n\n"):
        if not re.search("^#,.*fuzzy", entry, re.M):  # a translator's guess
            fields = re.findall(rf"^(msgid|msgstr)(?:\[\d\])? ((?:{line})+)", entry, re.M)
            join = lambda lines: "".join(map(ast.literal_eval, re.findall(line, lines)))
            values = [(key, join(lines)) for key, lines in fields]
            yield values[0][1] if values else "", [v for key, v in values if key == "msgstr"]
