"""Streams: order, resumption, processes, and the two ways to read, which must agree."""

import itertools
import json

import numpy as np
import pytest

from rlib import data
from rlib.data import streams


def take(batches, count):
    return list(itertools.islice(iter(batches), count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.fixture
def numbered(monkeypatch):
    """A set of ten examples that are their own row numbers."""
    column = np.arange(10)
    monkeypatch.setattr(streams, "names", lambda: ["numbered"])
    monkeypatch.setattr(streams, "arrays", lambda name, split: {"i": column})
    return "numbered"


def order(name, count, **arguments):
    batches = take(data.stream(name, **arguments), count)
    return np.concatenate([batch["i"] for batch in batches])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 25])
def test_epochs_are_permutations_and_differ(numbered, batch_size):
    seen = order(numbered, 60 // batch_size + 1, batch_size=batch_size, seed=3)
    epochs = seen[: len(seen) // 10 * 10].reshape(-1, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_order_depends_on_the_seed_only(numbered):
    first = order(numbered, 12, batch_size=5, seed=0)
    assert np.array_equal(first, order(numbered, 12, batch_size=5, seed=0))
    assert np.array_equal(first, order(numbered, 20, batch_size=3, seed=0))  # nor on the batch size
    assert not np.array_equal(first, order(numbered, 12, batch_size=5, seed=1))


@pytest.mark.parametrize("process_count", [1, 2, 3, 6])
def test_processes_slice_one_global_batch(process_count):
    arguments = {"batch_size": 12, "seed": 7}
    whole = take(data.stream("digits", **arguments), 130)  # past the first epoch
    parts = [
        take(data.stream("digits", **arguments, process_index=i, process_count=process_count), 130)
        for i in range(process_count)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in batch]) for key in batch[0]}
        for batch in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_resumes_in_the_middle_of_an_epoch():
    def start():
        return iter(data.stream("digits", batch_size=100, seed=1))

    batches = start()
    take(batches, 17)  # 14.38 batches make an epoch
    state = json.loads(json.dumps(batches.get_state()))
    rest = take(batches, 20)
    resumed = start()
    resumed.set_state(state)
    assert_same(take(resumed, 20), rest)
    jumped = start()
    jumped.set_state({"next_index": 17})
    assert_same(take(jumped, 20), rest)


def test_batches_are_writable_copies():
    batch = take(data.stream("boston_housing", batch_size=8, seed=0), 1)[0]
    batch["x"][:] = 0
    assert data.arrays("boston_housing")["x"].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0, "seed": 0}, "batch_size 0"),
        ({"batch_size": 6, "seed": 0, "process_count": 4}, "multiple of process_count 4"),
        ({"batch_size": 6, "seed": 0, "process_index": 2, "process_count": 2}, "process_index 2"),
        ({"batch_size": 6, "seed": -1}, "seed -1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.stream("digits", **arguments)


@pytest.fixture
def public(fresh_directory):
    """A prepared set that is not ours, as TFDS would have left it in the data directory."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class ToyPublic(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None

        def _info(self):
            features = {
                "x": tfds.features.Tensor(shape=(2,), dtype=np.float32),
                "y": tfds.features.Scalar(np.int32),
                "note": tfds.features.Text(),
                "ragged": tfds.features.Tensor(shape=(None,), dtype=np.uint8),
            }
            features = {key: features[key] for key in self.wanted}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(50):
                ragged = np.zeros(i, np.uint8)
                example = {"x": [i, -i], "y": i, "note": "a" * i, "ragged": ragged}
                example["x"] = np.float32(example["x"])
                yield i, {key: example[key] for key in self.wanted}

    def prepare(*wanted):
        ToyPublic.wanted = wanted
        ToyPublic(data_dir=fresh_directory).download_and_prepare(file_format="array_record")
        return "toy_public"

    prepare.folder = fresh_directory / "toy_public" / "1.0.0"
    return prepare


def test_disk_and_memory_give_the_same_order(public, monkeypatch):
    name = public("x", "y", "note")
    columns = data.arrays(name)
    assert columns["y"].dtype == np.int32 and sorted(columns["y"]) == list(range(50))
    assert columns["note"][7] == b"a" * columns["y"][7]
    memory = take(data.stream(name, batch_size=8, seed=0), 20)
    monkeypatch.setattr(streams, "_IN_MEMORY", 0)
    monkeypatch.setattr(streams, "arrays", None)
    batches = data.stream(name, batch_size=8, seed=0)
    assert_same(take(batches, 20), memory)
    resumed = iter(batches)
    resumed.set_state({"next_index": 15})
    assert_same(take(resumed, 5), memory[15:])


def test_ragged_public_set_is_one_line(public):
    with pytest.raises(ValueError, match="'ragged' is empty, nested or of varying shape"):
        data.arrays(public("ragged"))


def test_format_that_needs_tensorflow_is_one_line(public):
    name = public("y")
    path = public.folder / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(data.DataUnavailable, match=r"is not array_record.*need no download$"):
        data.arrays(name)
