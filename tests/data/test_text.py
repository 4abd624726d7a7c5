"""Python's sources: what is in them, the split by file, damage, windows of any length."""

import itertools
import json
import logging
import sys

import numpy as np
import pytest

from rlib import data
from rlib.data import store, text

NAME = "python_source"


def whole(split):
    return data.arrays(NAME, split)["tokens"].tobytes()


@pytest.mark.parametrize("split", ["train", "test"])
def test_text_is_the_sources_one_after_the_other(split):
    sources = whole(split).split(b"\0")
    paths = [path for _, path in text.files(split)]
    assert paths and sources[:-1] == [path.read_bytes() for path in paths[: len(sources) - 1]]
    assert paths[len(sources) - 1].read_bytes().startswith(sources[-1])
    assert sum(len(path.read_bytes()) + 1 for path in paths) - len(whole(split)) < text.WINDOW


def test_no_file_is_in_both_splits_and_no_test_in_either():
    train, test = ({name for name, _ in text.files(split)} for split in ("train", "test"))
    assert not train & test
    assert {"argparse.py", "asyncio/locks.py", "json/decoder.py"} <= train | test
    assert not any("test" in name.split("/") or "site-packages" in name for name in train | test)
    assert 0.1 < len(test) / len(train | test) < 0.3
    assert list(text.files("train")) == sorted(text.files("train"))


def test_splits_of_known_files_never_change():
    # sha256(b"argparse.py").digest()[0] == 201, sha256(b"ast.py").digest()[0] == 180
    split = {name: s for s in ("train", "test") for name, _ in text.files(s)}
    assert (split["argparse.py"], split["ast.py"]) == ("train", "test")


def test_size_is_a_few_megabytes():
    size = data.info(NAME).examples * text.WINDOW
    assert 5e6 < size < 20e6


def folder(directory):
    return directory / "rlib" / NAME / "{}.{}.{}".format(*sys.version_info)


def test_another_size_is_damage(fresh_directory, caplog):
    expected = whole("test")
    path = folder(fresh_directory) / "dataset_info.json"
    facts = json.loads(path.read_text())
    facts["splits"][0]["shardLengths"] = ["7"]
    path.write_text(json.dumps(facts))
    store._cached_arrays.cache_clear()
    with caplog.at_level(logging.WARNING, "rlib.data"):
        assert whole("test") == expected
    assert [record.message.count("damaged") for record in caplog.records] == [1]


def test_python_without_sources_is_one_line(fresh_directory, monkeypatch, tmp_path):
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    monkeypatch.setattr(text, "examples", text.examples.__wrapped__)
    assert NAME in data.names() and data.info(NAME).examples == 0
    with pytest.raises(data.DataUnavailable, match="no sources") as error:
        data.arrays(NAME)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [None, 64, 1000])
def test_stream_gives_windows_of_the_text(length):
    batches = data.stream(NAME, batch_size=4, seed=0, length=length)
    train = whole("train")
    for batch in itertools.islice(iter(batches), 3):
        assert batch["tokens"].shape == (4, length or 256) and batch["tokens"].dtype == np.uint8
        assert all(row.tobytes() in train for row in batch["tokens"])


def test_epoch_holds_the_whole_text_at_any_length():
    size = data.arrays(NAME, "test[:40]")["tokens"].size
    rows = size // 1024
    batch = next(iter(data.stream(NAME, "test[:40]", batch_size=rows, seed=1, length=1024)))
    expected = data.arrays(NAME, "test[:40]")["tokens"].reshape(-1, 1024)
    assert sorted(map(bytes, batch["tokens"])) == sorted(map(bytes, expected))


def test_length_is_checked():
    with pytest.raises(ValueError, match="length is for text"):
        data.stream("digits", batch_size=4, seed=0, length=64)
    for length in (0, 10**9):
        with pytest.raises(ValueError, match="bytes of the text"):
            data.stream(NAME, batch_size=4, seed=0, length=length)
