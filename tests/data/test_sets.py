"""The content of our own data sets, against known facts and against other readers."""

import importlib.util
import re
import wave
from pathlib import Path

import numpy as np
import pytest

from rlib import data
from rlib.data import text


def test_every_set_has_the_shapes_that_its_facts_state():
    alike = {f"messages/{language}" for language in text.LANGUAGES[1:]}  # one stands for all
    for name in sorted(set(data.names()) - alike):
        facts = data.info(name)
        parts = [data.arrays(name, split) for split in facts.splits]
        for part in parts:
            assert all(not column.flags.writeable for column in part.values())
        lengths = [{len(column) for column in part.values()} for part in parts]
        assert all(len(length) == 1 for length in lengths)
        assert sum(length.pop() for length in lengths) == facts.examples
        if name.startswith("photographs/"):
            stated = tuple(map(int, re.findall(r"\d+", facts.what)[:3]))
            assert parts[0]["image"].shape[1:] == stated and parts[0]["image"].dtype == np.uint8
        if name.startswith("sounds/"):
            rate, _, samples, channels = map(int, re.findall(r"\d+", facts.what))
            assert parts[0]["waveform"].shape == (1, samples, channels)
            assert parts[0]["waveform"].dtype == np.float32
            assert parts[0]["rate"].dtype == np.int32 and parts[0]["rate"] == [rate]
            assert 0 < np.abs(parts[0]["waveform"]).max() <= 1


def both_splits(name):
    train, test = data.arrays(name), data.arrays(name, "test")
    return {key: np.concatenate([train[key], test[key]]) for key in train}


def rows(array):
    return sorted(map(bytes, np.ascontiguousarray(array).reshape(len(array), -1)))


def test_digits_are_scikit_learns():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    x, y = sklearn_datasets.load_digits(return_X_y=True)
    ours = both_splits("digits")
    assert np.bincount(ours["label"]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert rows(ours["image"]) == rows(x.astype(np.uint8))
    first = np.flatnonzero((ours["image"].reshape(-1, 64) == x[0]).all(axis=1))
    assert ours["label"][first].tolist() == [y[0]]
    assert len(data.arrays("digits", "test")["label"]) == 1797 // 5


def test_mnist_is_balanced():
    ours = both_splits("mnist_5k")
    assert np.bincount(ours["label"]).tolist() == [500] * 10
    assert ours["image"].max() == 255 and ours["image"].dtype == np.uint8


def test_diabetes_is_scikit_learns_unscaled():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    x, y = sklearn_datasets.load_diabetes(return_X_y=True, scaled=False)
    ours = both_splits("diabetes")
    expected = np.column_stack([x, y]).astype(np.float32)
    assert rows(np.column_stack([ours["x"], ours["y"]])) == rows(expected)


@pytest.mark.parametrize(
    ("name", "columns", "mean_y", "mean_x0"),
    [
        ("boston_housing", 13, 22.53, 3.614),  # thousand USD; crimes per head
        ("auto_mpg", 7, 23.45, 5.472),  # miles per gallon; cylinders
        ("diabetes", 10, 152.13, 48.518),  # progression; years
        ("diamonds", 9, 3932.80, 0.798),  # USD; carat
    ],
)
def test_tables_have_their_known_means(name, columns, mean_y, mean_x0):
    ours = both_splits(name)
    assert ours["x"].shape[1] == columns and ours["x"].dtype == ours["y"].dtype == np.float32
    assert np.isfinite(ours["x"]).all()
    assert ours["y"].mean(dtype=np.float64) == pytest.approx(mean_y, abs=0.01)
    assert ours["x"][:, 0].mean(dtype=np.float64) == pytest.approx(mean_x0, abs=0.001)


def test_grades_of_diamonds_are_ordinal():
    x = both_splits("diamonds")["x"]
    counts = [np.bincount(x[:, column].astype(int)).tolist() for column in (1, 2, 3)]
    assert counts[0] == [1610, 4906, 12082, 13791, 21551]  # Fair to Ideal
    assert counts[1] == [2808, 5422, 8304, 11292, 9542, 9797, 6775]  # J to D
    assert counts[2] == [741, 9194, 13065, 12258, 8171, 5066, 3655, 1790]  # I1 to IF


def test_nox_emissions_first_hour():
    ours = both_splits("nox_emissions")
    first = np.flatnonzero(np.isclose(ours["y"], 4.45725005591147))
    expected = np.float32([373, 5.53648884666482, 0.856446145417212])
    assert any(np.array_equal(ours["x"][row], expected) for row in first)


def test_photographs_are_those_of_their_packages():
    skimage_data = pytest.importorskip("skimage.data")
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    camera = data.arrays("photographs/camera")["image"]
    assert np.array_equal(camera[0, :, :, 0], skimage_data.camera())
    assert np.array_equal(data.arrays("photographs/chelsea")["image"][0], skimage_data.chelsea())
    china = data.arrays("photographs/china")["image"][0]
    assert np.array_equal(china, sklearn_datasets.load_sample_image("china.jpg"))


@pytest.mark.parametrize("name", ["zelda-info", "big-sur-error", "chime-success"])  # 8, 16, 24 bit
def test_sounds_against_the_wave_module(name):
    chime = Path(importlib.util.find_spec("chime").origin).parent
    theme, _, event = name.rpartition("-")
    with wave.open(str(chime / "themes" / theme / f"{event}.wav")) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8).reshape(-1, width)
    if width == 1:
        samples = raw[:, 0].astype(int) - 128
    else:  # little-endian, the last byte carries the sign
        samples = sum(raw[:, i].astype(int) << 8 * i for i in range(width))
        samples = np.where(samples >= 2 ** (8 * width - 1), samples - 2 ** (8 * width), samples)
    ours = data.arrays(f"sounds/{name}")
    assert ours["rate"] == [rate]
    expected = samples.reshape(-1, channels) / 2 ** (8 * width - 1)
    assert np.array_equal(ours["waveform"][0], expected.astype(np.float32))


def test_split_is_the_same_in_every_run():
    # RandomState(0).permutation(506)[:101], in the order of the file; NumPy never changes it.
    prices = data.arrays("boston_housing", "test")["y"]
    assert np.array_equal(prices[:5], np.float32([21.6, 15.0, 21.7, 19.9, 19.6]))
    assert prices.sum(dtype=np.float64) == pytest.approx(2246.6, abs=0.01)
