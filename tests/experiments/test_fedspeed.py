"""The smoke preset, interrupted and resumed; what is tuned, drawn and watched."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import fedspeed
from rlib import federated
from rlib.experiment import TUNING_SEED
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT


def config_of(preset):
    config, *_ = load(f"configs/fedspeed.py:{preset}", [], CHECKOUT)
    return config


def test_every_method_and_claim_is_there(smoke):
    rows = {row["method"] for row in smoke["rows"] if row["metric"] == fedspeed.ACCURACY}
    assert rows == {title for title, _ in fedspeed.METHODS.values()}
    text = " ".join(claim["claim"] for claim in smoke["claims"])
    for title, _ in fedspeed.METHODS.values():
        assert title in text
    for part in ("equal gradients", "published", "nearer", "gap", "bytes", "larger", "alpha"):
        assert part in text
    assert len(smoke["claims"]) == 2 * 13 + 8 + 13


def test_a_method_of_one_gradient_takes_twice_as_many_steps_too(smoke):
    groups = lambda title: {
        row["group"]
        for row in smoke["rows"]
        if row["metric"] == fedspeed.ACCURACY and row["method"] == title
    }
    assert groups("FedSpeed") == groups("FedSAM") == {"K=1", "K=2"}
    assert groups("FedAvg") == {"K=1", "K=2", "K=4"}


def test_scaffold_alone_sends_two_models(smoke):
    sent = {row["method"]: row["values"][0] for row in smoke["rows"] if "Bytes" in row["metric"]}
    model = 4 * (64 * 8 + 8 + 8 * 10 + 10)
    assert sent.pop("SCAFFOLD") == 2 * model
    assert set(sent.values()) == {model}


@pytest.fixture(scope="module")
def study():
    return fedspeed.Study(config_of("smoke"), range(1), fedspeed.METHODS)


def test_settings_are_chosen_on_examples_that_no_client_holds(study):
    parts, kept = study.split(TUNING_SEED)
    train, held = study.problem.train, np.concatenate(parts)
    assert kept["x"].shape == study.problem.test["x"].shape
    rows = {row.tobytes() for row in train["x"][held]}
    assert len(rows & {row.tobytes() for row in kept["x"]}) <= 1  # few digits occur twice
    _, test = study.split(0)
    assert test is study.problem.test
    shapes = [jax.tree.map(jnp.shape, study.draw(seed)) for seed in (0, TUNING_SEED)]
    assert shapes[0] == shapes[1]
    assert set(np.asarray(study.draw(TUNING_SEED)[0].sizes)) == {len(parts[0])}
    assert len(parts[0]) < study.config.size


def test_the_spread_is_that_of_the_clients_models(study):
    """Three clients, taken one by one, whatever their message is."""
    setting = {"rate": 0.3, "prox": 10.0, "ascent": 0.1, "proximal": 0.1, "beta": 0.5, "mixing": 1}
    work = federated.LocalWork(4, steps=2)
    held, _ = study.draw(0)
    held = held._replace(rows=held.rows[:3], sizes=held.sizes[:3])
    params = study.initial(jax.random.key(0))
    found = {}
    for method in ("fedavg", "fedspeed", "fedspeed-sampled", "scaffold", "fedavg-m"):
        algorithm = study.algorithm(method, setting, 0.3, 2)
        rounds = federated.make_rounds(algorithm, study.problem.loss, work, 3)
        _, metrics = jax.jit(rounds.step)(rounds.init(params), held)
        found[method] = metrics["square"] - metrics["square of the mean"]
    plain = federated.fedavg(optax.sgd(0.3))._replace(
        mix=lambda messages, weights: messages, apply=lambda x, s, d, _: (x, s, {"d": d})
    )
    rounds = federated.make_rounds(plain, study.problem.loss, work, 3)
    _, metrics = jax.jit(rounds.step)(rounds.init(params), held)
    d = np.concatenate([x.reshape(3, -1) for x in jax.tree.leaves(metrics["d"])], axis=1)
    expected = np.mean(np.sum((d - d.mean(axis=0)) ** 2, axis=1))
    np.testing.assert_allclose([found["fedavg"], found["scaffold"]], expected, rtol=1e-4)
    np.testing.assert_allclose(found["fedavg-m"], expected / 4, rtol=0.2)  # beta 0.5, no momentum
    np.testing.assert_allclose(found["fedspeed"], found["fedspeed-sampled"], rtol=1e-4)


def test_rounds_to_the_target_and_what_is_never_reached():
    config = config_of("smoke")
    runs = [{"test": np.array([0.0, 0.2, 0.0, 0.3])}, {"test": np.zeros(4)}]
    np.testing.assert_array_equal(fedspeed._reached(config, runs), [2, 5])


@pytest.mark.parametrize("preset", ["smoke", "default", "full", "paper"])
def test_presets_load_and_all_methods_have_as_many_trials(preset):
    config = config_of(preset)
    assert set(config.trials) == set(fedspeed.METHODS)
    counts = {len(list(itertools.product(*grid.values()))) for grid in config.trials.values()}
    assert len(counts) == 1
    assert (counts == {1}) == (config.draws == 0)
    assert config.rounds % config.looks == 0
