"""FedHyper's rates against hand-computed trajectories, laws and the official variants."""

import jax
import jax.numpy as jnp
import numpy as np

from rlib import optim


def test_cl_trajectory():
    tx = optim.scale_by_fedhyper_cl(0.05, global_coef=1 / 3)
    w, state = jnp.float32(0.3), tx.init(jnp.float32(0))
    found = []
    for _ in range(3):
        g = 2 * w
        step, state = tx.update(g, state, previous_delta=jnp.float32(0.1))
        w = w - step
        found.append((g, state.rate, w))
    expected = [(0.6, 0.05, 0.27), (0.54, 0.392, 0.05832), (0.11664, 0.4588736, 0.0047969833)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_official_client_multiplies_the_next_rate():
    beta, coef, delta = 0.1, 0.02, 0.3
    tx = optim.scale_by_fedhyper_cl(beta, global_coef=coef, variant="official")
    w, state = jnp.float32(1.0), tx.init(jnp.float32(0))
    x, mult, last = 1.0, 1.0, None
    for _ in range(5):
        step, state = tx.update(2 * w, state, previous_delta=jnp.float32(delta))
        w = w - step
        moved = beta * mult * 2 * x
        x -= moved
        if last is not None:
            mult = np.clip(mult * min(1.1, 1 + moved * last + coef * moved * delta), 0.1, 10)
        last = moved
        np.testing.assert_allclose(w, x, rtol=1e-5)


def test_the_official_momentum_is_absent_at_rate_one():
    tx = optim.fedhyper_g(momentum=0.9, gamma=1.0, variant="official")
    ours = optim.fedhyper_g(momentum=0.9, gamma=1.0)
    first = jnp.array([1.0, 2.0])
    for t, momentum in ((tx, 0.0), (ours, 0.9)):
        _, state = t.update(first, t.init(first))
        second, _ = t.update(first, state)
        np.testing.assert_allclose(second, -(1 + momentum) * first, rtol=1e-6)


def test_constant_and_alternating_updates():
    d = jnp.array([0.3, -0.2])
    square = float(d @ d)
    tx = optim.scale_by_fedhyper_g()

    def rates(signs):
        state = tx.init(d)
        found = []
        for sign in signs:
            _, state = tx.update(sign * d, state)
            found.append(float(state.rate))
        return found

    t = np.arange(30)
    np.testing.assert_allclose(rates(np.ones(30)), np.minimum(1 + t * square, 3), rtol=1e-5)
    np.testing.assert_allclose(rates((-1.0) ** t), np.maximum(1 - t * square, 1 / 3), rtol=1e-5)
    orthogonal, state = [jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])], tx.init(d)
    for each in orthogonal:
        _, state = tx.update(each, state)
    assert float(state.rate) == 1.0


def test_rotations_leave_rates_and_scaling_multiplies_increments():
    draw = np.random.default_rng(0)
    deltas = draw.normal(size=(6, 5)).astype(np.float32) / 10
    rotation = np.linalg.qr(draw.normal(size=(5, 5)))[0].astype(np.float32)
    tx = optim.scale_by_fedhyper_g(gamma=1e6)

    def rates(deltas):
        step = lambda state, d: (tx.update(d, state)[1],) * 2
        return jax.lax.scan(step, tx.init(deltas[0]), jnp.asarray(deltas))[1].rate

    np.testing.assert_allclose(rates(deltas @ rotation), rates(deltas), rtol=1e-5)
    np.testing.assert_allclose(rates(3 * deltas) - 1, 9 * (rates(deltas) - 1), rtol=1e-4, atol=1e-6)


def test_momentum_is_the_recursion_and_cosine_is_bounded():
    draw = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    tx = optim.fedhyper_g(gamma=5.0, momentum=0.9)
    cosine = optim.scale_by_fedhyper_g(gamma=100.0, normalize="cosine")
    state, bounded = tx.init(draw[0]), cosine.init(draw[0])
    alpha, last = 1.0, np.zeros(4)
    for t, d in enumerate(draw):
        update, state = tx.update(jnp.asarray(d), state)
        if t:
            alpha = np.clip(alpha + d @ last, 0.2, 5.0)
        last = d + 0.9 * last
        np.testing.assert_allclose(update, -alpha * last, rtol=1e-4)
        _, bounded = cosine.update(jnp.asarray(d), bounded)
        assert abs(float(bounded.inner)) <= 1 + 1e-6


def test_half_precision_updates_keep_float32_inner_products():
    tx = optim.scale_by_fedhyper_g()
    d = jnp.full(1000, 0.03, jnp.bfloat16)
    _, state = tx.update(d, tx.init(d))
    update, state = tx.update(d, state)
    assert update.dtype == jnp.bfloat16 and state.previous.dtype == jnp.float32
    np.testing.assert_allclose(state.inner, 1000 * float(d[0]) ** 2, rtol=1e-5)
