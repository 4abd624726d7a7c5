"""Bounds against float64 formulas and known density ratios; gradients; critics that learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from rlib import information
from rlib.information import variational


def scores_of(b=6, seed=0):
    return 2 * np.random.default_rng(seed).standard_normal((b, b))


def reference(scores):
    b = len(scores)
    joint, off = np.diag(scores), scores[~np.eye(b, dtype=bool)]
    clipped = np.clip(off, -1, 1)
    return {
        "nwj": joint.mean() - np.exp(off - 1).mean(),
        "donsker_varadhan": joint.mean() - np.log(np.exp(off).mean()),
        "infonce": np.mean(joint - logsumexp(scores, axis=1)) + np.log(b),
        "smile": joint.mean() - np.log(np.exp(clipped).mean()),
        "jensen_shannon": -np.logaddexp(0, -joint).mean() - np.logaddexp(0, off).mean(),
    }


BOUNDS = {
    "nwj": information.nwj,
    "donsker_varadhan": information.donsker_varadhan,
    "infonce": information.infonce,
    "smile": functools.partial(information.smile, clip=1.0),
    "jensen_shannon": information.jensen_shannon,
}


@jax.jit
def values(scores):
    return {name: bound(scores) for name, bound in BOUNDS.items()}


@jax.jit
def gradients(scores):
    return {name: jax.grad(bound)(scores) for name, bound in BOUNDS.items()}


def test_bounds_and_their_gradients_in_float64():
    with jax.enable_x64(True):
        for b in (2, 6):
            scores = jnp.asarray(scores_of(b))
            found, expected = values(scores), reference(np.asarray(scores))
            assert found == {name: pytest.approx(expected[name], rel=1e-12) for name in BOUNDS}
        towards = scores_of(6, seed=1)
        sides = [values(jnp.asarray(scores + h * towards)) for h in (1e-5, -1e-5)]
        for name, gradient in gradients(scores).items():
            slope = (sides[0][name] - sides[1][name]) / 2e-5
            assert np.sum(gradient * towards) == pytest.approx(float(slope), rel=1e-7), name


def log_ratio(rho, b):
    """Pairs of a Gaussian and the logarithm of their density ratio, all against all."""
    x, z = np.random.default_rng(0).standard_normal((2, b))
    y = rho * x + np.sqrt(1 - rho**2) * z
    xx, yy = x[:, None], y[None]
    square = rho**2 * (xx**2 + yy**2) - 2 * rho * xx * yy
    return -0.5 * np.log1p(-(rho**2)) - square / (2 * (1 - rho**2))


def test_the_best_critic_attains_the_information():
    rho = 0.8
    mi, ratio = -0.5 * np.log(1 - rho**2), log_ratio(rho, 2000)

    @jax.jit
    def found(ratio):
        return {
            "nwj": information.nwj(1 + ratio),
            "dv": information.donsker_varadhan(3 + ratio),
            "infonce": information.infonce(ratio),
            "smile": information.smile(ratio),
            "js": information.jensen_shannon(ratio),
        }

    best = found(ratio)
    for name in ("nwj", "dv", "infonce", "smile"):
        assert best[name] == pytest.approx(mi, abs=0.05), name
    for worse in (0.7 * ratio, 1.4 * ratio, ratio + 0.4):
        assert found(worse)["js"] < best["js"]


def test_infonce_cannot_exceed_its_batch_and_smile_becomes_dv():
    plain = jnp.asarray(scores_of(), jnp.float32)
    far = values(plain + 1000 * np.eye(6, dtype=np.float32))
    assert far["infonce"] == pytest.approx(np.log(6), rel=1e-6)
    loose = jax.jit(functools.partial(information.smile, clip=1e6))(plain)
    assert loose == pytest.approx(float(values(plain)["donsker_varadhan"]), rel=1e-6)


def test_large_scores_do_not_overflow_but_in_nwj():
    scores = jnp.full((6, 6), 500.0)
    found = values(scores)
    assert found["donsker_varadhan"] == pytest.approx(0, abs=1e-3)
    assert found["nwj"] == -np.inf
    assert np.isfinite(gradients(scores)["smile"]).all()


def test_mine_ascends_with_a_moving_average():
    with jax.enable_x64(True):
        first, second = (jnp.asarray(scores_of(seed=s)) for s in (0, 1))
        off = lambda s: np.exp(np.asarray(s)[~np.eye(6, dtype=bool)]).mean()
        start = jnp.float64(-jnp.inf)
        mine = jax.jit(jax.grad(information.mine, has_aux=True))
        grads, average = mine(first, start)
        expected = gradients(first)["donsker_varadhan"]
        np.testing.assert_allclose(grads, expected, rtol=1e-10)  # its own mean at first
        assert float(average) == pytest.approx(np.log(off(first)), rel=1e-12)
        quarter = jax.jit(jax.grad(functools.partial(information.mine, rate=0.25), has_aux=True))
        grads, average = quarter(second, average)
        moved = 0.75 * off(first) + 0.25 * off(second)
        assert float(average) == pytest.approx(np.log(moved), rel=1e-12)
        expected = np.eye(6) / 6 - (1 - np.eye(6)) * np.exp(second) / 30 / moved
        np.testing.assert_allclose(grads, expected, rtol=1e-10)


def test_a_batch_of_one_is_refused():
    for bound in BOUNDS.values():
        with pytest.raises(ValueError, match="at least 2"):
            bound(jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="at least 2"):
        information.donsker_varadhan(jnp.ones((3, 2)))


def test_the_concatenated_critic_scores_each_pair(monkeypatch):
    from flax import nnx

    critic = information.ConcatenatedCritic(2, 1, widths=(4,), rngs=nnx.Rngs(0))
    x, y = np.random.default_rng(0).standard_normal((2, 3, 2)).astype(np.float32)
    scores = critic(x, y[:, :1])
    expected = critic.g(np.r_[x[1], y[2, :1]])[0]
    np.testing.assert_allclose(scores[1, 2], expected, rtol=1e-5)
    monkeypatch.setattr(variational, "_SCORES_AT_ONCE", 6)  # two rows, then one
    np.testing.assert_allclose(critic(x, y[:, :1]), scores, rtol=1e-5)


def test_critics_learn():
    x, z = np.random.default_rng(0).standard_normal((2, 2000, 1)).astype(np.float32)
    rho = np.sqrt(1 - np.exp(-2.0))
    ys = np.stack([z, rho * x + np.exp(-1) * z])  # 0 and 1 nat
    fit = functools.partial(
        information.fit_critic, bound="mine", steps=600, batch=64, looks=3, learning_rate=3e-3
    )
    found = jax.jit(jax.vmap(lambda y: fit(jax.random.key(0), x, y)))(ys)
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found[:, -1], [0, 1], atol=0.15)


def test_held_out_pairs_are_read_in_batches(monkeypatch):
    """Of 11 held out, 5 and 5; with no step the critic is the one that its key makes."""
    from flax import nnx

    monkeypatch.setattr(variational, "MOST_HELD_OUT", 6)
    small = functools.partial(information.SeparableCritic, widths=())
    x, y = np.random.default_rng(0).standard_normal((2, 22, 1)).astype(np.float32)
    key = jax.random.key(0)
    found = jax.jit(lambda x, y: information.fit_critic(key, x, y, "nwj", critic=small, steps=0))(
        x, y
    )
    critic = small(1, 1, rngs=nnx.Rngs(jax.random.split(key)[0]))
    x, y = ((v - v[:11].mean()) / v[:11].std() for v in (x, y))
    parts = [information.nwj(critic(x[i : i + 5], y[i : i + 5])) for i in (11, 16)]
    assert found == pytest.approx(np.mean(parts), rel=1e-4)


def test_fifty_thousand_pairs_need_no_square():
    """Compiled, not run: a matrix of scores of the 25,000 held out has 2500 MB."""
    part = jax.ShapeDtypeStruct((50_000, 2), jnp.float32)
    small = functools.partial(information.SeparableCritic, widths=())
    fit = functools.partial(information.fit_critic, bound="infonce", critic=small, steps=1)
    sizes = (
        jax.jit(functools.partial(fit, jax.random.key(0)))
        .lower(part, part)
        .compile()
        .memory_analysis()
    )
    assert sizes.temp_size_in_bytes < 300e6


def test_wrong_arguments_are_refused():
    x = np.ones((4, 1), np.float32)
    key = jax.random.key(0)
    for f, match in (
        (lambda: information.fit_critic(key, x, x, "fano"), "choose from nwj"),
        (lambda: information.fit_critic(key, x, x[:3], "nwj"), "do not make pairs"),
        (lambda: information.fit_critic(key, x[:, 0], x, "nwj"), r"x is \(samples, features\)"),
        (lambda: information.fit_critic(key, x, x * np.nan, "nwj"), "y holds NaN"),
        (lambda: information.fit_critic(key, x, x, "nwj", looks=0), "into 0 looks"),
        (lambda: information.fit_critic(key, x, x, "nwj", batch=1), "at least 2"),
        (lambda: information.fit_critic(key, x, x, "nwj", held_out=0.1), "at least 2"),
    ):
        with pytest.raises(ValueError, match=match):
            f()
