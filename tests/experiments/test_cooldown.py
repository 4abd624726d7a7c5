"""The smoke preset, interrupted and resumed; what a method draws and weights; the norms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import cooldown
from rlib import data
from rlib.experiment import Run, UsageError
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT


def config_of(preset):
    config, *_ = load(f"configs/cooldown.py:{preset}", [], CHECKOUT)
    return config


def test_every_method_and_claim_is_there(smoke):
    methods = config_of("smoke").methods
    rows = {row["method"] for row in smoke["rows"] if row["metric"] == cooldown.LOSS}
    assert rows == set(methods)
    text = " ".join(claim["claim"] for claim in smoke["claims"])
    for part in ("over-sampling", "by size", "increasing", "gradual", "UniMax", "squares"):
        assert part in text
    assert len(smoke["claims"]) == 21


@pytest.fixture(scope="module")
def study():
    return cooldown.Study(config_of("smoke"), Run())


def test_methods_differ_where_they_should(study):
    batch = lambda name: next(study.stream(study.method(name), 0))
    drawn, by_size, weighted = (batch(name) for name in ("tau=5", "tau=1", "scalarised"))
    np.testing.assert_array_equal(batch("cooldown")["tokens"], drawn["tokens"])
    np.testing.assert_array_equal(batch("increasing")["tokens"], by_size["tokens"])
    np.testing.assert_array_equal(weighted["tokens"], by_size["tokens"])
    assert set(drawn["weight"]) == set(by_size["weight"]) == {1.0}
    expected = data.scalarization_weights(study.sizes, 5.0).astype(np.float32)
    plain = data.mixture(study.config.domains, batch_size=8, seed=0, length=study.config.length)
    np.testing.assert_array_equal(weighted["weight"], expected[next(iter(plain))["domain"]])


def test_the_weighted_loss_divides_by_the_number_of_sequences(study):
    rows = study.held_out[0]
    plain = study.loss(study.params, study.frozen, {"tokens": rows, "weight": np.ones(4)}, None)
    twice = study.loss(
        study.params, study.frozen, {"tokens": rows, "weight": np.full(4, 2.0)}, None
    )
    np.testing.assert_allclose(twice[0], 2 * plain[0], rtol=1e-6)


def test_moments_are_of_single_sequences(study):
    moments = study.moments(study.params, study.frozen)
    grad = jax.jit(jax.grad(lambda p, batch: study.loss(p, study.frozen, batch, None)[0]))
    for i, name in enumerate(study.config.domains):
        rows = study._some(name, "train", study.config.moments)
        squares = []
        for row in rows:
            batch = {"tokens": row[None], "weight": jnp.ones(1)}
            squares.append(float(optax.tree.norm(grad(study.params, batch))) ** 2)
        np.testing.assert_allclose(moments[i], np.mean(squares), rtol=1e-4)


def test_a_gradual_schedule_goes_from_high_to_low_and_unknown_methods_are_refused(study):
    tau, last = study.method("gradual").temperature, study.config.steps - 1
    np.testing.assert_allclose([tau(0), tau(last / 2), tau(last)], [5.0, 3.0, 1.0])
    for name in ("tau=5-sdg", "calm"):
        with pytest.raises(UsageError, match="no method"):
            study.method(name)


def test_norms_are_recorded_in_order():
    tx = cooldown.record_norms(3)
    state = tx.init(None)
    for size in (3.0, 1.0):
        grads, state = tx.update({"w": jnp.array([size, 0.0])}, state)
    assert grads["w"][0] == 1.0
    np.testing.assert_array_equal(state.norms, [3.0, 1.0, 0.0])


@pytest.mark.parametrize("preset", ["smoke", "default", "full"])
def test_presets_load(preset):
    config = config_of(preset)
    assert config.switch * 2 == config.steps
    assert set(config.domains) <= set(data.names())
