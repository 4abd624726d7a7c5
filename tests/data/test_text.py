"""Texts: what is in them, the split by piece, damage, windows of any length."""

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
    pieces = [piece for _, piece in text.pieces(NAME, split)]
    assert pieces and sources[:-1] == pieces[: len(sources) - 1]
    assert pieces[len(sources) - 1].startswith(sources[-1])
    assert sum(len(piece) + 1 for piece in pieces) - len(whole(split)) < text.WINDOW


def test_no_file_is_in_both_splits_and_no_test_in_either():
    train, test = ({name for name, _ in text.pieces(NAME, split)} for split in ("train", "test"))
    assert not train & test
    assert {"argparse.py", "asyncio/locks.py", "json/decoder.py"} <= train | test
    assert not any("test" in name.split("/") or "site-packages" in name for name in train | test)
    assert 0.1 < len(test) / len(train | test) < 0.3
    names = [name for name, _ in text.pieces(NAME, "train")]
    assert names == sorted(names)


def test_splits_of_known_files_never_change():
    # sha256(b"argparse.py").digest()[0] == 201, sha256(b"ast.py").digest()[0] == 180
    split = {name: s for s in ("train", "test") for name, _ in text.pieces(NAME, s)}
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
    with pytest.raises(data.DataUnavailable, match="no text for 'python_source'") as error:
        data.arrays(NAME)
    assert "\n" not in str(error.value)


PO = r"""
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\n"

#: admin.py
msgid "Save \"all\""
msgstr ""
"Hifadhi "
"\"zote\""

#, fuzzy
msgid "Guess"
msgstr "Wrong"

msgid "%d day"
msgid_plural "%d days"
msgstr[0] "siku %d"
msgstr[1] "masiku %d"

msgid "Untranslated"
msgstr ""
"""


def test_a_catalogue_is_read_as_its_format_says(monkeypatch, tmp_path):
    folder = tmp_path / "django" / "conf" / "locale" / "sw" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / "django.po").write_text(PO)
    (folder / "a.po").write_text('msgid "%d day"\nmsgstr ""\n')  # no translation hides none
    (folder / "z.po").write_text('msgid "%d day"\nmsgstr "another"\n')  # the first one stays
    (tmp_path / "django" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "django", raising=False)
    found = dict(text._messages("sw"))
    assert found == {'Save "all"': b'Hifadhi "zote"', "%d day": b"siku %d\nmasiku %d"}


def test_a_message_is_in_the_same_split_in_all_languages():
    parts = {
        (language, split): {key for key, _ in text.pieces(f"messages/{language}", split)}
        for language in ("en", "ru", "sw")
        for split in ("train", "test")
    }
    for language in ("ru", "sw"):
        for split, other in (("train", "test"), ("test", "train")):
            assert len(parts[language, split] & parts["en", split]) > 20
            assert not parts[language, split] & parts["en", other]
    sizes = [data.info(f"messages/{language}").examples for language in ("ru", "sw", "lb")]
    assert sizes[0] > 3 * sizes[1] > 20 * sizes[2] > 0


def test_messages_without_django_are_one_line(fresh_directory, monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(text, "examples", text.examples.__wrapped__)
    with pytest.raises(data.DataUnavailable, match=r"\.\[text\]") as error:
        data.arrays("messages/ru")
    assert "\n" not in str(error.value)


def test_documentation_is_english():
    docs = data.arrays("python_docs", "test")["tokens"].tobytes()
    assert docs.count(b" the ") > 100


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
