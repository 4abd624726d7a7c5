"""The smoke preset, interrupted and resumed; the published table by size; the network in `full`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import econtrol
from rlib import parallel
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT


def test_every_method_claim_and_figure_is_there(smoke):
    assert {row["method"] for row in smoke["rows"]} == {
        "sgd",
        "naive",
        "ec",
        "ef21",
        "ef21-sgdm",
        "econtrol",
    }
    text = " ".join(claim["claim"] for claim in smoke["claims"])
    for part in ("heterogeneity", "noise, n=2", "speed-up", "gain", "digits"):
        assert part in text
    assert smoke["figures"] == ["figures/least_squares.png", "figures/digits.png"]


@pytest.fixture(scope="module")
def default():
    return load("configs/econtrol.py:default", [], CHECKOUT)[0]


@pytest.mark.parametrize(
    ("method", "expected"),
    [("naive", 26.0), ("ec", 1.0e-1), ("ef21", 0.0), ("econtrol", 0.0), ("sgd", 0.0)],
)
def test_the_specifications_table_without_noise(default, method, expected):
    """Squared distance after 3000 rounds at step 0.01, the same draw of b."""
    transform = econtrol._transforms(econtrol._codec(default), default)[method]()
    last = econtrol._distances(default, transform, 5, 10.0, [0.01], 0.0, 1)[0, 0, -1]
    assert last == pytest.approx(expected, rel=0.05, abs=1e-8)


def test_noise_separates_ef21_from_econtrol_as_in_the_specifications_table(default):
    """n = 4, noise 10: EF21 0.126, EControl 0.0196, SGD 0.0157; five draws."""
    floors = {}
    for method in ("sgd", "ef21", "econtrol"):
        found = econtrol._distances(
            default,
            econtrol._transforms(econtrol._codec(default), default)[method](),
            4,
            10.0,
            [default.squares.noisy_gamma],
            10.0,
            5,
        )[0]
        floors[method] = found[:, -500:].mean()
    assert 4 < floors["ef21"] / floors["econtrol"] < 10
    assert 0.8 < floors["econtrol"] / floors["sgd"] < 2


def test_messages_vanish_for_econtrol_and_ef21_but_not_for_ec(default):
    """At the optimum estimates are the workers' own gradients; EC's errors go on for ever."""
    a, b, _ = (jnp.asarray(v, jnp.float32) for v in econtrol._problem(default, 0, 5, 10.0))
    last = {}
    for method in ("ec", "ef21", "econtrol"):
        transform = econtrol._transforms(econtrol._codec(default), default)[method]()
        tx = parallel.on_one_device(transform, 5, econtrol.AXIS)

        def step(carry, _, tx=tx):
            x, state = carry
            update, new = tx.update(a[:, None] * (a[:, None] * x - b), state, x)
            sent = [
                jnp.linalg.norm(p.value - q.value)
                for p, q in ((new.estimate, state.estimate), (new.error, state.error))
            ]
            return (x - 0.01 * update, new), jnp.stack(sent)

        start = (jnp.zeros(60), tx.init(jnp.zeros(60)))
        run = jax.jit(lambda start, step=step: jax.lax.scan(step, start, None, length=3000)[1])
        last[method] = run(start)[-1]
    for method in ("ef21", "econtrol"):
        assert last[method].max() < 1e-3
    assert last["ec"][1] > 1


def test_the_problem_is_the_published_one(default):
    a, b, optimum = econtrol._problem(default, 0, 5, 10.0)
    assert np.square(optimum).sum() == pytest.approx(66.5, abs=0.05)
    gradient = (a[:, None] * (a[:, None] * optimum - b)).sum(axis=0)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


@pytest.mark.parametrize("preset", ["full", "paper"])
def test_the_network_trains_on_compressed_messages(preset, monkeypatch):
    config = load(f"configs/econtrol.py:{preset}", [], CHECKOUT)[0].unlock()
    small = {"rounds": 4, "looks": 2, "batch": 4, "workers": 4, "groups": 4}
    config.resnet.update({**small, "widths": (4, 8, 8, 8) if preset == "paper" else (4, 8)})
    if preset == "paper":  # CIFAR-10 is not stored: pictures of its shape
        draw = np.random.default_rng(0)
        made = draw.random((40, 32, 32, 3), np.float32), np.arange(40) % 10
        images = lambda name, split: made
    else:
        real = econtrol.data.images
        images = lambda name, split: tuple(array[::50] for array in real(name, split))
    monkeypatch.setattr(econtrol.data, "images", images)
    result = econtrol._trainer(config, "resnet", "econtrol", lambda: None)(0.1, 0)
    assert result["loss"].shape == (2,)
    assert np.isfinite(result["loss"]).all()


@pytest.mark.parametrize("preset", ["smoke", "default", "full", "slow_network", "paper"])
def test_presets_load(preset):
    config, *_ = load(f"configs/econtrol.py:{preset}", [], CHECKOUT)
    assert econtrol._costs(
        econtrol.Run(), config, ["econtrol"], econtrol._learning_problems(config)
    )
