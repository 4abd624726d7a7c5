"""Cache, checkpoints, seeds and keys of a run, in-process."""

import json
import shutil
from io import StringIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from rlib.experiment import Run, Stopped, UsageError, named_key
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


def test_a_choice_is_by_the_mean_of_draws_and_its_losses_are_kept(tmp_path):
    losses = lambda: np.float32([[1, 9], [4, 4], [np.nan, 0]])
    for answer in (losses, None):  # not asked again
        run = Run(str(tmp_path / "run"))
        assert run.choose("tune/a", "abc", answer) == "b"
        run.close()
    kept = decode((tmp_path / "run" / "cache" / "tune" / "a.npz").read_bytes())["losses"]
    np.testing.assert_array_equal(kept, losses())
    assert Run().choose("tune/a", "ab", lambda: [2, 1]) == "b"
    with pytest.raises(ValueError, match="2 settings and losses"):
        Run().choose("tune/a", "ab", lambda: [[2, 1]])


def test_a_single_setting_is_taken_untried_and_its_unit_counts_as_done():
    run = Run()
    run.plan({"tune/a": 1.0})
    assert run.choose("tune/a", [0.1], None) == 0.1
    assert run._progress._ended == {"tune/a"}


def loss(w, frozen, batch, key):
    return jnp.mean((batch - w) ** 2), {}


@pytest.fixture
def training():
    mesh = make_mesh({"data": 8})
    train = make_train_step(loss, optax.adam(0.1), mesh, jnp.zeros(1))
    return train, shard_batch(mesh, np.arange(8, dtype=np.float32)[:, None])


def fit(run, training, steps=20):
    train, data = training
    look = lambda state: {"w": state.params[0]}
    phases = [Phase(train, steps)]
    return run.fit("unit", phases, train.init(jnp.zeros(1)), data, chunk=4, look=look)


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
    assert [len(history[name]) for name in ("loss", "w")] == [20, 5]
    for name, values in whole.items():
        np.testing.assert_array_equal(history[name], values)
    records = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["w"]) for r in records] == list(
        zip(range(4, 24, 4), whole["w"].tolist(), strict=True)
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A work directory with two checkpoints of a training that was stopped, and its end."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    mesh = make_mesh({"data": 8})
    train = make_train_step(loss, optax.adam(0.1), mesh, jnp.zeros(1))
    built = train, shard_batch(mesh, np.arange(8, dtype=np.float32)[:, None])
    run = Run(str(workdir))
    run.checkpoint_seconds = -1.0
    stopped_after(run, 4)
    with pytest.raises(Stopped):
        fit(run, built)
    run.close()
    return workdir, built, fit(Run(), built)[0]


def state_files(workdir):
    folder = workdir / "checkpoints" / "unit"
    newest = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    files = (folder / str(newest) / "state").rglob("*")
    return newest, sorted(p for p in files if p.is_file() and p.stat().st_size > 0)


def flip(data):
    damaged = bytearray(data)
    for position in range(len(damaged) // 4, len(damaged), max(1, len(damaged) // 7)):
        damaged[position] ^= 0x10
    return bytes(damaged)


@pytest.mark.parametrize("damage", [flip, lambda d: d[: len(d) // 2], lambda d: b"", None])
def test_any_damaged_file_falls_back_and_is_said(tmp_path, stopped, damage):
    """Each file of the newest checkpoint alone, and all: never other numbers, never a traceback."""
    source, built, whole = stopped
    count = len(state_files(source)[1])
    for index in [*range(count), None]:
        workdir = tmp_path / str(index)
        shutil.copytree(source, workdir)
        newest, files = state_files(workdir)
        for path in files if index is None else files[index : index + 1]:
            path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
        screen = Console(file=StringIO(), width=300)
        again = Run(str(workdir), console=screen)
        state, history = fit(again, built)
        again.close()
        np.testing.assert_array_equal(state.params, whole.params)
        assert len(history["loss"]) == 20
        said = f"checkpoint of step {newest} cannot be read" in screen.file.getvalue()
        kept = (workdir / "checkpoints" / "unit" / f"unreadable-{newest}").exists()
        assert said == kept
        assert said or index is not None  # one file may be none that is read


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


def test_a_checkpoint_of_another_program_is_kept_and_named(tmp_path, training):
    from etils import epath

    train, _ = training
    saver = Checkpoints(epath.Path(tmp_path / "c"), print)
    saver.save(1, train.init(jnp.zeros(1)), {"loss": np.ones(1)})
    saver.close()
    wide = make_train_step(loss, optax.adam(0.1), train.mesh, jnp.zeros(3))
    reader = Checkpoints(epath.Path(tmp_path / "c"), print)
    with pytest.raises(UsageError, match="other shapes"):
        reader.restore(wide.init(jnp.zeros(3)))
    assert reader.restore(train.init(jnp.zeros(1))) is not None
    reader.close()


def test_checkpoints_go_when_their_unit_is_done(tmp_path, training):
    run = Run(str(tmp_path / "run"))
    run.checkpoint_seconds = -1.0
    run.cached("unit", lambda: {"loss": fit(run, training)[1]["loss"]})
    run.close()
    assert not (tmp_path / "run" / "checkpoints" / "unit").exists()
    assert (tmp_path / "run" / "cache" / "unit.npz").exists()


@pytest.mark.parametrize("sizes", [{"data": 2}, {"data": 4}, {"data": 2, "model": 2}])
def test_checkpoints_of_another_number_of_workers_are_converted(tmp_path, sizes):
    """Means of errors stay, server errors stay coordinate by coordinate, and training goes on."""
    from etils import epath

    tx = onebit_adam(0.1, axis_name="data", v_floor=None)
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
    errors = [np.asarray(s.carried.value["w"][...]) for s in (before, after)]
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


def test_a_stream_that_cannot_stand_again_is_refused(tmp_path, training):
    train, _ = training
    batches = lambda: (np.full((8, 1), i, np.float32) for i in range(100))
    go = lambda run: run.fit(
        "unit", [Phase(train, 20)], train.init(jnp.zeros(1)), batches(), chunk=4
    )
    run = Run(str(tmp_path / "run"))
    stopped_after(run, 2)
    with pytest.raises(Stopped):
        go(run)
    run.close()
    again = Run(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="get_state"):
        go(again)
    again.close()


def test_half_a_line_of_a_killed_process_spoils_no_record(tmp_path, training):
    run = Run(str(tmp_path / "run"))
    fit(run, training)
    run.close()
    log = tmp_path / "run" / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"unit": "other", "st')
    again = Run(str(tmp_path / "run"))
    again._log.write("new", 1, {"loss": float("nan")})
    again.close()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["unit"] for r in records] == ["unit"] * 5 + ["new"]
    assert records[-1]["loss"] is None
