"""Sounds and pictures that a user brings."""

import doctest
import importlib
import wave

import numpy as np
import pytest

from rlib import data


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        (np.array([0, 1, np.nan, np.nan]), r"'s' has 2 of 4 values NaN or infinite, first at \(2"),
        (np.array([[0, -np.inf]]), r"1 of 2 values NaN or infinite, first at \(0, 1\)"),
        (np.zeros((0, 2)), r"'s' is empty: its shape is \(0, 2\)"),
        (np.array(["a"]), "not numeric"),
    ],
)
def test_check_signal_refuses(signal, message):
    with pytest.raises(ValueError, match=message) as error:
        data.check_signal(signal, "s")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("signal", [np.zeros(1), np.array([[255]], np.uint8), np.array([True])])
def test_check_signal_accepts(signal):
    data.check_signal(signal, "s")


def write_wav(path, samples, width, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(8000)
        signed = width > 1
        file.writeframes(b"".join(int(s).to_bytes(width, "little", signed=signed) for s in samples))
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_load_sound_scales_by_the_range_of_the_type(width, tmp_path):
    half = 2 ** (8 * width - 1)
    signed = [-half, -half // 2, 0, half // 2]
    samples = [s + half for s in signed] if width == 1 else signed
    waveform, rate = data.load_sound(write_wav(tmp_path / "tone.wav", samples, width))
    assert waveform.dtype == np.float32 and rate == 8000
    assert waveform.tolist() == [[-1.0], [-0.5], [0.0], [0.5]]


def test_load_sound_keeps_channels(tmp_path):
    path = write_wav(tmp_path / "stereo.wav", [0, 16384, -16384, 0], 2, channels=2)
    assert data.load_sound(path)[0].tolist() == [[0.0, 0.5], [-0.5, 0.0]]


def test_load_sound_checks(tmp_path):
    from scipy.io import wavfile

    wavfile.write(tmp_path / "nan.wav", 8000, np.array([0.5, np.nan], np.float32))
    with pytest.raises(ValueError, match=r"nan.wav' has 1 of 2 values NaN"):
        data.load_sound(tmp_path / "nan.wav")
    for channels in (1, 2):
        with pytest.raises(ValueError, match="empty"):
            data.load_sound(write_wav(tmp_path / "empty.wav", [], 2, channels))
    (tmp_path / "text.wav").write_text("no sound at all, only some words")
    (tmp_path / "void.wav").write_text("")
    whole = write_wav(tmp_path / "tone.wav", range(100), 2).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:30])
    (tmp_path / "headless.wav").write_bytes(whole[:12] + whole[36:])
    for name in ("text.wav", "void.wav", "cut.wav", "headless.wav"):
        with pytest.raises(ValueError, match="cannot be read as a WAV file"):
            data.load_sound(tmp_path / name)


def test_own_names_load_too():
    waveform, rate = data.load_sound("sounds/zelda-info")
    assert waveform.shape == (18828, 1) and rate == 44100
    picture = data.load_picture("photographs/camera")
    assert picture.shape == (512, 512, 1) and picture.dtype == np.float32
    assert picture.min() == 0 and picture.max() == 1


@pytest.mark.parametrize("load", [data.load_sound, data.load_picture])
@pytest.mark.parametrize("name", ["no_such_file.wav", "digits"])
def test_neither_file_nor_name(load, name):
    with pytest.raises(FileNotFoundError, match="the nearest of ours is") as error:
        load(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 51], [102, 255]], np.uint8), [[[0.0], [0.2]], [[0.4], [1.0]]]),
        (np.array([[0, 13107, 65535]], np.uint16), [[[0.0], [0.2], [1.0]]]),
        (np.array([[[255, 0, 51]]], np.uint8), [[[1.0, 0.0, 0.2]]]),
        (np.array([[[255, 0, 51, 7]]], np.uint8), [[[1.0, 0.0, 0.2]]]),
        (np.array([[True, False]]), [[[1.0], [0.0]]]),
    ],
)
def test_load_picture_by_mode(pixels, expected, tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(pixels).save(tmp_path / "picture.png")
    assert np.array_equal(data.load_picture(tmp_path / "picture.png"), np.float32(expected))


def test_load_picture_refuses(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        data.load_picture(tmp_path / "text.png")
    image.fromarray(np.float32([[np.nan]])).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="32-bit pixels"):
        data.load_picture(tmp_path / "float.tif")


@pytest.mark.parametrize("module", ["", ".registry", ".signals", ".store", ".streams"])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"rlib.data{module}"))
    assert result.attempted and not result.failed
