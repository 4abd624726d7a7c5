"""The smoke preset, interrupted and resumed; the paper's network; presets."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import ib_lossy_compression
from rlib import information
from rlib.experiment import Run, judge
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT
from rlib.experiment.start import run_guarded


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ib_lossy_compression") / "run"
    arguments = ["--config=configs/ib_lossy_compression.py:smoke", f"--workdir={workdir}"]
    main = ib_lossy_compression.main
    with pytest.MonkeyPatch.context() as patch:
        real = ib_lossy_compression._codes

        def failing(*args):
            raise RuntimeError("injected")

        patch.setattr(ib_lossy_compression, "_codes", failing)
        assert run_guarded(main, "ib_lossy_compression", arguments, ()) == 1
        patch.setattr(ib_lossy_compression, "_codes", real)
        done = sorted(path.stem for path in (workdir / "cache/gaussians").rglob("*.npz"))
        assert done == sorted([*["seed0", "seed1"] * 5, "tuned"])

        def forbidden(*args):
            raise AssertionError("computed again")

        drawn = ib_lossy_compression._normal_pairs
        patch.setattr(
            ib_lossy_compression,
            "_normal_pairs",
            lambda key, truth, d, n, turned: (
                forbidden() if turned else drawn(key, truth, d, n, turned)
            ),
        )
        assert run_guarded(main, "ib_lossy_compression", arguments, ()) == 0
    return json.loads((workdir / "report.json").read_text())


def test_every_part_is_reported(report):
    metrics = {row["metric"].split(":")[0] for row in report["rows"]}
    assert metrics == {"Gaussians", "Pictures", "digits, noise 0.001", "Test accuracy at the end"}
    text = " ".join(claim["claim"] for claim in report["claims"])
    for part in ("best critic", "slope", "offset", "raw pixels", "independent", "KSG", "shuffled"):
        assert part in text
    assert report["figures"] == [
        "figures/gaussians.png",
        "figures/pictures.png",
        "figures/path_digits_0_001.png",
    ]
    assert all(np.isfinite(row["values"]).all() for row in report["rows"])


def test_slopes_and_offsets_are_those_of_lines():
    truth = (0.0, 2.0, 5.0)
    estimates = np.stack([0.5 * np.asarray(truth) - 1, 2 * np.asarray(truth) + 3])
    slope, offset = ib_lossy_compression._line(estimates, truth)
    np.testing.assert_allclose(slope, [0.5, 2])
    np.testing.assert_allclose(offset, [-1, 3])
    broken = ib_lossy_compression._line(estimates * [[np.nan], [1]], truth)
    np.testing.assert_allclose(broken, [[np.nan, 2], [np.nan, 3]])
    np.testing.assert_allclose(
        ib_lossy_compression._rms(estimates, truth)[0], np.sqrt((1 + 4 + 3.5**2) / 3)
    )


def test_critics_are_tuned_by_their_error_on_a_draw_of_their_own(monkeypatch):
    config = load("configs/ib_lossy_compression.py:smoke", [], CHECKOUT)[0].unlock()
    config.critics.learning_rates = (1.0, 2.0)
    seen = []

    def draw(seed):
        seen.append(seed)
        return seed, None

    def learnt(keys, seed, _, rate, **options):  # rate 2 is right at the first look
        return np.array([[2 - rate, 9.0], [4 - rate, 9.0]])

    monkeypatch.setattr(ib_lossy_compression, "_learnt", learnt)
    found = ib_lossy_compression._critics(Run(), "cell", "nwj", config, draw, 3, (0.0, 2.0))
    assert (found["rate"], found["steps"]) == (2.0, 2)
    np.testing.assert_array_equal(found["estimates"], [[0, 2]] * 3)
    assert seen == [ib_lossy_compression.TUNING_SEED] * 2 + [0, 1, 2]


def test_the_convolutional_part_is_followed(monkeypatch):
    config = load("configs/ib_lossy_compression.py:paper", [], CHECKOUT)[0].unlock()
    draw = np.random.default_rng(0)  # MNIST is not stored

    def made(name, split):
        return draw.random((40, 6, 6, 1), np.float32), np.arange(40, dtype=np.int32) % 4

    monkeypatch.setattr(ib_lossy_compression.data, "images", made)
    ib_lossy_compression._images.cache_clear()
    small = {"epochs": 2, "every": 1, "batch": 20, "dim": 2, "code": "pca"}
    config.mnist.update({**small, "channels": (2,), "widths": ()})
    found = ib_lossy_compression._follower(config.mnist, 1e-3, ["ksg"])(0)
    ib_lossy_compression._images.cache_clear()
    assert found["ksg"].shape == (3, 2, 2)  # looks, input and label, layers
    assert np.isfinite(found["ksg"]).all()
    assert found["loss"].shape == (3,)


def test_the_papers_network_has_the_papers_layers():
    options = load("configs/ib_lossy_compression.py:paper", [], CHECKOUT)[0].mnist

    def outputs(key, images):
        sizes = {"channels": options.channels, "widths": options.widths}
        network = information.NoisyClassifier(images.shape[1:], 10, rngs=nnx.Rngs(key), **sizes)
        return network(images, key)

    layers = jax.eval_shape(outputs, jax.random.key(0), np.zeros((5, 28, 28, 1), np.float32))
    shapes = [layer.shape for layer in layers]
    assert shapes == [(5, 13, 13, 8), (5, 5, 5, 16), (5, 1, 1, 32), (5, 32), (5, 10)]
    assert len(ib_lossy_compression._layer_names(options)) == len(shapes)


@pytest.mark.parametrize("preset", ["smoke", "default", "full", "paper"])
def test_presets_load(preset):
    config, *_ = load(f"configs/ib_lossy_compression.py:{preset}", [], CHECKOUT)
    parts = {name: config[name] for name in ("digits", "mnist") if config[name].epochs > 0}
    assert ib_lossy_compression._costs(Run(), config, ["kl", "nwj"], parts)


def test_what_is_not_a_number_leaves_a_claim_open():
    values = ib_lossy_compression._clip([np.nan, -np.inf, 1.0])
    assert np.isnan(values[0]) and values[1:] == [-float(np.finfo(np.float32).max), 1.0]
    assert judge("a", values, at_most=0).verdict == "inconclusive"
