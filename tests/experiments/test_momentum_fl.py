"""The smoke preset, interrupted and resumed; settings, splits, bytes; N and K as numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import momentum_fl
from rlib import federated
from rlib.experiment import Run, UsageError
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT


def config_of(preset):
    config, *_ = load(f"configs/momentum_fl.py:{preset}", [], CHECKOUT)
    return config


def test_every_method_and_claim_is_there(smoke):
    methods = set(config_of("smoke").methods)
    rows = lambda start: {r["method"] for r in smoke["rows"] if r["metric"].startswith(start)}
    assert rows("Test accuracy, settings chosen") == rows("Test accuracy, published") == methods
    assert rows("Test accuracy by beta") == {"fedavg-m, beta=0.1", "scaffold-m, beta=0.1"}
    assert (
        rows("Quadratics, exact")
        == rows("Quadratics, noise")
        == methods
        - {
            "fedprox",
            "server-momentum",
        }
    )
    assert "scaffold-m-vr-half" in rows("Quadratics, settings chosen, noise 3")
    text = " ".join(claim["claim"] for claim in smoke["claims"])
    for title in momentum_fl.TITLES.values():
        assert title in text
    for part in ("bytes", "published", "85%", "spread", "1/N", "1/K", "beta eta", "gradients"):
        assert part in text
    assert len(smoke["claims"]) == 12 + 11 + 3 + 4
    assert {figure.split("/")[1] for figure in smoke["figures"]} == {
        "accuracy.png",
        "beta.png",
        "quadratics.png",
        "splits.png",
    }


def test_bytes_are_those_of_the_vectors_that_travel(smoke):
    sent = {r["method"]: r["values"][0] for r in smoke["rows"] if r["metric"].startswith("Kilo")}
    model = 4 * (64 * 32 + 32 + 32 * 10 + 10) / 1e3
    vectors = {"fedavg": 2, "fedprox": 2, "server-momentum": 2, "fedavg-m": 3, "fedavg-m-vr": 4}
    vectors |= {"scaffold": 4, "scaffold-m": 5, "scaffold-m-vr": 6}
    for method, number in vectors.items():
        assert sent[method] == pytest.approx(number * model, abs=0.01)


@pytest.mark.parametrize("preset", ["smoke", "default", "full", "paper"])
def test_presets_load_and_methods_try_as_many_settings(preset):
    config = config_of(preset)
    for place in momentum_fl.PLACES:
        options = config[place]
        assert options.rounds == 0 or options.rounds % options.looks == 0
        thirds = {"beta": options.betas, "mu": options.mus, "momentum": options.momenta}
        tried = [momentum_fl.settings(m, options, options.servers, thirds) for m in config.methods]
        assert len({len(each) for each in tried}) == 1
        assert all(len(set(each)) == len(each) for each in tried)
    gain = config.quadratics.gain
    thirds = {"beta": gain.betas}
    assert len(momentum_fl.settings("scaffold", gain, gain.gammas, thirds)) == len(
        momentum_fl.settings("scaffold-m", gain, gain.gammas, thirds)
    )


def test_clients_hold_the_labels_that_the_split_says():
    config = config_of("default")
    labels = momentum_fl._problem(config.full).train["y"]
    kinds = lambda place: [
        len(np.unique(labels[part])) for part in momentum_fl._parts(config[place], labels, 0)
    ]
    assert kinds("full") == [1] * 10
    with pytest.raises(UsageError, match="9 clients for 10 labels"):
        momentum_fl._parts(ConfigDict({"clients": 9, "split": "label"}), labels, 0)
    assert len(kinds("partial")) == 20
    assert max(kinds("partial")) <= 4
    assert len(kinds("noisy")) == 100
    with pytest.raises(UsageError, match="shards or dirichlet"):
        momentum_fl._parts(ConfigDict({"clients": 2, "split": "even"}), labels, 0)


@pytest.fixture(scope="module")
def quadratics():
    return momentum_fl.Quadratics(Run(), config_of("smoke"), momentum_fl.QUADRATIC)


def test_numbers_of_clients_and_steps_can_be_traced(quadratics):
    """Clients and steps that are padding change nothing."""
    places, clients, steps, rounds = 5, 3, 2, 4
    key = momentum_fl.named_key(0, "quadratics")
    lane = (0.1, 0.3, 0.2, 0.0, clients, steps)
    shape = (places, places, 4, rounds)
    found = quadratics._run("scaffold-m", shape, [lane], key[None])["curve"][0]
    examples, curvature, minimum = quadratics.problem(
        jax.random.split(key)[0], places, clients, 0.0
    )
    a, b = (np.asarray(examples[name], float)[:clients] for name in ("a", "b"))
    np.testing.assert_allclose(curvature, a.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(minimum, (a * b).sum(axis=0) / a.sum(axis=0), rtol=1e-5)
    x = np.zeros(a.shape[1])
    own, c, g = np.zeros_like(a), np.zeros_like(x), np.zeros_like(x)
    for expected in found:
        y, raw = np.tile(x, (clients, 1)), np.zeros_like(a)
        for _ in range(steps):
            gradient = a * (y - b)
            raw += gradient / steps
            y -= 0.1 * (0.2 * (gradient - own + c) + 0.8 * g)
        g, own = (x - y).mean(axis=0) / (0.1 * steps), raw
        c, x = own.mean(axis=0), x - 0.3 * g
        np.testing.assert_allclose(expected, np.sum((a * (x - b)).mean(axis=0) ** 2), rtol=1e-4)


def test_methods_that_share_a_program_are_themselves():
    """With mu and momentum 0 the program of FedProx and server momentum is FedAvg's."""
    loss = lambda x, batch, key: batch["a"] * (x - batch["b"]) ** 2 / 2
    examples = {"a": jnp.array([1.0, 3.0]), "b": jnp.array([-1.0, 1.0])}
    held = federated.client_data(examples, [np.array([0]), np.array([1])])

    def end(name, **given):
        made = momentum_fl.algorithm(name, 5, 0.1, 0.5, **given)
        rounds = federated.make_rounds(made, loss, federated.LocalWork(1, steps=5), 2)
        return federated.simulate(rounds, jnp.float32(4.0), held, 3).state.params

    shared = jax.jit(lambda mu, momentum: end("fedavg", mu=mu, momentum=momentum))
    plain = jax.jit(lambda: end("fedavg-m", beta=1.0))()
    assert float(plain) == pytest.approx(0.5399437346, rel=1e-5)  # the closed form
    assert float(shared(0.0, 0.0)) == pytest.approx(float(plain), rel=1e-5)
    # Client i ends at its share of the way to the minimum of its loss and the proximal term.
    x, a, b = 4.0, np.array([1.0, 3.0]), np.array([-1.0, 1.0])
    for _ in range(3):
        minimum = (a * b + 0.5 * x) / (a + 0.5)
        x = np.mean(minimum + (1 - 0.1 * (a + 0.5)) ** 5 * (x - minimum))
    assert float(shared(0.5, 0.0)) == pytest.approx(x, rel=1e-5)
    x, velocity = 4.0, 0.0
    for _ in range(3):
        velocity = 0.5 * velocity + np.mean((1 - (1 - 0.1 * a) ** 5) * (x - b))
        x = x - velocity
    assert float(shared(0.0, 0.5)) == pytest.approx(x, rel=1e-5)
    with pytest.raises(UsageError, match="no method 'fedcm'"):
        momentum_fl.algorithm("fedcm", 5, 0.1, 0.5)


def test_rounds_to_the_target_and_accuracy_at_equal_bytes():
    options = ConfigDict({"rounds": 8, "looks": 4, "tail": 2})
    run = lambda accuracy, sent: {
        "chosen": {"accuracy": np.array(accuracy), "bytes": np.array([sent])}
    }
    found = {
        "fedavg": run([[0.1, 0.2, 0.9, 0.8], [0.1, 0.2, 0.3, 0.4]], [1.0, 1.0]),
        "fedavg-m": run([[0.1, 0.5, 0.7, 0.9]] * 2, [1.0, 3.0]),
    }
    to = momentum_fl._rounds_to(ConfigDict({"target": 0.85}), options, found["fedavg"])
    np.testing.assert_array_equal(to, [6, 9])
    at = lambda method: momentum_fl._at_bytes(options, found, method)
    np.testing.assert_allclose(at("fedavg"), [0.85, 0.35])
    np.testing.assert_allclose(at("fedavg-m"), [0.3, 0.3])  # half of the rounds


def test_a_slope_is_the_power():
    errors = np.array([[8.0, 4.0], [2.0, 4.0]])
    np.testing.assert_allclose(momentum_fl._slope(errors, (1, 4)), [-1, 0], atol=1e-12)
