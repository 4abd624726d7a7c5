"""Sound and picture files as arrays: the only place that knows integer ranges and picture modes."""

from __future__ import annotations

import os
import warnings

import numpy as np


def read_wav(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """A WAV file as float32 (T, C) and its rate in Hz; integers are scaled into [-1, 1)."""
    from scipy.io import wavfile

    with warnings.catch_warnings():
        # Chunks of text, which SciPy warns that it skips, are of no interest here.
        warnings.simplefilter("ignore", wavfile.WavFileWarning)
        rate, samples = wavfile.read(path)
    if samples.dtype == np.uint8:  # 8 bits are unsigned around 128, all others are signed
        samples = (samples.astype(np.int16) - 128) / 128
    elif samples.dtype.kind == "i":  # SciPy shifts 24 bits to the top of int32
        samples = samples / -float(np.iinfo(samples.dtype).min)
    waveform = samples.astype(np.float32)
    return (waveform[:, None] if waveform.ndim == 1 else waveform), int(rate)


def read_picture(path: str | os.PathLike[str]) -> np.ndarray:
    """A picture as uint8 or uint16, (H, W, 1) if grey, else (H, W, 3), without transparency."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)  # a camera held upright stores its picture lying
        if picture.mode in ("I", "F"):
            raise ValueError(f"picture {os.fspath(path)!r} has 32-bit pixels: save it with 8 or 16")
        if picture.mode.startswith("I;16"):
            pixels = np.asarray(picture).astype(np.uint16)
        else:
            grey = picture.mode in ("1", "L", "LA")
            pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
