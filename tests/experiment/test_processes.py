"""Real kills, real signals, real processes: one of each."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


def environment(**more):
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    kept = {**os.environ, "XLA_FLAGS": flags}
    return {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **more}


def toy(workdir, *arguments, cwd=ROOT, **more):
    command = [sys.executable, str(HERE / "toy.py"), f"--config={HERE / 'toy_config.py'}"]
    command += ["--config.steps=12", "--config.mesh.data=2", "--seeds=1"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *arguments],
        env=environment(**more),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until_first_checkpoint(process, workdir, method):
    folder = workdir / "checkpoints" / method / "seed0"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        if folder.exists() and any(p.name.isdigit() for p in folder.iterdir()):
            return
        time.sleep(0.02)
    raise AssertionError("no checkpoint within a minute")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The work directory of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process = toy(workdir)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return workdir


def test_a_run_stopped_three_times_continues_to_the_same_numbers(tmp_path, whole, values):
    """Of a distributed optimiser too, with its errors on every worker."""
    workdir = tmp_path / "run"
    relative = Path("run")  # as the default is
    for signum, status, method in (
        (signal.SIGINT, 130, "plain"),
        (signal.SIGTERM, 143, "double"),
        (signal.SIGKILL, -9, "onebit"),
    ):
        # A second of steps is left after the first checkpoint.
        process = toy(relative, cwd=tmp_path, TOY_SLEEP="0.1")
        until_first_checkpoint(process, workdir, method)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
        assert process.returncode == status
        assert not (workdir / "cache" / method).exists()
        if signum != signal.SIGKILL:
            assert err.count("\n") == 1
            assert "Continue with: python -m experiments.toy" in err
            assert "--workdir=run" in err
    again = toy(relative, cwd=tmp_path)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, out + err
    assert values(workdir) == values(whole)


def test_a_read_only_home(tmp_path):
    """Everything works without a home folder, a cache folder or a configuration folder."""
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(stat.S_IRUSR | stat.S_IXUSR)
    drop = (
        []
        if os.geteuid()
        else ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
    )
    more = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    kept = {
        k: v
        for k, v in environment(**more).items()
        if k not in ("RLIB_DATA_DIR", "JAX_COMPILATION_CACHE_DIR")
    }
    code = "import rlib.experiment, rlib.data as d; print(d.arrays('sounds/chime-info')['rate'])"
    done = subprocess.run(
        [*drop, sys.executable, "-c", code],
        env=kept,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "[48000]" in done.stdout
    assert len(done.stderr.splitlines()) <= 1
    assert list(home.iterdir()) == []


def test_a_shadowing_configs_package_does_not_matter(tmp_path):
    """From a folder with its own `configs`, ours are still found by name, and the list works."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise ImportError('not yours')")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.winner", "--config=configs/winner.py:smok"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean 'smoke'" in done.stderr


def test_a_shadowing_experiments_package_is_named(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("")
    code = "from rlib.experiment import start; start(lambda config, run: None)"
    (tmp_path / "experiments" / "winner.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.winner", "--config=configs/winner.py:smoke"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "shadows" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_list_is_instant_and_imports_no_jax():
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "experiments"],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert time.monotonic() - begun < 5
    assert "python -m experiments.winner" in done.stdout
    assert "jax" not in done.stderr


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_give_the_numbers_of_one(tmp_path, whole, values):
    port = free_port()
    shared = ["--distributed", f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    shared += ["--only=plain,onebit"]
    workdir = tmp_path / "run"
    both = [toy(workdir, *shared, f"--process={i}") for i in (0, 1)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "w is positive" in outputs[0][0]
    assert "w is positive" not in outputs[1][0]
    for method in ("plain", "onebit"):
        np.testing.assert_allclose(values(workdir)[method], values(whole)[method][:1], rtol=1e-5)


@pytest.mark.parametrize(
    ("experiment", "method", "count", "key"),
    [("winner", "winner", 5, "clean"), ("onebit_adam", "onebit", 1, "loss")],
)
def test_two_processes_fit_as_one_does(tmp_path, experiment, method, count, key):
    """The losses of the first steps, to 1e-5; later ones amplify rounding, in one process too."""
    losses = []
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        words = [f"--config=configs/{experiment}.py:smoke", f"--only={method}", "--seeds=1"]
        words += [f"--workdir={workdir}"]
        if experiment == "onebit_adam":  # whose number of workers counts
            words += ["--config.workers=2", "--config.text.methods=()", "--config.speed.repeats=0"]
        else:
            words += [f"--config.mesh.data={processes}", "--config.bands.edges=((0.5,0.9),)"]
        if processes == 2:
            words += ["--distributed", f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
        command = [sys.executable, "-m", f"experiments.{experiment}", *words]
        started = [
            subprocess.Popen(
                [*command, *([f"--process={index}"] if processes == 2 else [])],
                env=environment(),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(processes)
        ]
        outputs = [process.communicate(timeout=240) for process in started]
        assert [process.returncode for process in started] == [0] * processes, outputs
        units = sorted((workdir / "cache" / "fit").rglob("*.npz"))
        losses.append({str(u.relative_to(workdir)): np.load(u)[key][:5] for u in units})
    assert len(losses[0]) == count
    for unit, expected in losses[0].items():
        np.testing.assert_allclose(losses[1][unit], expected, rtol=1e-5)
