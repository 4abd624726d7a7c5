"""One sound or one picture, of ours or of the user's, checked before anything is fitted to it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from rlib.data.files import read_picture, read_wav
from rlib.data.registry import names, unknown
from rlib.data.store import arrays

if TYPE_CHECKING:
    from jaxtyping import Float


def check_signal(x: np.ndarray, name: str) -> None:
    """Refuses a signal that no network can be fitted to.

    Args:
      x: samples or pixels, any shape.
      name: what the message calls it.

    Raises:
      ValueError: it is empty, not numeric, or holds NaN or infinities; one line says which.

    >>> check_signal(np.array([0.0, np.nan]), "tone.wav")
    Traceback (most recent call last):
    ValueError: signal 'tone.wav' has 1 of 2 values NaN or infinite, first at (1,)
    """
    x = np.asarray(x)
    if x.size == 0:
        raise ValueError(f"signal {name!r} is empty: its shape is {x.shape}")
    if x.dtype.kind not in "biufc":
        raise ValueError(f"signal {name!r} is not numeric: its type is {x.dtype}")
    bad = ~np.isfinite(x)
    if bad.any():
        first = tuple(int(i) for i in np.unravel_index(bad.argmax(), x.shape))
        raise ValueError(
            f"signal {name!r} has {bad.sum()} of {x.size} values NaN or infinite, first at {first}"
        )


def load_sound(path_or_name: str | os.PathLike[str]) -> tuple[Float[np.ndarray, "t c"], int]:
    """A sound as float32 (T, C) and its rate in Hz.

    Args:
      path_or_name: an own data set (`"sounds/chime-success"`), or a WAV file: integers of 8 to 32
        bits are scaled into [-1, 1), floats are kept as they are.

    Raises:
      FileNotFoundError: neither a file nor an own sound.
      ValueError: not a WAV file, or refused by `check_signal`.

    >>> waveform, rate = load_sound("sounds/chime-success")
    >>> waveform.shape, rate
    ((83180, 1), 48000)
    """
    path = _own_or_file(path_or_name, "sounds/")
    if path in names():
        sound = arrays(path)
        waveform, rate = sound["waveform"][0], int(sound["rate"][0])
    else:
        try:
            waveform, rate = read_wav(path)
        except Exception as error:  # SciPy meets a broken header with whichever comes first
            raise ValueError(f"{path!r} cannot be read as a WAV file ({error})") from error
    check_signal(waveform, path)
    return waveform, rate


def load_picture(path_or_name: str | os.PathLike[str]) -> Float[np.ndarray, "h w c"]:
    """A picture as float32 (H, W, C) in [0, 1]; C is 1 for a grey one, else 3.

    Args:
      path_or_name: an own data set (`"photographs/camera"`), or a file that Pillow reads, of 8 or
        16 bits; transparency is dropped.

    Raises:
      FileNotFoundError: neither a file nor an own photograph.
      ValueError: not a picture, or refused by `check_signal`.

    >>> load_picture("photographs/chelsea").shape
    (300, 451, 3)
    """
    path = _own_or_file(path_or_name, "photographs/")
    if path in names():
        pixels = arrays(path)["image"][0]
    else:
        try:
            pixels = read_picture(path)
        except OSError as error:
            raise ValueError(f"{path!r} cannot be read as a picture ({error})") from error
    picture = (pixels / np.iinfo(pixels.dtype).max).astype(np.float32)
    check_signal(picture, path)
    return picture


def _own_or_file(path_or_name: str | os.PathLike[str], family: str) -> str:
    path = os.fspath(path_or_name)
    if (path in names() and path.startswith(family)) or os.path.isfile(path):
        return path
    raise FileNotFoundError(f"{path!r} is no file, nor one of the {family[:-1]}: {unknown(path)}")
