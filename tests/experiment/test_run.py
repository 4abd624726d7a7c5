"""Cache, checkpoints, seeds and keys of a run, in-process."""

import json
from io import StringIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from rlib.experiment import Run, Stopped, named_key
from rlib.experiment.checkpoint import Checkpoints
from rlib.experiment.store import decode, encode, write_atomic
from rlib.optim import onebit_adam
from rlib.parallel import make_mesh, make_train_step, shard_batch
from rlib.training import Phase


def test_values_there_and_back():
    value = {"a": {"b": np.arange(3), "c": 1.5}, "d": "text", "e": 7}
    back = decode(encode(value))
    assert back["d"] == "text"
    assert isinstance(back["e"], int)
    assert isinstance(back["a"]["c"], float)
    np.testing.assert_array_equal(back["a"]["b"], np.arange(3))


@pytest.mark.parametrize("value", [{"a": None}, {"a": object()}])
def test_what_cannot_be_stored_is_refused(value):
    with pytest.raises(TypeError, match="a: "):
        encode(value)


def test_every_flipped_byte_is_noticed_or_harmless():
    data = encode({"a": np.arange(100.0)})
    for position in range(0, len(data), 37):
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        try:
            np.testing.assert_array_equal(decode(bytes(damaged))["a"], np.arange(100.0))
        except (ValueError, KeyError):
            continue


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    from etils import epath

    path = epath.Path(tmp_path / "x")
    write_atomic(path, b"old")
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("cut")))
    with pytest.raises(OSError, match="cut"):
        write_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == b"old"


def test_a_run_without_folder_computes_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run()
    assert run.cached("unit", lambda: {"x": 1})["x"] == 1
    run.write("a.txt", b"")
    assert list(tmp_path.iterdir()) == []


def test_keys_depend_on_seed_and_names_alone():
    keys = [named_key(s, *n) for s, n in ((0, ("a",)), (1, ("a",)), (0, ("b",)), (0, ("a", "b")))]
    assert len({tuple(np.asarray(jax.random.key_data(k))) for k in keys}) == 4
    assert (named_key(0, "a") == keys[0]).all()


def loss(w, frozen, batch, key):
    return jnp.mean((batch - w) ** 2), {}


@pytest.fixture
def training():
    mesh = make_mesh({"data": 8})
    train = make_train_step(loss, optax.adam(0.1), mesh, jnp.zeros(1))
    return train, shard_batch(mesh, np.arange(8, dtype=np.float32)[:, None])


def fit(run, training, steps=20):
    train, data = training
    return run.fit("unit", [Phase(train, steps)], train.init(jnp.zeros(1)), data, chunk=4)


def stopped_after(run, chunks):
    """Let the run be asked to stop after so many chunks."""
    agree, calls = run._agree, []

    def count(value):
        calls.append(value)
        return agree(value)

    part = run._progress.part

    def progress(unit, fraction):
        part(unit, fraction)
        calls.append(fraction)
        if sum(isinstance(c, float) for c in calls) == chunks:
            run._stop = 15

    run._progress.part = progress
    run._agree = count


def test_a_stopped_training_continues_to_the_same_result(tmp_path, training):
    whole_state, whole = fit(Run(), training)
    run = Run(str(tmp_path / "run"))
    stopped_after(run, 2)
    with pytest.raises(Stopped):
        fit(run, training)
    run.close()
    again = Run(str(tmp_path / "run"))
    state, history = fit(again, training)
    again.close()
    np.testing.assert_array_equal(state.params, whole_state.params)
    np.testing.assert_array_equal(history["loss"], whole["loss"])
    records = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [4, 8, 12, 16, 20]


def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path, training):
    whole_state, _ = fit(Run(), training)
    run = Run(str(tmp_path / "run"))
    run.checkpoint_seconds = -1.0
    stopped_after(run, 4)
    with pytest.raises(Stopped):
        fit(run, training)
    run.close()
    folder = tmp_path / "run" / "checkpoints" / "unit"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    assert len(steps) == 2
    damaged = [p for p in (folder / str(steps[-1]) / "state").rglob("*") if p.is_file()]
    for path in damaged:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    screen = Console(file=StringIO(), width=200)
    again = Run(str(tmp_path / "run"), console=screen)
    state, _ = fit(again, training)
    again.close()
    assert f"checkpoint of step {steps[-1]} cannot be read" in screen.file.getvalue()
    np.testing.assert_array_equal(state.params, whole_state.params)


def test_checkpoints_move_to_another_mesh(tmp_path, training):
    from etils import epath

    train, data = training
    state, _ = train.step(train.init(jnp.zeros(1)), data)
    saver = Checkpoints(epath.Path(tmp_path / "c"), print)
    saver.save(1, state, {"loss": np.ones(1)})
    saver.close()
    small = make_train_step(
        loss, optax.adam(0.1), make_mesh({"data": 2}, jax.devices()[:2]), jnp.zeros(1)
    )
    reader = Checkpoints(epath.Path(tmp_path / "c"), print)
    restored, history = reader.restore(small.init(jnp.zeros(1)))
    reader.close()
    np.testing.assert_array_equal(restored.params, state.params)
    assert restored.params.sharding.mesh.size == 2
    np.testing.assert_array_equal(*(jax.random.key_data(s.key) for s in (restored, state)))
    np.testing.assert_array_equal(history["loss"], np.ones(1))


@pytest.mark.parametrize("sizes", [{"data": 2}, {"data": 4}, {"data": 2, "model": 2}])
def test_checkpoints_of_another_number_of_workers_are_converted(tmp_path, sizes):
    """Means of errors stay, server errors stay coordinate by coordinate, and training goes on."""
    from etils import epath

    tx = onebit_adam(0.1, axis_name="data", v_floor=-1.0)
    rules = {"mlp": "model"}
    draw = np.random.default_rng(0)
    params = {"w": nnx.Param(jnp.zeros((6, 10)), out_sharding=(None, "mlp"), eager_sharding=False)}

    def target(params, frozen, batch, key):
        return jnp.mean((batch[:, :6] @ params["w"][...] - batch[:, 6:]) ** 2), {}

    def build(sizes):
        mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
        return make_train_step(
            target, tx, mesh, params, worker_axis="data", stage="compressed", rules=rules
        )

    model = {k: v for k, v in sizes.items() if k != "data"}
    old, new = build({"data": 4 if sizes["data"] == 2 else 2, **model}), build(sizes)
    batch = draw.normal(size=(16, 16)).astype(np.float32)
    state = old.init(params)
    for _ in range(3):
        state, _ = old.step(state, shard_batch(old.mesh, batch))
    saver = Checkpoints(epath.Path(tmp_path / "c"), print)
    saver.save(3, state, {"loss": np.ones(3)})
    saver.close()
    said = []
    reader = Checkpoints(epath.Path(tmp_path / "c"), said.append)
    restored, _ = reader.restore(new.init(params))
    reader.close()
    assert len(said) == 1
    assert "workers was converted" in said[0]
    before, after = (s.opt_state[0] for s in (state, restored))
    errors = [np.asarray(s.worker_error.value["w"][...]) for s in (before, after)]
    assert errors[1].shape[0] == sizes["data"]
    np.testing.assert_allclose(errors[0].mean(axis=0), errors[1].mean(axis=0), atol=1e-6)

    def by_coordinate(s, n):
        parts = sizes.get("model", 1)
        value = np.asarray(s.server_error.value["w"][...]).reshape(n, parts, -1)
        return value.swapaxes(0, 1).reshape(parts, -1)[:, : 60 // parts]

    n_old = 4 if sizes["data"] == 2 else 2
    np.testing.assert_array_equal(by_coordinate(before, n_old), by_coordinate(after, sizes["data"]))
    np.testing.assert_array_equal(np.asarray(before.m["w"][...]), np.asarray(after.m["w"][...]))
    _, metrics = new.step(restored, shard_batch(new.mesh, batch))
    assert np.isfinite(float(metrics["loss"]))
