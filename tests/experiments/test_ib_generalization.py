"""The smoke preset, interrupted and resumed; the mesh; blobs, sizes and presets."""

import json

import jax
import numpy as np
import pytest

from experiments import ib_generalization
from rlib import parallel
from rlib.experiment import Run, UsageError
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT
from rlib.experiment.start import run_guarded


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The report, and the networks of the constrained series, of eight devices."""
    workdir = tmp_path_factory.mktemp("ib_generalization") / "run"
    arguments = ["--config=configs/ib_generalization.py:smoke", f"--workdir={workdir}"]
    real, fitted = ib_generalization._fit, {}

    def failing(config, run, series, *size):
        if series == "constrained":
            raise RuntimeError("injected")
        return real(config, run, series, *size)

    def only_the_rest(config, run, series, *size):
        assert series == "constrained"  # the plain one was done: not computed again
        fitted.update(real(config, run, series, *size))
        return fitted

    run = lambda: run_guarded(ib_generalization.main, "ib_generalization", arguments, ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ib_generalization, "_fit", failing)
        assert run() == 1
        patch.setattr(ib_generalization, "_fit", only_the_rest)
        assert run() == 0
    return json.loads((workdir / "report.json").read_text()), fitted


def test_every_measure_claim_and_figure_is_there(ran):
    report, _ = ran
    assert set(ib_generalization.MEASURES) <= {row["method"] for row in report["rows"]}
    text = " ".join(claim["claim"] for claim in report["claims"])
    for part in ("plain", "constrained", "I(X;Z|Y)", "I(phi;S)", "weight norm", "parameter count"):
        assert part in text
    assert report["figures"] == ["figures/correlations.png", "figures/networks.png"]
    assert all(np.isfinite(row["values"]).all() for row in report["rows"])


@pytest.fixture(scope="module")
def smoke():
    return load("configs/ib_generalization.py:smoke", [], CHECKOUT)[0]


def test_eight_devices_are_one(ran, smoke):
    """Three decays make six networks, which eight devices do not divide."""
    _, eight = ran
    run = Run()
    run.mesh = lambda config: parallel.make_mesh({"data": 1}, jax.devices()[:1])
    one = ib_generalization._fit(smoke, run, "constrained", 4, 2, 2)
    for name in ("gap", "I(X;Z|Y), mc", "weight norm", "multiplier", "draw", "decay"):
        assert eight[name].shape == (2, 1, 3)
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-3, atol=1e-5)
    # Dual ascent: the multiplier is the sum of what four batches of 20 lacked.
    lacking = eight["multiplier"] / smoke.multiplier_rate / smoke.epochs
    assert (lacking < smoke.target).all()
    assert (lacking > smoke.target - np.log(20)).all()
    # What a setting's networks know of the training set is one number for all data draws.
    parameters = eight[ib_generalization.PARAMETERS]
    np.testing.assert_array_equal(parameters[0], parameters[1])
    assert np.unique(parameters[0]).size == 3


def population(draws=4):
    """Two depths, three decays, two widths: the gap follows I(X;Z|Y) in a depth, not between."""
    draw, layers, decay, width = (x.ravel() for x in np.indices((draws, 2, 3, 2)))
    noise = np.random.default_rng(0).normal(size=(len(ib_generalization.MEASURES), len(draw)))
    pool = {name: np.exp(x) for name, x in zip(ib_generalization.MEASURES, noise, strict=True)}
    within = decay + 0.5 * width
    pool |= {
        "gap": within + 5.0 * layers + 100.0 * draw,
        ib_generalization.REPRESENTATION: 1 + within + 5.0 * (1 - layers),
        ib_generalization.PARAMETERS: np.ones(len(draw)),
        "draw": draw,
        "decay": decay,
        "layers": 2 + 2 * layers,
        "width": 16 * (1 + width),
        "multiplier": np.full(len(draw), -1.0),
        "training loss": np.ones(len(draw)),
        "training accuracy": np.ones(len(draw)),
    }
    return {name: x for name, x in pool.items() if name not in ib_generalization.SUMS}


def test_networks_that_diverged_or_do_not_fit_are_left_out(smoke):
    config = smoke.copy_and_resolve_references().unlock()
    config.least_accuracy = 0.85
    part = {"gap": np.array([0.1, np.nan, 0.3, 0.4]), "layers": np.full(4, 2)}
    part["training accuracy"] = np.array([0.9, 0.9, 0.8, 0.85])
    part |= {
        name: np.array([1.0, 2.0, 3.0, 5.0])
        for name in ib_generalization.MEASURES
        if name not in ib_generalization.SUMS
    }
    pool = ib_generalization._pool(config, [part, part])
    assert pool["kept"].tolist() == [True, False, False, True] * 2
    kept = ib_generalization._part(pool, "2 layers")
    np.testing.assert_allclose(kept["sum"], [2, 10] * 2)
    np.testing.assert_allclose(kept["gap"], [0.1, 0.4] * 2)


def test_depths_are_judged_apart_and_together():
    config, *_ = load("configs/ib_generalization.py:default", [], CHECKOUT)
    pool = ib_generalization._pool(config, [population()])
    found = {
        "plain": {
            name: ib_generalization._correlations(config, ib_generalization._part(pool, name))
            for name in ("2 layers", "4 layers", "all depths")
        }
    }
    measured = {name: of[ib_generalization.REPRESENTATION] for name, of in found["plain"].items()}
    for name in ("2 layers", "4 layers"):
        assert measured[name]["single"] == pytest.approx([1.0] * 4)
        assert measured[name]["within decays"] == pytest.approx([1.0] * 4)
    assert max(measured["all depths"]["single"]) < 0
    of_sum = found["plain"]["4 layers"][ib_generalization.SUM]["single"]
    assert of_sum == pytest.approx([1.0] * 4)  # scaled, a constant more
    claims = ib_generalization._claims(config, found)
    verdicts = {claim.claim: claim.verdict for claim in claims}
    ending = "I(X;Z|Y) orders networks as the gap does (Spearman in a draw)"
    assert verdicts[f"plain, 4 layers: {ending}"] == "held"
    assert verdicts[f"plain, all depths: {ending}"] == "not held"
    assert not any("2 layers" in claim for claim in verdicts)
    columns = {row.group for row in ib_generalization._correlation_rows(config, found)}
    assert {"2 layers: Spearman, by draw", "first 3 draws, pooled"} <= columns
    run = Run()
    ib_generalization._draw_correlations(run, found)
    assert len(ib_generalization._notes(config, {"constrained": pool})) == 6


def test_a_population_without_networks_is_left_out():
    config, *_ = load("configs/ib_generalization.py:default", [], CHECKOUT)
    few = population() | {"training accuracy": np.zeros(48)}
    pool = ib_generalization._pool(config, [few])
    part = ib_generalization._part(pool, "4 layers")
    assert ib_generalization._correlations(config, part) == {}
    found = {"plain": {"4 layers": {}, "all depths": {}}}
    assert ib_generalization._claims(config, found) == []


def test_one_data_draw_is_refused(smoke):
    with pytest.raises(UsageError, match="two data draws"):
        ib_generalization.main(smoke, Run(seeds=1))


@pytest.mark.parametrize("preset", ["smoke", "default", "full", "paper"])
def test_presets_load(preset):
    config, *_ = load(f"configs/ib_generalization.py:{preset}", [], CHECKOUT)
    train, test, fresh = ib_generalization._blobs(config.blobs, 0)
    assert len(train[0]) == config.blobs.train
    assert len(test[1]) == config.blobs.test
    assert fresh[0].shape == (config.blobs.fresh, 2)
    assert not np.isin(fresh[0][:, 0], train[0][:, 0]).any()
    if preset == "paper":
        assert ib_generalization._network_sizes(config, 256, 4) == (2, 256, 256, 128, 128, 5)
        assert ib_generalization._network_sizes(config, 32, 3) == (2, 32, 32, 16, 5)
