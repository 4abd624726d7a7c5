"""The smoke preset, interrupted and resumed; problems without leaks; losses of all methods."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cs_ib
from rlib import information
from rlib.experiment import Run, UsageError
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT
from rlib.experiment.start import run_guarded


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cs_ib") / "run"
    arguments = ["--config=configs/cs_ib.py:smoke", f"--workdir={workdir}"]
    real, computed = cs_ib._fits, []

    def failing(run, config, method, *rest):
        if method == "cs-ib":
            raise RuntimeError("injected")
        return real(run, config, method, *rest)

    def counting(run, config, method, *rest):
        computed.append(method)
        return real(run, config, method, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cs_ib, "_fits", failing)
        assert run_guarded(cs_ib.main, "cs_ib", arguments, ()) == 1
        patch.setattr(cs_ib, "_fits", counting)
        assert run_guarded(cs_ib.main, "cs_ib", arguments, ()) == 0
    # Tuned and fitted: with outliers, and on the table twice; clean Friedman-1 was there.
    assert computed.count("mse") == 6
    assert computed.count("vib") == 4
    return workdir


def test_every_method_claim_and_figure_is_there(workdir):
    report = json.loads((workdir / "report.json").read_text())
    assert {"mse", "cs-ib", "vib"} <= {row["method"] for row in report["rows"]}
    text = " ".join(claim["claim"] for claim in report["claims"])
    for part in ("Friedman-1, clean", "outliers", "PGD", "plane", "gap", "tables", "MB"):
        assert part in text
    names = ("friedman", "information_plane", "widths", "tables", "estimators")
    assert report["figures"] == [f"figures/{name}.png" for name in names]
    assert all(np.isfinite(row["values"]).all() for row in report["rows"])


def test_units_are_those_planned_and_named_by_their_number_of_seeds(workdir):
    """A run continued with more seeds must not take the fits of fewer for all."""
    config, *_ = load("configs/cs_ib.py:smoke", [], CHECKOUT)
    methods = list(config.own)
    done = {str(f.relative_to(workdir / "cache"))[:-4] for f in (workdir / "cache").rglob("*.npz")}
    planned, more = (set(cs_ib._costs(Run(seeds=n), config, methods, n)) for n in (2, 3))
    assert done == planned
    assert all(unit == "estimators" or unit.startswith("tune/") for unit in planned & more)


@pytest.fixture(scope="module")
def default():
    return load("configs/cs_ib.py:default", [], CHECKOUT)[0]


def problem(config, condition, seed):
    return cs_ib._problem(config, cs_ib._friedman, 9, condition, "friedman", seed)


def test_outliers_are_in_training_labels_alone_but_in_tuning(default):
    """The same draw with and without: only a fifth of the labels moved, all upwards."""
    tuning = cs_ib.TUNING_SEED
    for seed in (3, tuning):
        _, y, _, test_y = cs_ib._friedman(default, seed)
        found = problem(default, "outliers", seed)
        unit = found.unit * y.std()
        moved = found.y[:, 0] * unit - y
        moved -= np.median(moved)  # what standardising took away
        far = moved > 1e-2
        assert np.mean(far) == pytest.approx(0.2, abs=0.005)
        np.testing.assert_allclose(moved[~far], 0, atol=1e-2)
        assert moved[far].mean() == pytest.approx(4 * y.std(), rel=0.3)
        tested = found.test_y[:, 0] * unit - test_y
        assert (np.ptp(tested) > 1) == (seed == tuning)


def test_problems_are_standardised_by_their_training_part(default):
    found = problem(default, "clean", 0)
    np.testing.assert_allclose(found.x.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(found.x.std(axis=0), 1, atol=1e-5)
    assert abs(found.test_x.mean(axis=0)).max() > 1e-3
    assert found.unit == 1
    assert found.batches.shape == (9, 64)
    assert len(np.unique(found.batches[:6])) == 6 * 64  # an epoch: without repetition
    other = problem(default, "clean", 1)
    assert not np.allclose(found.y, other.y)


def test_tuning_never_sees_the_tables_test_part(default):
    draw = np.random.default_rng(0)
    table = {
        split: {"x": np.full((n, 2), float(split == "test")), "y": draw.normal(size=n)}
        for split, n in (("train", 100), ("test", 30))
    }
    for seed in (0, cs_ib.TUNING_SEED):
        x, y, test_x, test_y = cs_ib._table(default, seed, table=table)
        assert len(x) == 80 and len(test_x) == 20
        assert not x.any()
        assert test_x.any() == (seed == 0)
        assert not set(y) & set(test_y)


def test_every_method_tries_as_many_settings(default):
    assert set(default.own) == set(cs_ib.PARAMETER)
    for preset in ("default", "full", "paper"):
        config, *_ = load(f"configs/cs_ib.py:{preset}", [], CHECKOUT)
        assert len({len(cs_ib._trials(config, method)) for method in config.own}) == 1


def test_unknown_methods_are_named():
    for key, value in (("plane.methods", ("cs-bi",)), ("tables.methods", ("cs-bi",)),
                       ("widths.method", "cs-bi")):  # fmt: skip
        config, *_ = load("configs/cs_ib.py:smoke", [], CHECKOUT)
        config.update_from_flattened_dict({key: value})
        with pytest.raises(UsageError, match=rf"--config\.{key}: no method 'cs-bi'"):
            cs_ib._check(config)


def test_all_losses_have_finite_gradients_even_where_the_code_is_constant():
    draw = np.random.default_rng(0)
    x, y = (jnp.asarray(draw.normal(size=(8, d)), jnp.float32) for d in (3, 1))
    setting = {**cs_ib.DEFAULTS, "beta": jnp.float32(0.5)}

    def total(prediction, code, deviation):
        out = information.Encoded(prediction, code, code, deviation)
        losses = [cs_ib._loss(m, x, y, out, setting, 1.0) for m in cs_ib.PARAMETER]
        return sum(losses), jnp.stack(losses)

    every = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    for code in (x[:, :2], jnp.ones((8, 2))):
        (_, losses), gradients = every(y + 1, code, 0.5 * jnp.ones((8, 2)))
        assert np.isfinite(losses).all()
        assert all(np.isfinite(g).all() for g in gradients)


def test_rotated_digits_and_the_missing_table(default, monkeypatch):
    image = np.zeros((2, 8, 8, 1), np.uint8)
    image[:, 3:5, 1:7] = 16
    made = cs_ib._rotated(image, np.zeros(2))
    assert made["x"].shape == (2, 64)
    assert abs(made["y"]).max() <= 45
    assert not np.allclose(made["x"][0], made["x"][1])
    missing = functools.partial(cs_ib.datasets.fetch_california_housing, data_home="/nowhere")
    monkeypatch.setattr(cs_ib.datasets, "fetch_california_housing", missing)
    config = load("configs/cs_ib.py:paper", [], CHECKOUT)[0]
    with pytest.raises(UsageError, match=r"see configs/cs_ib\.py"):
        cs_ib._tables(config)


@pytest.mark.parametrize("preset", ["smoke", "default", "full", "paper"])
def test_presets_load(preset):
    config, *_ = load(f"configs/cs_ib.py:{preset}", [], CHECKOUT)
    cs_ib._check(config)
    assert cs_ib._costs(Run(), config, list(config.own), 2)
    assert not set(config.tables.methods) - set(config.own)
