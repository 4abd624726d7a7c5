"""1-bit Adam against its specification's hand cases, laws and limits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlib.optim import (
    check_second_moment,
    onebit_adam,
    scale_by_onebit_adam,
    second_moment_stability,
)
from rlib.optim.onebit_adam import OnebitAdamState


def over_workers(tx, params, n):
    """The first state of n workers, and their update by vmap: `(grads, state, stage)`."""

    @partial(jax.jit, static_argnames="stage")
    def update(grads, state, stage):
        one = lambda g, s: tx.update(g, s, params, stage=stage)
        return jax.vmap(one, axis_name="data")(grads, state)

    init = jax.vmap(lambda _: tx.init(params), axis_name="data")
    return jax.jit(init)(jnp.arange(n)), update


def workers(tx, grads, params, steps_and_stages):
    """Run `tx` on n workers by vmap. grads: (n, d) or a function of the step."""
    state, update = over_workers(tx, params, 2 if callable(grads) else len(grads))
    history = []
    for step, stage in enumerate(steps_and_stages):
        g = jnp.asarray(grads(step) if callable(grads) else grads, jnp.float32)
        updates, state = update(g, state, stage)
        history.append((updates, state))
    return history


def momentum(updates, state):
    return np.asarray(updates, np.float64) * (np.sqrt(np.asarray(state.v, np.float64)) + 1e-8)


def test_the_specifications_hand_case_over_two_steps():
    tx = scale_by_onebit_adam(axis_name="data", v_floor=None)
    grads = np.array([[1.0, -2, 3, 0], [-1, 4, 1, 2]])
    history = workers(tx, grads, jnp.zeros(4), ["compressed"] * 2)
    first, second = (momentum(*each) for each in history)
    np.testing.assert_allclose(first[0], [-0.023719, 0.023719, 0.210802, 0.210802], atol=1e-6)
    np.testing.assert_allclose(second[0], [0.01775, 0.01775, 0.333958, 0.333958], atol=1e-6)
    np.testing.assert_array_equal(first[0], first[1])


def test_a_warm_up_without_end_is_adam_without_bias_correction():
    draw = np.random.default_rng(0)
    all_grads = draw.normal(size=(6, 2, 5))
    tx = scale_by_onebit_adam(axis_name="data")
    history = workers(tx, lambda t: all_grads[t], jnp.zeros(5), ["warmup"] * 6)
    m = v = np.zeros(5)
    for t, (updates, _) in enumerate(history):
        g = all_grads[t].mean(axis=0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        np.testing.assert_allclose(updates[0], m / (np.sqrt(v) + 1e-8), rtol=2e-5)


def test_nothing_is_lost_over_many_steps():
    """m + es + mean e = b1 m_before + (1 - b1) mean g + es_before + mean e_before.

    With c = b1 m + e, as the state has it: m + es + mean(c - b1 m) = (1 - b1) mean g + es_before
    + mean c_before.
    """
    draw = np.random.default_rng(0)
    all_grads = draw.normal(size=(30, 3, 11)) + 0.5
    all_grads[:, :, 4] = 0  # masked: the state tells nothing about it
    seen = np.arange(11) != 4
    tx = scale_by_onebit_adam(axis_name="data")
    stages = ["warmup"] * 5 + ["compressed"] * 25
    state, update = over_workers(tx, jnp.zeros(11), 3)
    left = None
    flat = lambda s: np.asarray(s.server_error.value, np.float64).reshape(-1)[:11]
    carried = lambda s: np.asarray(s.carried.value, np.float64).mean(axis=0)
    for t, stage in enumerate(stages):
        before = state
        updates, state = update(jnp.asarray(all_grads[t], jnp.float32), state, stage)
        if stage == "warmup":
            left = 0.9 * np.asarray(state.m[0])
        else:
            m = momentum(updates, state)[0]
            right = left + 0.1 * all_grads[t].mean(axis=0) + flat(before)
            total = m + flat(state) + carried(state) - 0.9 * m
            np.testing.assert_allclose(total[seen], right[seen], atol=2e-6)
            assert m[4] == 0
            np.testing.assert_array_equal(state.v, before.v)
            left = carried(state)


def test_coordinates_without_second_moment_are_left_alone():
    grads = np.array([[1.0, 0, 2, 0], [3.0, 0, -1, 0]])
    tx = scale_by_onebit_adam(axis_name="data")
    history = workers(tx, grads, jnp.zeros(4), ["warmup"] * 3 + ["compressed"] * 3)
    updates, _ = history[-1]
    np.testing.assert_array_equal(updates[:, [1, 3]], 0)
    assert np.isfinite(updates).all()
    # the same as if the two were not there
    shorter = workers(tx, grads[:, [0, 2]], jnp.zeros(2), ["warmup"] * 3 + ["compressed"] * 3)
    np.testing.assert_allclose(updates[:, [0, 2]], shorter[-1][0], rtol=1e-5)


def test_one_program_with_both_stages_equals_two():
    draw = np.random.default_rng(0)
    all_grads = draw.normal(size=(8, 2, 5))
    by_stage = workers(
        scale_by_onebit_adam(axis_name="data"),
        lambda t: all_grads[t],
        jnp.zeros(5),
        ["warmup"] * 4 + ["compressed"] * 4,
    )
    by_count = workers(
        scale_by_onebit_adam(axis_name="data", warmup_steps=4),
        lambda t: all_grads[t],
        jnp.zeros(5),
        [None] * 8,
    )
    np.testing.assert_allclose(by_stage[-1][0], by_count[-1][0], rtol=1e-6)


def test_a_second_warm_up_starts_from_the_end_of_the_first_without_errors():
    tx = scale_by_onebit_adam(axis_name="data", v_floor=None)
    draw = np.random.default_rng(0)
    g = [jnp.asarray(draw.normal(size=(2, 5)), jnp.float32) for _ in range(6)]

    start, update = over_workers(tx, jnp.zeros(5), 2)

    def run(state, *steps):
        for i, stage in steps:
            updates, state = update(g[i], state, stage)
        return updates, state

    _, warm = run(start, (0, "warmup"))
    _, away = run(warm, (1, "compressed"), (2, "compressed"))
    rest = (3, "warmup"), (4, "compressed"), (5, "compressed")
    (again, _), (straight, _) = run(away, *rest), run(warm, *rest)
    np.testing.assert_array_equal(again, straight)


def test_opted_out_tensors_keep_adam():
    params = {"a": jnp.zeros(6), "b": jnp.zeros(3)}
    tx = scale_by_onebit_adam(axis_name="data", compress={"a": True, "b": False})
    adam = scale_by_onebit_adam(axis_name="data")
    draw = np.random.default_rng(0)
    grads = {
        k: jnp.asarray(draw.normal(size=(2, *v.shape)), jnp.float32) for k, v in params.items()
    }
    (s, update), (full, update_adam) = (over_workers(t, params, 2) for t in (tx, adam))
    for stage in ["warmup"] * 3 + ["compressed"] * 3:
        u, s = update(grads, s, stage)
        f, full = update_adam(grads, full, "warmup")
    np.testing.assert_allclose(u["b"], f["b"], rtol=1e-6)
    assert np.abs(np.asarray(u["a"] - f["a"])).max() > 1e-2


@pytest.mark.parametrize(
    ("compress", "words"),
    [({"a": True}, "compress is"), ({"a": True, "b": True, "c": False}, "compress is")],
)
def test_flags_of_another_structure_are_refused(compress, words):
    tx = scale_by_onebit_adam(compress=compress)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=words):
        tx.update(params, tx.init(params), stage="compressed")


def test_all_tensors_may_opt_out():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    off = scale_by_onebit_adam(compress=lambda tree: jax.tree.map(lambda _: False, tree))
    u, _ = off.update(params, off.init(params), stage="compressed")
    v, _ = off.update(params, off.init(params), stage="warmup")
    jax.tree.map(np.testing.assert_array_equal, u, v)


def test_without_error_feedback_errors_stay_zero():
    grads = np.random.default_rng(0).normal(size=(2, 5))
    tx = scale_by_onebit_adam(axis_name="data", error_feedback=False)
    history = workers(tx, grads, jnp.zeros(5), ["warmup", "compressed", "compressed"])
    updates, state = history[-1]
    np.testing.assert_allclose(state.carried.value, 0.9 * momentum(updates, state), rtol=1e-5)
    assert not np.asarray(state.server_error.value).any()


def test_a_lossless_message_is_preconditioned_momentum():
    """One coordinate is its own sign and scale: the mean arrives whole (l2 scale, any n)."""
    draw = np.random.default_rng(0)
    all_grads = draw.normal(size=(9, 3, 1)) + 0.3
    tx = scale_by_onebit_adam(axis_name="data")
    state, update = over_workers(tx, jnp.zeros(1), 3)
    m = v = 0.0
    for t, stage in enumerate(["warmup"] * 4 + ["compressed"] * 5):
        updates, state = update(jnp.asarray(all_grads[t], jnp.float32), state, stage)
        mean = all_grads[t].mean()
        m = 0.9 * m + 0.1 * mean
        v = 0.999 * v + 0.001 * mean**2 if stage == "warmup" else v
        np.testing.assert_allclose(updates[0, 0], m / (np.sqrt(v) + 1e-8), rtol=1e-4)


def test_weight_decay_is_decoupled():
    params = jnp.ones(3)
    with_decay, without = (onebit_adam(0.1, weight_decay=w, warmup_steps=5) for w in (0.5, 0.0))
    a, _ = with_decay.update(jnp.ones(3), with_decay.init(params), params)
    b, _ = without.update(jnp.ones(3), without.init(params), params)
    np.testing.assert_allclose(a - b, -0.1 * 0.5, rtol=1e-5)


def test_stability_of_stationary_gradients_comes_with_time():
    draw = np.random.default_rng(0)
    tx = scale_by_onebit_adam(b2=0.9, window=20)
    state, update = tx.init(jnp.zeros(200)), jax.jit(partial(tx.update, stage="warmup"))
    seen = []
    for _ in range(60):
        _, state = update(jnp.asarray(draw.normal(size=200), jnp.float32), state)
        seen.append(second_moment_stability((optax.EmptyState(), state)))
    assert seen[10] == 0
    assert 0.9 < seen[-1] < 1.1


def test_falling_gradients_are_not_stable():
    tx = scale_by_onebit_adam(b2=0.9, window=10)
    state, update = tx.init(jnp.zeros(4)), jax.jit(partial(tx.update, stage="warmup"))
    for t in range(30):
        _, state = update(jnp.full(4, 0.8**t), state)
    assert abs(second_moment_stability(state) - 1) > 0.5


def test_a_second_moment_that_is_zero_or_not_finite_is_named():
    params = {"used": jnp.ones(2), "unused": jnp.ones(2)}
    tx = scale_by_onebit_adam(window=1)
    state = tx.init(params)
    for _ in range(3):
        grads = {"used": jnp.ones(2), "unused": jnp.zeros(2)}
        _, state = tx.update(grads, state, stage="warmup")
    assert second_moment_stability(state) == 0  # goes on
    with pytest.raises(ValueError, match=r"'unused'.*is 0"):
        check_second_moment(state)
    _, state = tx.update(params, state, stage="warmup")
    check_second_moment((state, optax.EmptyState()))
    broken = state._replace(v={"used": jnp.array([1.0, np.nan]), "unused": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"'used'.*nan"):
        second_moment_stability(broken)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: scale_by_onebit_adam().update(jnp.ones(2), None), "warmup_steps"),
        (lambda: scale_by_onebit_adam().update(jnp.ones(2), None, stage="late"), "late"),
        (
            lambda: scale_by_onebit_adam(axis_name="data").update(
                jnp.ones(2), None, stage="warmup"
            ),
            "no axis 'data'",
        ),
        (lambda: scale_by_onebit_adam(axis_name="data").init(jnp.ones(2)), "no axis 'data'"),
        (lambda: second_moment_stability(optax.EmptyState()), "0 states"),
        (lambda: scale_by_onebit_adam(scale="L2"), "L2"),
        (lambda: scale_by_onebit_adam(window=0), "window"),
        (lambda: scale_by_onebit_adam(warmup_dtype=jnp.int8), "int8"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_half_precision_gradients_keep_float32_state():
    tx = scale_by_onebit_adam(warmup_steps=1)
    updates, state = tx.update(jnp.ones(3, jnp.bfloat16), tx.init(jnp.ones(3, jnp.bfloat16)))
    assert updates.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state) if x.dtype != jnp.int32} == {
        jnp.dtype("float32")
    }
    assert isinstance(state, OnebitAdamState)
