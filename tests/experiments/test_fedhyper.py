"""The smoke preset, interrupted and resumed; settings, programs and counts of rounds."""

import jax
import numpy as np
import pytest

from experiments import fedhyper
from rlib import data
from rlib.experiment import Run, UsageError
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT


def config_of(preset, *changes):
    config, *_ = load(f"configs/fedhyper.py:{preset}", list(changes), CHECKOUT)
    return config


def test_every_method_claim_and_figure_is_there(smoke):
    rows = {
        row["method"] for row in smoke["rows"] if row["metric"].startswith("Accuracy by beta_0")
    }
    config = config_of("smoke")
    assert rows >= {*config.methods, *config.ablations, "g+cl, 3", "sl, 10"}
    text = " ".join(claim["claim"] for claim in smoke["claims"])
    for part in ("worst", "alpha_0", "fails", "bound 3", "tuned", "best rate", "term", "official"):
        assert part in text
    assert len(smoke["claims"]) == 39
    assert [name.split("/")[1] for name in smoke["figures"]] == [
        "accuracy.png",
        "rates.png",
        "tuned.png",
        "alpha.png",
    ]


@pytest.fixture(scope="module")
def study():
    return fedhyper.Study(config_of("smoke"), Run(only=["fedavg", "g+cl", "decay"]))


def test_bounds_of_one_leave_fedavg(study):
    """The same weights, split and batches whatever the method."""
    still = study.setting("g+cl", 0.1)._replace(alpha_bounds=(1.0, 1.0), beta_bounds=(1.0, 1.0))
    curves = {}
    for name, setting in (("g+cl", still), ("fedavg", study.setting("fedavg", 0.1))):
        curves[name] = study._curves(fedhyper.Job("", name, (setting,), 3))
    np.testing.assert_array_equal(curves["g+cl"]["accuracy"], curves["fedavg"]["accuracy"])
    np.testing.assert_allclose(curves["g+cl"]["beta"], 0.1)


def test_a_decay_of_zero_trains_in_the_first_round_only(study):
    stopped = study.setting("decay", 0.3, 0.0)
    accuracy = study._curves(fedhyper.Job("", "fedavg", (stopped,), 3))["accuracy"][0]
    np.testing.assert_array_equal(accuracy[1:], accuracy[0])


def test_seeds_change_the_split_and_the_weights(study):
    (weights, _, held, _), (other, _, moved, _) = (study.inputs(seed) for seed in (0, 1))
    assert not np.array_equal(held.rows, moved.rows)
    assert not np.array_equal(*(jax.random.key_data(key) for key in (weights, other)))


def test_official_settings_are_those_of_the_released_code(study):
    program, setting = study.ablation("g+cl official", 0.01)
    assert program == "g+cl official"
    assert setting.alpha_bounds == (0.8, 5.0) and setting.beta_bounds == (0.1, 10.0)
    assert setting.weight == pytest.approx(0.1 / study.config.sampled)
    assert study.ablation("g official bounds", 0.01)[1].alpha_bounds == (0.2, 5.0)


def test_methods_that_were_left_out_are_timed_when_a_run_goes_on(tmp_path, monkeypatch):
    config = config_of("smoke").unlock()
    config.timed = ("fedavg", "g", "g+cl")
    monkeypatch.setattr(fedhyper, "in_turns", lambda calls, n, between: np.ones((len(calls), n)))
    monkeypatch.setattr(fedhyper.Study, "jobs", lambda study, tuned: {})
    for only in (["fedavg", "g"], ["fedavg", "g", "g+cl"]):
        run = Run(str(tmp_path / "run"), only=only)
        assert list(fedhyper.Study(config, run).run_all({})["time"]) == only
        run.close()


def test_unequal_budgets_and_unknown_variants_are_refused(study):
    config = config_of("smoke", "--config.tuning.two=(0.1, 0.1, 2)")
    with pytest.raises(UsageError, match="differ in number"):
        fedhyper.Study(config, Run())
    with pytest.raises(UsageError, match="no ablation"):
        study.ablation("cl sideways", 0.01)
    with pytest.raises(UsageError, match="no method"):
        fedhyper.make_algorithm("fedyogi", study.setting("fedyogi", 0.1))


@pytest.mark.parametrize("preset", ["smoke", "default", "full", "paper"])
def test_presets_load(preset, monkeypatch):
    config = config_of(preset)
    for rate in (*config.small, config.good, config.large):
        assert rate in config.rates
    assert {config.gamma, config.repair} <= set(config.gammas)
    if preset == "paper":  # CIFAR-10 is not stored: pictures of its shape
        made = (np.zeros((50_000, 32, 32, 1), np.float32), np.arange(50_000, dtype=np.int32) % 10)
        monkeypatch.setattr(data, "images", lambda name, split: made)
    study = fedhyper.Study(config, Run())
    assert len(study.jobs({m: trials[0] for m, trials in study.trials.items()})) > 0
    assert study.local_steps == {"smoke": 2, "paper": 80}.get(preset, 10)
