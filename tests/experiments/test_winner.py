"""The smoke preset, interrupted and resumed; how signals are fitted, and figures read."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import winner
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT
from rlib.experiment.start import run_guarded


def test_every_method_and_signal_is_there(smoke):
    methods = {row["method"] for row in smoke["rows"]}
    groups = {row["group"] for row in smoke["rows"]}
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


def test_every_claim_has_a_verdict(smoke):
    text = " ".join(claim["claim"] for claim in smoke["claims"])
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
    assert {claim["verdict"] for claim in smoke["claims"]} <= {"held", "not held", "inconclusive"}


def test_figures_and_sounds_are_there(smoke):
    assert len(smoke["figures"]) == 8
    for name in ("sounds/original.wav", "sounds/winner.wav"):
        assert (smoke["workdir"] / name).stat().st_size > 100


def test_the_zero_row_is_the_targets_power(smoke):
    row = next(
        r for r in smoke["rows"] if r["method"] == "zero output" and r["group"] == "band 0.5-0.9"
    )
    config, *_ = load("configs/winner.py:smoke", [], CHECKOUT)
    y = winner._bands(config, winner.Run())[-1].y
    assert row["values"][0] == pytest.approx(-10 * np.log10(np.mean(y.astype(np.float64) ** 2)))


@pytest.mark.parametrize("preset", ["smoke", "default", "full", "paper"])
def test_presets_load_and_their_plans_are_finite(preset):
    config, *_ = load(f"configs/winner.py:{preset}", [], CHECKOUT)
    run = winner.Run()
    signals = [*winner._bands(config, run), *winner._recordings(config, run)]
    methods = ["winner", *(f"siren-{w}" for w in config.bands.siren), *config.tuned]
    costs = winner._costs(config, signals, methods)
    assert all(cost > 0 for cost in costs.values())


def test_only_the_claims_that_can_be_tested_are(tmp_path):
    arguments = ["--config=configs/winner.py:smoke", f"--workdir={tmp_path}/run"]
    arguments += ["--only=winner,siren-30", "--seeds=1"]
    assert run_guarded(winner.main, "winner", arguments, ()) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "siren-3000" not in {row["method"] for row in report["rows"]}
    text = " ".join(claim["claim"] for claim in report["claims"])
    assert "bottleneck" in text
    assert "SIREN-3000" not in text
    assert "every fixed" not in text


def fits(*decibels):
    """Results of one method, one per seed, that reach these PSNRs."""
    return [{"clean": np.full(20, 10 ** (-d / 10))} for d in decibels]


@pytest.fixture
def signals():
    config, *_ = load("configs/winner.py:smoke", [], CHECKOUT)
    run = winner.Run()
    return [*winner._bands(config, run), *winner._recordings(config, run)]


def verdicts(signals, found):
    complete = {s.name: found.get(s.name, {}) for s in signals}
    claims = winner._claims(signals, complete, {"fraction": [0.8, 0.81]})
    return {claim.claim: claim for claim in claims}


def test_claims_of_a_world_in_which_the_paper_is_right(signals):
    zero = signals[1].zero_psnr
    low = {"siren-30": fits(50, 51), "siren-3000": fits(30, 31), "winner": fits(50, 51)}
    high = {"siren-30": fits(zero, zero), "siren-3000": fits(41, 42), "winner": fits(54, 55)}
    photograph = {"siren-30": fits(30, 31), "siren-60": fits(32, 33), "winner": fits(40, 41)}
    photograph |= {"winner-tuned": fits(50, 51), "finer": fits(45, 46), "wire": fits(20, 21)}
    names = [s.name for s in signals]
    found = dict(zip(names, (low, high, photograph), strict=False))
    claims = verdicts(signals, found)
    assert {claim.verdict for claim in claims.values()} == {"held"}
    measured = {sentence: claim.measured for sentence, claim in claims.items()}
    assert measured["band 0.5-0.9: WINNER above SIREN-3000 (dB)"] == pytest.approx(13)
    assert measured["photograph: WINNER above published siren-30 (dB)"] == pytest.approx(10)
    assert measured["photograph: WINNER above best w_first, siren-60 (dB)"] == pytest.approx(8)
    rival = "photograph: WINNER above best rival, finer, both tuned here (dB)"
    assert measured[rival] == pytest.approx(5)
    fixed = next(v for k, v in measured.items() if k.startswith("every fixed"))
    assert fixed == pytest.approx(20)


def test_claims_of_a_world_in_which_it_is_wrong(signals):
    zero = signals[1].zero_psnr
    low = {"siren-30": fits(50, 51), "siren-3000": fits(48, 49), "winner": fits(40, 41)}
    high = {
        "siren-30": fits(zero + 9, zero + 9.1),
        "siren-3000": fits(41, 42),
        "winner": fits(20, 21),
    }
    found = {signals[0].name: low, signals[1].name: high}
    claims = verdicts(signals, found)
    wrong = {s: c.verdict for s, c in claims.items() if not s.startswith("speed")}
    assert set(wrong.values()) == {"not held"}
    worst = next(c for s, c in claims.items() if s.startswith("tuned without tuning"))
    assert "band 0.5-0.9" in worst.claim
    assert worst.measured == pytest.approx(-21)


def test_denoising_is_judged_at_its_best_step(signals):
    denoising = next(s for s in signals if s.name == "denoising")
    early = [{"clean": np.concatenate([np.full(10, 0.01), np.full(10, 0.1)])}] * 2
    found = {denoising.name: {"winner": early, "siren-30": fits(15, 15)}}
    claims = verdicts(signals, found)
    claim = next(c for s, c in claims.items() if s.startswith("denoising"))
    assert claim.measured == pytest.approx(5)


def test_the_best_setting_of_the_best_rival_stays_beside_winner(signals):
    tuned = {"finer": [(1e-3, 5.0), (1e-4, 5.0)], "winner-tuned": [(1e-3, 30.0)], "wire": [(1, 1)]}
    reached = {("finer", 1e-3): 30, ("finer", 1e-4): 40, ("winner", 1e-3): 10, ("wire", 1): np.nan}
    fitter = SimpleNamespace(
        config=SimpleNamespace(tuned=tuned),
        fit=lambda unit, signal, setting, seed: fits(reached[setting[:2]])[0],
    )
    best = {"finer": winner.Setting("finer", 1e-4, 5.0)}
    best["winner-tuned"] = winner.Setting("winner", 1e-3, 30.0)
    band, photograph = signals[0], next(s for s in signals if s.name == "photograph")
    assert winner._tune(fitter, photograph, list(tuned)) == best
    best["wire"] = winner.Setting("wire", 1, 1)
    assert winner._tune(fitter, band, list(tuned)) == best


def test_one_spike_at_the_end_does_not_decide():
    errors = np.full(100, 1e-5)
    errors[-1] = 1.0
    assert winner._psnr({"clean": errors}, winner.LAST) == pytest.approx(50)


def test_winner_is_not_siren(smoke):
    """The noise reaches the networks: their first outputs differ, and WINNER's are in the band."""
    from rlib.experiment.store import decode

    before = {
        name: decode((smoke["workdir"] / f"cache/fit/band 0.5-0.9/{name}/seed0.npz").read_bytes())[
            "before"
        ]
        for name in ("winner", "siren-30")
    }
    energy = {}
    for name, y in before.items():
        amplitude = np.abs(np.fft.rfft(y[:, 0] - y.mean()))
        energy[name] = np.square(amplitude[64:116]).sum() / np.square(amplitude).sum()
    assert energy["siren-30"] < 0.01 < 0.2 < energy["winner"]


@pytest.mark.parametrize(
    ("rows", "chunk", "parts"),
    [(150_000, 500, 300), (18_750, 500, 30), (7, 500, 1), (1009, 500, 1)],
)
def test_rows_are_cut_evenly(rows, chunk, parts):
    assert winner._parts(rows, chunk) == parts
    assert rows % winner._parts(rows, chunk) == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.sound.name=nothing.wav", "nothing.wav"),
        ("--config.sound.samples=10000000", "samples"),
        ("--config.pictures.size=9999", "lower the size"),
        ("--config.bands.samples=250", "250"),
        ("--config.bands.edges=(0.1,0.2)", "bands.edges"),
        ("--config.bands.edges=()", "bands.edges"),
        ("--config.bands.edges=((0.5,0.4),)", "bands.edges"),
        ("--config.bands.siren=('a',)", "bands.siren"),
        ("--config.tuned.finer=(1,2)", "tuned.finer"),
        ("--config.model.layers=1", "model.layers"),
        ("--config.chunk=0", "chunk"),
        ("--config.pictures.size=0", "pictures.size"),
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
