"""The smoke preset in-process on eight devices, an exception in the middle, then resumed."""

import json

import numpy as np
import pytest

from experiments import winner
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT
from rlib.experiment.start import run_guarded


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A work directory whose run failed at a unit of work and was then continued."""
    workdir = tmp_path_factory.mktemp("winner") / "run"
    arguments = ["--config=configs/winner.py:smoke", f"--workdir={workdir}"]
    real, units = winner.Fitter.fit, []

    def failing(self, unit, *rest):
        if unit == "fit/texture/winner/seed0":
            raise RuntimeError("injected")
        units.append(unit)
        return real(self, unit, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winner.Fitter, "fit", failing)
        assert run_guarded(winner.main, "winner", arguments, ()) == 1
    done = {u: (workdir / "cache" / f"{u}.npz").stat().st_mtime_ns for u in units}
    assert run_guarded(winner.main, "winner", arguments, ()) == 0
    after = {u: (workdir / "cache" / f"{u}.npz").stat().st_mtime_ns for u in units}
    assert after == done
    return workdir


@pytest.fixture(scope="module")
def report(interrupted):
    return json.loads((interrupted / "report.json").read_text())


def test_every_method_and_signal_is_there(report):
    methods = {row["method"] for row in report["rows"]}
    groups = {row["group"] for row in report["rows"]}
    assert {
        "winner",
        "siren-30",
        "siren-3000",
        "winner-tuned",
        "fourier",
        "finer",
        "gauss",
        "wire",
    } <= methods
    assert {"band 0-0.1", "band 0.5-0.9", "photograph", "texture", "denoising", "sound"} <= groups
    assert all(np.isfinite(row["values"]).all() for row in report["rows"])


def test_every_claim_has_a_verdict(report):
    text = " ".join(claim["claim"] for claim in report["claims"])
    for part in (
        "bottleneck",
        "SIREN-3000",
        "best w_first",
        "tuned without tuning",
        "every fixed",
        "photograph",
        "sound",
        "speed",
    ):
        assert part in text
    assert {claim["verdict"] for claim in report["claims"]} <= {"held", "not held", "inconclusive"}


def test_figures_and_sounds_are_there(interrupted, report):
    assert len(report["figures"]) == 8
    for name in [*report["figures"], "sounds/original.wav", "sounds/winner.wav"]:
        assert (interrupted / name).stat().st_size > 100


def test_the_zero_row_is_the_targets_power(report):
    row = next(
        r for r in report["rows"] if r["method"] == "zero output" and r["group"] == "band 0.5-0.9"
    )
    config, *_ = load("configs/winner.py:smoke", [], CHECKOUT)
    y = winner._bands(config, 1)[-1].y
    assert row["values"][0] == pytest.approx(-10 * np.log10(np.mean(y.astype(np.float64) ** 2)))


@pytest.mark.parametrize("preset", ["smoke", "default", "full", "paper"])
def test_presets_load_and_their_plans_are_finite(preset):
    config, *_ = load(f"configs/winner.py:{preset}", [], CHECKOUT)
    signals = [*winner._bands(config, 5), *winner._recordings(config, 5)]
    methods = ["winner", *(f"siren-{w}" for w in config.bands.siren), *config.tuned]
    costs = winner._costs(config, signals, methods)
    assert all(cost > 0 for cost in costs.values())


def test_only_the_claims_that_can_be_tested_are(tmp_path, capsys):
    arguments = [
        "--config=configs/winner.py:smoke",
        f"--workdir={tmp_path}/run",
        "--only=winner,siren-30",
        "--seeds=1",
    ]
    assert run_guarded(winner.main, "winner", arguments, ()) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {row["method"] for row in report["rows"]} >= {"winner", "siren-30"}
    assert "siren-3000" not in {row["method"] for row in report["rows"]}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.sound.name=nothing.wav", "nothing.wav"),
        ("--config.sound.samples=10000000", "samples"),
        ("--config.pictures.size=9999", "lower the size"),
        ("--config.bands.samples=250", "250"),
        ("--only=winer", "'winner'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capfd, override, words):
    arguments = ["--config=configs/winner.py:smoke", f"--workdir={tmp_path}/run", override]
    assert run_guarded(winner.main, "winner", arguments, ()) == 2
    err = capfd.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("bad", ["nan", "empty", "silent"])
def test_a_sound_that_cannot_be_fitted(tmp_path, capfd, bad):
    from scipy.io import wavfile

    samples = {
        "nan": np.full(2000, np.nan, np.float32),
        "empty": np.zeros(0, np.float32),
        "silent": np.zeros(2000, np.float32),
    }
    wavfile.write(tmp_path / "bad.wav", 8000, samples[bad])
    arguments = [
        "--config=configs/winner.py:smoke",
        f"--workdir={tmp_path}/run",
        f"--config.sound.name={tmp_path}/bad.wav",
    ]
    assert run_guarded(winner.main, "winner", arguments, ()) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
