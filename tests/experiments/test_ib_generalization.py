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

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ib_generalization") / "run"
    arguments = ["--config=configs/ib_generalization.py:smoke", f"--workdir={workdir}"]
    real = ib_generalization._fit

    def failing(config, run, series, *size):
        if series == "constrained":
            raise RuntimeError("injected")
        return real(config, run, series, *size)

    def only_the_rest(config, run, series, *size):
        assert series == "constrained"  # the plain one was done: not computed again
        return real(config, run, series, *size)

    run = lambda: run_guarded(ib_generalization.main, "ib_generalization", arguments, ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ib_generalization, "_fit", failing)
        assert run() == 1
        patch.setattr(ib_generalization, "_fit", only_the_rest)
        assert run() == 0
    return json.loads((workdir / "report.json").read_text())


def test_every_measure_claim_and_figure_is_there(report):
    assert set(ib_generalization.MEASURES) <= {row["method"] for row in report["rows"]}
    text = " ".join(claim["claim"] for claim in report["claims"])
    for part in ("plain", "constrained", "I(X;Z|Y)", "I(phi;S)", "weight norm", "parameter count"):
        assert part in text
    assert report["figures"] == ["figures/correlations.png", "figures/networks.png"]
    assert all(np.isfinite(row["values"]).all() for row in report["rows"])


@pytest.fixture(scope="module")
def smoke():
    return load("configs/ib_generalization.py:smoke", [], CHECKOUT)[0]


def test_eight_devices_are_one(smoke):
    """Three decays make twelve networks, which eight devices do not divide."""
    config = smoke.copy_and_resolve_references().unlock()
    config.decays = (0.0, 0.01, 0.1)
    found = []
    for size in (8, 1):
        run = Run()
        run.mesh = lambda config, size=size: parallel.make_mesh(
            {"data": size}, jax.devices()[:size]
        )
        found.append(ib_generalization._fit(config, run, "constrained", 4, 2, 2))
    for name in ("gap", "I(X;Z|Y), mc", "weight norm", "multiplier", "draw", "decay"):
        assert found[0][name].shape == (2, 2, 3)
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=1e-3, atol=1e-5)
    # Dual ascent: the multiplier is the sum of what six batches of 20 lacked.
    lacking = found[0]["multiplier"] / config.multiplier_rate / config.epochs
    assert (lacking < config.target).all()
    assert (lacking > config.target - np.log(20)).all()
    # What a setting's networks know of the training set is one number for all data draws.
    parameters = found[0][ib_generalization.PARAMETERS]
    np.testing.assert_array_equal(parameters[0], parameters[1])
    assert np.unique(parameters[0]).size == 6


def test_networks_that_diverged_or_do_not_fit_are_left_out(smoke):
    config = smoke.copy_and_resolve_references().unlock()
    config.least_accuracy = 0.85
    part = {name: np.array([1.0, 2.0, 3.0, 5.0]) for name in ib_generalization.MEASURES}
    part |= {"gap": np.array([0.1, np.nan, 0.3, 0.4]), "draw": np.zeros(4)}
    part["training accuracy"] = np.array([0.9, 0.9, 0.8, 0.85])
    pool = ib_generalization._pool(config, [part, part])
    assert pool["kept"].tolist() == [True, False, False, True] * 2
    np.testing.assert_allclose(pool["sum"], [2, np.nan, np.nan, 10] * 2)


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
