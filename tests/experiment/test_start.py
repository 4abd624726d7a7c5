"""The command line: every mistake is one clear line, and nothing done is lost."""

import errno
import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rlib.data import DataUnavailable
from rlib.experiment import store
from rlib.experiment.start import _start_devices
from rlib.experiment.store import WorkDir


def one_line(err, *words):
    lines = [line for line in err.splitlines() if line.startswith("toy: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0]


def test_a_run_leaves_everything_the_report_lists(command, tmp_path):
    workdir = tmp_path / "run"
    status, out, _ = command(f"--workdir={workdir}")
    assert status == 0
    assert out.index("expect a second") < out.index("double")
    assert "w is positive" in out
    report = json.loads((workdir / "report.json").read_text())
    assert {"experiment", "preset", "rows", "claims", "figures", "seconds", "environment"} <= set(
        report
    )
    assert {"claim", "measured", "interval", "bound", "verdict"} <= set(report["claims"][0])
    assert {"jax", "device", "commit", "peak memory (MiB)"} <= set(report["environment"])
    assert report["figures"] == ["figures/values.png"]
    for name in (
        "figures/values.png",
        "figures/values.npz",
        "report.md",
        "config.json",
        "metrics.jsonl",
    ):
        assert (workdir / name).stat().st_size > 0
    assert list((workdir / "events").iterdir())
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["unit"] == "plain/seed0"] == [2, 4, 6, 8]


def test_a_finished_run_says_so_and_prints_its_report_again(command, tmp_path, toy):
    command(f"--workdir={tmp_path / 'run'}")
    before = (tmp_path / "run" / "report.json").read_bytes()

    def never(config, run):
        raise AssertionError("computed again")

    status, out, _ = command(f"--workdir={tmp_path / 'run'}", main=never)
    assert status == 0
    assert "finished" in out
    assert "w is positive" in out
    assert (tmp_path / "run" / "report.json").read_bytes() == before


def test_more_seeds_and_methods_reuse_what_is_there(command, tmp_path, values, monkeypatch):
    workdir = tmp_path / "run"
    command(f"--workdir={workdir}", "--only=plain", "--seeds=1")
    first = values(workdir)
    assert list(first) == ["plain"]
    monkeypatch.setenv("TOY_FAIL", "plain/seed0")
    assert command(f"--workdir={workdir}", "--seeds=3")[0] == 0
    assert values(workdir)["plain"][:1] == first["plain"]
    assert len(values(workdir)["double"]) == 3


def test_an_exception_loses_nothing(command, tmp_path, values, monkeypatch):
    command(f"--workdir={tmp_path / 'whole'}")
    monkeypatch.setenv("TOY_FAIL", "double/seed0")
    status, _, err = command(f"--workdir={tmp_path / 'run'}")
    assert status == 1
    assert "injected" in err
    assert f"--workdir={tmp_path / 'run'}" in err.splitlines()[-1]
    monkeypatch.setenv("TOY_FAIL", "plain/seed1")  # done before: not computed again
    assert command(f"--workdir={tmp_path / 'run'}")[0] == 0
    assert values(tmp_path / "run") == values(tmp_path / "whole")


def test_overrides_reach_the_experiment(command, tmp_path):
    workdir = tmp_path / "run"
    arguments = ["--config.steps=3", "--config.optimizer.rate=1", "--config.widths=(5,)"]
    assert command(f"--workdir={workdir}", *arguments)[0] == 0
    config = json.loads((workdir / "config.json").read_text())["config"]
    assert config["steps"] == 3
    assert config["optimizer.rate"] == 1.0
    assert config["widths"] == [5]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.stepz=3", ("stepz", "'steps'")),
        ("--config.optimizer.rat=3", ("'optimizer.rate'",)),
        ("--config.steps=None", ("steps", "value is needed")),
        ("--config.optimizer.name=None", ("value is needed",)),
        ("--config.steps=many", ("steps", "many")),
        ("--config.steps=2.5", ("steps", "2.5")),
        ("--config.optimizer=3", ("optimizer",)),
        ("--only=plian", ("'plian'", "'plain'")),
        ("--seeds=0", ("at least one",)),
        ("--seeds=two", ("seeds", "two")),
        ("--wrokdir=x", ("wrokdir", "workdir")),
        ("leftover", ("leftover", "--help")),
        ("--config.mesh.data=3", ("data=3", "8", "does not divide")),
    ],
)
def test_mistakes_in_the_command(command, tmp_path, argument, words):
    status, _, err = command(f"--workdir={tmp_path / 'run'}", argument)
    assert status == 2
    one_line(err, *words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{here}/toy_config.py:smok", ("'smok'", "'smoke'")),
        ("configs/winer.py", ("'configs/winer.py'", "'configs/winner.py'")),
        ("{here}/toy.py", ("no config file",)),
    ],
)
def test_mistakes_in_the_config(command, config, words):
    status, _, err = command(config=config.format(here=Path(__file__).parent))
    assert status == 2
    one_line(err, *words)


def test_help_names_presets_flags_and_examples(toy, capsys):
    from rlib.experiment.start import run_guarded

    assert run_guarded(toy.main, "winner", ["--help"], ()) == 0
    out = capsys.readouterr().out
    for word in (
        "smoke",
        "default",
        "paper",
        "--workdir",
        "--only",
        "--seeds",
        "--distributed",
        "examples",
    ):
        assert word in out


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_work_directory_of_another_config_is_not_touched(command, tmp_path):
    workdir = tmp_path / "run"
    command(f"--workdir={workdir}")
    before = snapshot(workdir)
    status, _, err = command(f"--workdir={workdir}", "--config.steps=9")
    assert status == 2
    one_line(err, "steps=8 there, 9 here")
    assert snapshot(workdir) == before


def test_the_work_directory_of_another_experiment_is_not_touched(command, tmp_path):
    workdir = tmp_path / "run"
    WorkDir(str(workdir), {"experiment": "other", "preset": "default", "config": {}}).close()
    before = snapshot(workdir)
    status, _, err = command(f"--workdir={workdir}")
    assert status == 2
    one_line(err, "'other'", "'toy'")
    assert snapshot(workdir) == before


def test_a_folder_with_other_files_is_not_touched(command, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    status, _, err = command(f"--workdir={tmp_path}")
    assert status == 2
    one_line(err, "other files")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_mesh_continues_the_same_run(command, tmp_path, values, monkeypatch):
    """Where a run computes is no part of what it computes."""
    monkeypatch.setenv("TOY_FAIL", "double/seed0")
    assert command(f"--workdir={tmp_path / 'run'}", "--config.mesh.data=8")[0] == 1
    monkeypatch.setenv("TOY_FAIL", "plain/seed1")  # done on the other mesh: not computed again
    assert command(f"--workdir={tmp_path / 'run'}", "--config.mesh.data=-1")[0] == 0
    monkeypatch.delenv("TOY_FAIL")
    command(f"--workdir={tmp_path / 'whole'}")
    for method, expected in values(tmp_path / "whole").items():
        np.testing.assert_allclose(values(tmp_path / "run")[method], expected, rtol=1e-5)


def test_another_expected_duration_continues_the_same_run(command, tmp_path, monkeypatch):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert command(workdir)[0] == 0
    (tmp_path / "run" / "report.json").unlink()
    monkeypatch.setenv("TOY_FAIL", "plain/seed0")  # done: not computed again
    assert command(workdir, "--config.expected=two seconds")[0] == 0


def test_a_folder_that_cannot_be_made(command, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = command(f"--workdir={tmp_path / 'file' / 'run'}")
    assert status == 2
    one_line(err, "cannot write")


def test_a_full_disk(command, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    real = store.write_atomic

    def full(path, data):
        if "double" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    monkeypatch.setattr("rlib.experiment.run.write_atomic", full)
    status, _, err = command(f"--workdir={workdir}")
    assert status == 1
    one_line(err, "disk", "full", "safe")
    monkeypatch.undo()
    assert command(f"--workdir={workdir}")[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_finds_the_disk_full(command, tmp_path):
    """Also while the run closes its files."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "lock").touch()  # of a run that died at once
    (workdir / "metrics.jsonl").unlink(missing_ok=True)

    def main(config, run):
        run._log._open()
        run._log._file.close()
        run._log._file = open("/dev/full", "w")  # noqa: SIM115
        run._log.write("unit", 1, {"loss": 1.0})
        run._log.flush()

    status, _, err = command(f"--workdir={workdir}", main=main)
    assert status == 1
    one_line(err, "disk", "full", str(workdir))
    assert command(f"--workdir={workdir}")[0] == 0


def test_a_folder_with_only_a_lock_is_no_other_run(command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    assert command(f"--workdir={tmp_path / 'run'}")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes=2"], ("go together",)),
        (["--distributed", "--coordinator=a:1"], ("go together",)),
        (
            ["--distributed", "--coordinator=a:1", "--processes=2", "--process=7"],
            ("--process=7", "0 to 1"),
        ),
    ],
)
def test_mistakes_about_processes(command, tmp_path, arguments, words):
    status, _, err = command(f"--workdir={tmp_path / 'run'}", *arguments)
    assert status == 2
    one_line(err, *words)


def test_a_missing_input_is_not_called_a_failed_write(command, tmp_path):
    def main(config, run):
        (tmp_path / "missing.csv").read_text()

    status, _, err = command(f"--workdir={tmp_path / 'lr=3'}", main=main)
    assert status == 1
    assert "FileNotFoundError" in err
    assert "cannot write" not in err
    assert f"--workdir={tmp_path / 'lr=3'}" in err.splitlines()[-1].replace("'", "")


def test_signals_are_as_before_after_a_run(command, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    command(f"--workdir={tmp_path / 'run'}")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_looking_at_a_finished_run_adds_no_file(command, tmp_path):
    command(f"--workdir={tmp_path / 'run'}")
    before = snapshot(tmp_path / "run")
    command(f"--workdir={tmp_path / 'run'}")
    assert snapshot(tmp_path / "run") == before


def test_two_runs_on_one_folder(command, tmp_path, toy):
    workdir = tmp_path / "run"
    command(f"--workdir={workdir}")
    stored = json.loads((workdir / "config.json").read_text())
    first = WorkDir(str(workdir), stored)
    status, _, err = command(f"--workdir={workdir}")
    first.close()
    assert status == 2
    one_line(err, "another run")


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (MemoryError(), 1, ("out of memory", "--config.steps")),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB"),
            1,
            ("out of memory", "--config.steps"),
        ),
        (DataUnavailable("no such set; presets need no download"), 1, ("no such set",)),
        (KeyboardInterrupt(), 130, ("Continue with", "--workdir")),
    ],
)
def test_errors_from_inside(command, tmp_path, error, status, words):
    def main(config, run):
        raise error

    got, _, err = command(f"--workdir={tmp_path / 'run'}", main=main)
    assert got == status
    one_line(err, *words)


def test_a_damaged_cache_entry_is_computed_again(command, tmp_path, values):
    workdir = tmp_path / "run"
    command(f"--workdir={workdir}")
    before = values(workdir)
    unit = workdir / "cache" / "plain" / "seed0.npz"
    data = bytearray(unit.read_bytes())
    data[len(data) // 2] ^= 0xFF
    unit.write_bytes(data)
    (workdir / "cache" / "plain" / "seed1.npz").write_bytes(b"")
    (workdir / "report.json").write_text("{")
    status, out, _ = command(f"--workdir={workdir}")
    assert status == 0
    assert out.count("computed again") == 1 + 1
    assert "report.json is damaged" in out
    assert values(workdir) == before


@pytest.mark.parametrize(
    ("mesh", "expected"), [({"data": -1}, [4]), ({"data": 2}, [2]), ({"data": 1}, [])]
)
def test_a_cpu_is_split_where_the_mesh_takes_all_there_are(mesh, expected, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    made = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: made.append(value))
    flags = dict.fromkeys(("processes", "process", "coordinator", "distributed"))
    _start_devices(ConfigDict({"mesh": mesh}), flags, 4)
    assert made == expected
