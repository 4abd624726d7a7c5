"""The smoke preset, interrupted and resumed; what the claims read off curves made by hand."""

import json

import numpy as np
import pytest

from experiments import information_plane
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT
from rlib.experiment.start import run_guarded


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("information_plane") / "run"
    arguments = ["--config=configs/information_plane.py:smoke", f"--workdir={workdir}"]

    def failing(config):
        raise RuntimeError("injected")

    with pytest.MonkeyPatch.context() as patch:
        real = information_plane._bound
        patch.setattr(information_plane, "_bound", failing)
        assert run_guarded(information_plane.main, "information_plane", arguments, ()) == 1
        patch.setattr(information_plane, "_train", None)  # done before: not computed again
        patch.setattr(information_plane, "_bound", real)
        assert run_guarded(information_plane.main, "information_plane", arguments, ()) == 0
    assert (workdir / "cache" / "train" / "tanh" / "2.npz").exists()  # by its number of seeds
    return json.loads((workdir / "report.json").read_text())


def test_every_arm_view_claim_and_figure_is_there(report):
    methods = {row["method"] for row in report["rows"]}
    assert {"tanh", "relu", "tanh, fixed 30 bins", "tanh, local 30 bins", "one program"} <= methods
    assert report["figures"] == [
        f"figures/{name}.png" for name in ("planes", "views", "gradients", "compression", "bound")
    ]
    text = " ".join(claim["claim"] for claim in report["claims"])
    for part in (
        "tanh: the layer of 3",
        "rectified units: the layer of 3",
        "SNR",
        "beta",
        "loop",
        "one minute",
        "sign",
    ):
        assert part in text
    assert all(np.isfinite(row["values"]).all() for row in report["rows"])
    losses = [r["values"] for r in report["rows"] if r["metric"] == information_plane.LOSS]
    assert losses and all(value <= 0 for values in losses for value in values)


def test_final_minus_peak_and_the_end_of_the_fit():
    points = np.zeros((1, 4, 3, 2))
    points[0, :, 1, 0] = (5.0, 6.0, 4.0, 3.5)
    points[0, :, 1, 1] = (0.1, 0.5, 0.97, 1.0)
    assert information_plane._from_peak(points).tolist() == [[0.0, -2.5, 0.0]]
    assert information_plane._fitted_at(points).tolist() == [2]


def test_the_sign_test_is_the_binomials_tail():
    assert information_plane._sign_test(np.array([True] * 5)) == pytest.approx(1 / 32)
    assert information_plane._sign_test(np.array([True, False])) == pytest.approx(3 / 4)


def test_the_gradient_turns_at_its_first_snr_below_one():
    snr = np.array([[3.0, 0.9, 2.0, 0.1], [2.0, 2.0, 2.0, 2.0]])
    assert information_plane._turns_at(snr).tolist() == [1, 3]


def test_the_distance_to_the_bound_is_read_along_it():
    bound = {"points": np.array([[0.0, 0.0], [1.0, 0.8], [2.0, 0.9]])}
    fits = np.array([[[5.0, 0.1, 0.5, 0.3], [5.0, 0.1, 7.0, 0.9]]])
    np.testing.assert_allclose(information_plane._below_bound(fits, bound), [[0.1, 0.0]])


@pytest.mark.parametrize("preset", ["smoke", "default", "full", "paper"])
def test_presets_load(preset):
    config, *_ = load(f"configs/information_plane.py:{preset}", [], CHECKOUT)
    assert all(
        information_plane._costs(information_plane.Run(), config, list(config.arms)).values()
    )


@pytest.mark.parametrize("wrong", ["batch=9999", "activation=gelu"])
def test_a_bad_value_is_one_line(wrong, tmp_path, capsys):
    arguments = [
        "--config=configs/information_plane.py:smoke",
        f"--config.arms.tanh.{wrong}",
        f"--workdir={tmp_path}/run",
    ]
    assert run_guarded(information_plane.main, "information_plane", arguments, ()) == 2
    assert f"arms.tanh: {wrong.split('=')[0]}" in capsys.readouterr().err
