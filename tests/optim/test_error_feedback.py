"""EControl and its relatives: hand cases, virtual iterates, limits, published counterexamples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlib.compression import Identity, RandK, ScaledSign, TopK
from rlib.optim import (
    econtrol,
    scale_by_econtrol,
    scale_by_ef21,
    scale_by_error_compensation,
)


def top_k(u, k):
    kept = np.argsort(-np.abs(u), kind="stable")[:k]
    out = np.zeros_like(u)
    out[kept] = u[kept]
    return out


def descend(tx, grad, x0, steps, gamma, n):
    """x of n workers by vmap; grad(i, x) of worker i. Returns positions and states."""
    x = jnp.asarray(x0, jnp.float32)
    state = jax.jit(jax.vmap(lambda _: tx.init(x), axis_name="data"))(jnp.arange(n))

    @jax.jit
    def step(x, state):
        g = jax.vmap(lambda i: grad(i, x))(jnp.arange(n))
        updates, state = jax.vmap(lambda g, s: tx.update(g, s), axis_name="data")(g, state)
        return x - gamma * updates[0], state, g

    xs, states, grads = [x], [], []
    for _ in range(steps):
        x, state, g = step(x, state)
        xs.append(x)
        states.append(state)
        grads.append(np.asarray(g))
    return np.asarray(xs), states, np.asarray(grads)


def quadratics(n, d, seed=0):
    draw = np.random.default_rng(seed)
    a = jnp.asarray(draw.uniform(0.5, 2.0, (n, d)), jnp.float32)
    b = jnp.asarray(draw.normal(size=(n, d)), jnp.float32)
    return (lambda i, x: a[i] * (x - b[i])), np.asarray((a * b).sum(0) / a.sum(0))


def test_the_specifications_hand_case():
    tx = scale_by_econtrol(TopK(k=1), eta=0.5, init="zeros")
    state = tx.init(jnp.zeros(3))
    g = jnp.array([4.0, 2.0, 1.0])
    h = [[4, 0, 0], [4, 3, 0], [4, 3, 2], [4, 2, 2]]
    e = [[0, 2, 1], [0, 1, 2], [0, 0, 1], [0, 0, 0]]
    step = jax.jit(tx.update)
    for expected_h, expected_e in zip(h, e, strict=True):
        update, state = step(g, state)
        np.testing.assert_array_equal(update, expected_h)
        np.testing.assert_array_equal(state.error.value, expected_e)


CASES = {
    "econtrol": lambda **k: scale_by_econtrol(TopK(k=2), 0.2, **k),
    "econtrol zeros": lambda **k: scale_by_econtrol(TopK(k=2), 0.2, init="zeros", **k),
    "econtrol compressed": lambda **k: scale_by_econtrol(TopK(k=2), 0.2, init="compressed", **k),
    "econtrol rand": lambda **k: scale_by_econtrol(RandK(k=2), 0.1, **k),
    "ec": lambda **k: scale_by_error_compensation(ScaledSign("l1"), **k),
}


@pytest.mark.parametrize("name", CASES)
def test_the_virtual_iterate_is_sgd_on_the_gradients_seen(name):
    grad, _ = quadratics(4, 9)
    gamma = 0.05
    xs, states, grads = descend(CASES[name](axis_name="data"), grad, np.zeros(9), 40, gamma, 4)
    virtual = xs[-1] - gamma * np.asarray(states[-1].error.value).mean(axis=0)
    expected = xs[0] - gamma * grads.mean(axis=1).sum(axis=0)
    np.testing.assert_allclose(virtual, expected, atol=2e-5)


@pytest.mark.parametrize("init", ["zeros", "grad"])
def test_without_gain_it_is_ef21(init):
    grad, _ = quadratics(3, 8)
    xs, *_ = descend(
        scale_by_ef21(TopK(k=2), axis_name="data", init=init), grad, np.ones(8), 25, 0.1, 3
    )
    again, *_ = descend(
        scale_by_econtrol(TopK(k=2), 0.0, axis_name="data", init=init), grad, np.ones(8), 25, 0.1, 3
    )
    np.testing.assert_array_equal(xs, again)
    # EF21 written on its own: from h = C(g) it sends C(g - h) and adds it; from h = g likewise.
    x = np.ones(8, np.float64)
    h = None
    for _ in range(25):
        g = np.stack(
            [np.asarray(grad(i, jnp.asarray(x, jnp.float32)), np.float64) for i in range(3)]
        )
        if h is None:
            h = g if init == "grad" else np.stack([top_k(row, 2) for row in g])
        else:
            h = h + np.stack([top_k(row, 2) for row in g - h])
        x = x - 0.1 * h.mean(axis=0)
    np.testing.assert_allclose(xs[-1], x, atol=1e-5)


def test_momentum_averages_the_gradients_first():
    tx = scale_by_ef21(Identity(), momentum=0.25)
    state = tx.init(jnp.zeros(1))
    seen = []
    for g in (1.0, 0.0, 0.0):
        update, state = tx.update(jnp.array([g]), state)
        seen.append(float(update[0]))
    np.testing.assert_allclose(seen, [1.0, 0.75, 0.5625], rtol=1e-6)


def test_the_identity_is_sgd_and_keeps_no_error():
    grad, _ = quadratics(3, 5)
    tx = scale_by_econtrol(Identity(), 0.3, axis_name="data", init="zeros")
    xs, states, grads = descend(tx, grad, np.zeros(5), 10, 0.1, 3)
    assert not np.asarray(states[-1].error.value).any()
    np.testing.assert_allclose(xs[-1], -0.1 * grads.mean(axis=1).sum(axis=0), atol=1e-6)


def test_an_error_decays_by_the_gain():
    """C = identity, constant g: e_t = (1 - eta)^t e_0 and h - g = eta (1 - eta)^t e_0."""
    tx = scale_by_econtrol(Identity(), 0.25, init="zeros")
    g = jnp.array([2.0])
    _, state = tx.update(g, tx.init(g))
    e0 = 8.0
    state = state._replace(error=type(state.error)(jnp.array([e0])))
    for t in range(5):
        update, state = tx.update(g, state)
        assert float(state.error.value[0]) == pytest.approx(0.75 ** (t + 1) * e0, rel=1e-5)
        assert float(update[0] - g[0]) == pytest.approx(0.25 * 0.75**t * e0, rel=1e-5)


def three_clients():
    a = jnp.array([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]])
    return lambda i, x: 2 * a[i] * (a[i] @ x) + x / 2


def test_naive_compression_diverges_at_the_known_rate():
    grad = three_clients()
    x, gamma = np.ones(3), 0.05
    g = np.stack([np.asarray(grad(i, jnp.asarray(x, jnp.float32))) for i in range(3)])
    x_next = x - gamma * np.stack([top_k(row, 1) for row in g]).mean(axis=0)
    np.testing.assert_allclose(x_next / x, 1 + 11 * gamma / 6, rtol=1e-6)


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (scale_by_error_compensation(TopK(k=1), axis_name="data"), 1.22e-4),
        (scale_by_ef21(TopK(k=1), axis_name="data"), 1.12e-4),
        (scale_by_ef21(TopK(k=1), axis_name="data", init="zeros"), 1.20e-4),
        (scale_by_econtrol(TopK(k=1), 0.1, axis_name="data"), 1.44e-4),
        (scale_by_econtrol(Identity(), 0.1, axis_name="data"), 1.37e-4),
    ],
    ids=["ec", "ef21", "ef21 from C(g)", "econtrol", "gd"],
)
def test_feedback_converges_where_naive_compression_diverges(tx, expected):
    xs, *_ = descend(tx, three_clients(), np.ones(3), 400, 0.02, 3)
    assert np.linalg.norm(xs[-1]) == pytest.approx(expected, rel=0.02)


def test_heterogeneous_quadratics_converge_and_messages_vanish():
    grad, optimum = quadratics(5, 20)
    for tx in (
        scale_by_econtrol(TopK(k=2), axis_name="data"),
        scale_by_ef21(TopK(k=2), axis_name="data"),
    ):
        xs, states, _ = descend(tx, grad, np.zeros(20), 1500, 0.05, 5)
        np.testing.assert_allclose(xs[-1], optimum, atol=1e-4)
        moved = np.asarray(states[-1].estimate.value) - np.asarray(states[-2].estimate.value)
        assert np.abs(moved).max() < 1e-4
        local = np.stack([np.asarray(grad(i, jnp.asarray(optimum))) for i in range(5)])
        np.testing.assert_allclose(states[-1].estimate.value, local, atol=1e-3)
    xs, *_ = descend(
        scale_by_error_compensation(TopK(k=2), axis_name="data"), grad, np.zeros(20), 1500, 0.05, 5
    )
    assert np.abs(xs[-1] - optimum).max() > 1e-3


def test_mean_of_the_estimates_is_the_incremental_mean():
    grad, _ = quadratics(4, 9)
    _, states, _ = descend(
        scale_by_econtrol(TopK(k=2), axis_name="data"), grad, np.zeros(9), 200, 0.05, 4
    )
    mean = np.asarray(states[-1].estimate.value).mean(axis=0)
    np.testing.assert_allclose(states[-1].mean_estimate[0], mean, atol=1e-5)


def test_scaling_the_problem_leaves_the_path_alone():
    grad, _ = quadratics(3, 8)
    make = lambda: scale_by_econtrol(TopK(k=2), 0.2, axis_name="data")
    xs, *_ = descend(make(), grad, np.ones(8), 30, 0.1, 3)
    scaled, *_ = descend(make(), lambda i, x: 4 * grad(i, x), np.ones(8), 30, 0.025, 3)
    np.testing.assert_allclose(xs, scaled, rtol=1e-5)


def two_updates(tx, grads):
    _, state = tx.update(grads, tx.init(grads))
    return tx.update(grads, state)[0]


def test_the_gain_defaults_to_the_contraction_of_what_is_compressed():
    grads = {"a": jnp.ones(30), "b": jnp.ones(10)}
    for scope, delta in (("global", 2 / 40), ("leaf", 2 / 30)):
        tx = scale_by_econtrol(TopK(k=2), init="zeros", scope=scope)
        given = scale_by_econtrol(TopK(k=2), delta, init="zeros", scope=scope)
        found, expected = (jax.jit(partial(two_updates, t))(grads) for t in (tx, given))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: scale_by_econtrol(ScaledSign("l2")), "no contraction"),
        (lambda: scale_by_econtrol(TopK(k=9)), "9"),
        (lambda: scale_by_econtrol(TopK(k=1), axis_name="data"), "no axis 'data'"),
    ],
)
def test_mistakes(make, words):
    tx = make()
    state = scale_by_econtrol(TopK(k=1)).init(jnp.ones(3))
    with pytest.raises(ValueError, match=words):
        tx.update(jnp.ones(3), state)


def test_an_unknown_first_estimate_is_refused():
    with pytest.raises(ValueError, match="best"):
        scale_by_econtrol(TopK(k=1), init="best")


def test_momentum_may_follow_in_a_chain():
    tx = optax.chain(
        scale_by_econtrol(TopK(k=1)), optax.trace(0.9), optax.scale_by_learning_rate(0.01)
    )

    @jax.jit
    def step(x, state):
        updates, state = tx.update(2 * x, state)
        return x + updates, state

    x, state = jnp.ones(3), tx.init(jnp.ones(3))
    for _ in range(300):
        x, state = step(x, state)
    assert np.abs(x).max() < 0.05
    assert econtrol(0.1, TopK(k=1)).init(jnp.ones(2))
