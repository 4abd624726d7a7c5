"""The smoke preset, interrupted and resumed; the stages of a run."""

import numpy as np
import pytest

from experiments import onebit_adam
from rlib.experiment import Run
from rlib.experiment.config import as_stored, first_difference, load
from rlib.experiment.environment import CHECKOUT


def test_every_method_task_and_claim_is_there(smoke):
    rows = {(row["method"], row["group"]) for row in smoke["rows"]}
    assert {(m, "digits, loss") for m in onebit_adam.METHODS} <= rows
    assert ("onebit", "text, loss") in rows
    text = " ".join(claim["claim"] for claim in smoke["claims"])
    for part in ("onebit's final loss", "no-feedback", "no-mask", "28 times", "4.8 times"):
        assert part in text
    assert smoke["figures"] == ["figures/digits.png", "figures/text.png"]


def test_bytes_are_counted_in_the_compiled_programs(smoke):
    sent = {row["method"]: row["values"][0] for row in smoke["rows"] if row["group"] == "bytes"}
    parameters = 64 * 64 + 64 + 64 * 10 + 10
    assert sent["digits, warmup"] == pytest.approx(4 * (parameters + 2) * 2 * 7 / 8, rel=0.01)
    assert sent["digits, compressed"] < sent["digits, warmup"] / 10


@pytest.fixture
def task():
    config, *_ = load("configs/onebit_adam.py:smoke", [], CHECKOUT)
    return onebit_adam.Task(config, "digits", Run())


def test_the_automatic_warm_up_ends_and_the_steps_add_up(task):
    result = task.fit("unit", "onebit-auto", 0)
    assert len(result["loss"]) == task.options.steps
    fixed = task.fit("unit", "onebit", 0)
    assert fixed["warmup"] == task.options.warmup
    np.testing.assert_allclose(result["loss"][:4], fixed["loss"][:4], rtol=1e-5)


@pytest.mark.parametrize("preset", ["smoke", "default", "full", "slow_network", "one_worker"])
def test_presets_load(preset):
    config, *_ = load(f"configs/onebit_adam.py:{preset}", [], CHECKOUT)
    assert set(config.digits.methods) <= set(onebit_adam.METHODS)


@pytest.mark.parametrize("key", ["workers", "mesh.data"])
def test_the_number_of_workers_is_part_of_what_a_run_computes(key):
    eight, two = (
        as_stored(load("configs/onebit_adam.py:smoke", overrides, CHECKOUT)[0])
        for overrides in ([], [f"--config.{key}=2"])
    )
    assert (two["workers"], two["mesh.data"]) == (2, 2)
    assert first_difference(two, eight) == "workers=8 there, 2 here"
