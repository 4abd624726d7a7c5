"""FedHyper against the scalar trajectories of its equations, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlib import federated, optim


def test_the_increment_is_the_hypergradient_over_beta(two):
    """d F(W^1) / d alpha by finite differences is -Delta^1 Delta^0 / beta, for one local step."""
    beta, mean = 0.05, lambda x: np.mean(two.a * (x - two.b) ** 2 / 2)
    xs, *_ = two.run(federated.fedavg(optax.sgd(beta)), steps=1, rounds=2)
    deltas = -np.diff([4.0, *xs])
    np.testing.assert_allclose(deltas, [0.35, 0.315], rtol=1e-5)
    shifted = [mean(4.0 - (1 + e) * deltas[0]) for e in (1e-3, -1e-3)]
    np.testing.assert_allclose((shifted[0] - shifted[1]) / 2e-3, -2.205, rtol=1e-4)
    np.testing.assert_allclose(-deltas[1] * deltas[0] / beta, -2.205, rtol=1e-4)


def test_g_trajectory(two):
    xs, seen, _ = two.run(federated.fedhyper(0.05), steps=2, rounds=4)
    alphas = [metrics["alpha"] for metrics in seen]
    expected = [1, 1.353925, 1.5684877800, 1.6814992701]
    np.testing.assert_allclose(alphas, expected, rtol=1e-6)
    expected = [3.34, 2.6139577188, 1.9863789803, 1.5114461386]
    np.testing.assert_allclose(xs, expected, rtol=1e-6)
    deltas = -np.diff([4.0, *xs]) / alphas
    expected = [0.66, 0.53625, 0.4001170723, 0.2824460588]
    np.testing.assert_allclose(deltas, expected, rtol=1e-5)


def test_sl_trajectory(two):
    algorithm = federated.fedhyper(0.05, server=False, client="sl")
    xs, seen, _ = two.run(algorithm, steps=2, rounds=4)
    used = [metrics["beta"] for metrics in seen]
    np.testing.assert_allclose(used, [0.05, 0.05, 0.403925, 0.5], rtol=1e-6)
    assert seen[-1]["beta clipped"] == 2
    expected = [3.34, 2.80375, 0.7161943451, 0.1790485863]
    np.testing.assert_allclose(xs, expected, rtol=2e-6)


def test_the_released_sl_keeps_its_rate(two):
    official = federated.fedhyper(0.05, server=False, client="sl", variant="official")
    plain = federated.fedavg(optax.sgd(0.05))
    np.testing.assert_array_equal(two.run(official, 2, 4)[0], two.run(plain, 2, 4)[0])


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


def test_cl_in_the_engine_is_that_transform(two):
    steps, beta = 3, 0.05
    algorithm = federated.fedhyper(beta, server=False, client="cl")
    xs, *_ = two.run(algorithm, steps, rounds=3)
    x, delta = 4.0, 0.0
    for round in range(3):
        ends = []
        for a, b in zip(two.a, two.b, strict=True):
            w, rate, last = x, beta, 0.0
            for k in range(steps):
                g = a * (w - b)
                if k:
                    rate = np.clip(rate + g * last + g * delta / steps, beta / 10, beta * 10)
                w, last = w - rate * g, g
            ends.append(w)
        delta = x - np.mean(ends)
        x -= delta
        np.testing.assert_allclose(xs[round], x, rtol=1e-5)


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


@pytest.mark.parametrize("client", ["constant", "sl", "cl"])
def test_bounds_of_one_are_fedavg_to_the_bit(two, client):
    fixed = federated.fedhyper(0.05, client=client, gamma_alpha=1.0, gamma_beta=1.0)
    plain = federated.fedavg(optax.sgd(0.05))
    np.testing.assert_array_equal(two.run(fixed, 3, 3)[0], two.run(plain, 3, 3)[0])


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


def test_on_adam_the_gradient_is_scaled_first(two):
    both = federated.fedhyper(0.05, optimizer=optax.adam(0.1))
    xs, *_ = two.run(both, steps=2, rounds=1)
    np.testing.assert_allclose(xs, 3.9, rtol=1e-5)


def test_bounds_and_weight_can_be_traced(two):
    options = {"gamma_alpha": 1.2, "gamma_beta": 4.0, "global_coef": 0.2}

    @jax.jit
    def end(options):
        algorithm = federated.fedhyper(0.05, client="cl", **options)
        rounds = two.rounds(algorithm, steps=3)
        return federated.simulate(rounds, jnp.float32(4.0), two.held, 4).state.params

    xs, *_ = two.run(federated.fedhyper(0.05, client="cl", **options), steps=3, rounds=4)
    np.testing.assert_allclose(end(options), xs[-1], rtol=1e-5)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="client='slow'"):
        federated.fedhyper(0.1, client="slow")
    with pytest.raises(ValueError, match="at least 1, or a pair"):
        optim.fedhyper_g(gamma=0.5)
    with pytest.raises(ValueError, match="must be positive"):
        optim.fedhyper_sl(-0.1)
    tx = optim.scale_by_fedhyper_cl(0.1, global_coef=0.1)
    with pytest.raises(ValueError, match="previous_delta"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
