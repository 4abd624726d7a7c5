"""The smoke preset, interrupted and resumed; the first order; what is counted in a program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import flash_attention as experiment
from kernels_pallas import flash_attention
from kernels_pallas.attention import bench
from kernels_pallas.attention.bench import Case
from rlib.experiment import Run, UsageError
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT


def config_of(preset):
    config, *_ = load(f"configs/flash_attention.py:{preset}", [], CHECKOUT)
    return config


def test_every_method_and_claim_is_there(smoke):
    config = config_of("smoke")
    of = lambda metric: {row["method"] for row in smoke["rows"] if row["metric"] == metric}
    for metric in (*experiment.ERRORS, experiment.MEMORY, experiment.SLOPE):
        assert of(metric) == set(config.methods)
    for metric in experiment.TIMES.values():
        assert of(metric) == set(config.methods) - {"reference"}
    assert of(experiment.LOSS) == set(config.train.methods)
    assert len(smoke["claims"]) == 22
    exact = [c for c in smoke["claims"] if c["bound"] == "<= 0"]
    assert [claim["verdict"] for claim in exact] == ["held"] * 3
    assert smoke["figures"] == ["figures/growth.png", "figures/agreement.png"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [13, 16])
def test_flash_attentions_order_is_attention(length, causal):
    case = Case(length, heads=4, kv_heads=2, size=8, causal=causal)
    q, k, v, dout = case.draw(1)
    results = [
        bench._with_gradients(attend, q, k, v, dout)
        for attend in (
            experiment.first_order(causal, 4),
            functools.partial(flash_attention, causal=causal, implementation="reference"),
        )
    ]
    expected = experiment._in_float64(case, 1)
    for first, formula, exact in zip(*results, expected, strict=True):
        np.testing.assert_allclose(first, formula, atol=2e-5)
        np.testing.assert_allclose(first[0], exact, atol=2e-5)


def test_operations_are_counted_inside_the_innermost_loop():
    def program(x):
        def inner(carry, _):
            return jax.jit(lambda c: jnp.exp(c) * 2 * c)(carry @ jnp.eye(3)), None

        def outer(carry, _):
            return jnp.exp(jax.lax.scan(inner, carry, None, length=2)[0]), None

        return jax.lax.scan(outer, x, None, length=5)[0]

    body = next(experiment._bodies(jax.make_jaxpr(program)(jnp.ones((2, 3))).jaxpr))
    names = [eqn.primitive.name for eqn in experiment._all(body)]
    assert names.count("exp") == 1 and names.count("mul") == 2
    assert len(experiment._products(body)) == 1


def test_one_method_alone_is_measured_and_drawn():
    config = config_of("smoke").unlock()
    config.time.lengths, config.memory.lengths = (32,), (16, 32)
    report = experiment.main(config, Run(only=["fa1"]))
    methods = {row.method for row in report.rows if not row.method.startswith("tiles")}
    assert methods == {"fa1"}
    assert any("two products and a quotient" in claim.claim for claim in report.claims)


def test_speeds_of_an_accelerator_are_rows(monkeypatch):
    config = config_of("smoke").unlock()
    config.methods, config.memory.lengths = ("fa1",), (16, 32)
    config.speed.update(tokens=64, hidden=32, size=16, lengths=(32,), causal=(True,), turns=2)
    monkeypatch.setattr(experiment.jax, "default_backend", lambda: "gpu")
    report = experiment.main(config)
    speeds = [row for row in report.rows if row.metric == experiment.SPEED]
    assert {row.method for row in speeds} >= {"ours: xla", bench.BASELINE, bench.EINSUM}
    groups = {row.group for row in speeds if row.method == bench.BASELINE}
    assert groups == {f"N=32, causal, {part}" for part in bench.PARTS}
    assert not any(row.published for row in speeds)
    assert "speeds are of an A100" in report.notes[-1]


def test_unknown_methods_are_refused():
    config = config_of("smoke").unlock()
    config.methods = ("fa2", "fa4")
    with pytest.raises(UsageError, match="fa4"):
        experiment.main(config)


@pytest.mark.parametrize("preset", ["smoke", "default", "full", "paper"])
def test_presets_load(preset):
    config = config_of(preset)
    assert config.tiles.n % max(config.tiles.sides) == 0
    assert set(config.train.methods) <= set(config.methods)
    assert config.speed.hidden % config.speed.size == 0
