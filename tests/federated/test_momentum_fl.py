"""FedAvg-M, SCAFFOLD-M and the variance-reduced forms against hand-computed scalars."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlib import federated, optim

ETA, BETA, GAMMA, K = 0.1, 0.1, 0.2, 5


def fixed_point(two, eta, steps):
    rest = 1 - (1 - eta * two.a.astype(np.float64)) ** steps
    return np.sum(rest * two.b) / np.sum(rest)


def with_controls(two, at=4.0):
    """Every client's control variate is its gradient there."""
    own = jnp.asarray(two.a * (at - two.b))

    def change(state):
        server = state.opt_state.server._replace(c=own.mean())
        return state._replace(opt_state=state.opt_state._replace(server=server, clients=own))

    return change


def test_fedavg_and_fedavg_m_end_at_their_fixed_points(two):
    assert fixed_point(two, 0.1, K) == pytest.approx(0.3402661425)
    assert fixed_point(two, 0.01, K) == pytest.approx(0.4848539009)
    x, _ = two.limit(federated.fedavg(optax.sgd(ETA)), K, rounds=100)
    assert x == pytest.approx(0.3402661425, abs=1e-6)
    # The drift is that of the step beta eta.
    x, _ = two.limit(federated.fedavg_m(ETA, GAMMA, BETA), K, rounds=2000)
    assert x == pytest.approx(0.4848539009, abs=1e-5)


def test_fedavg_m_trajectory(two):
    xs, _, state = two.run(federated.fedavg_m(ETA, GAMMA, BETA), K, rounds=3)
    expected = [3.8662304653, 3.6218559601, 3.2911203183]
    np.testing.assert_allclose(xs, expected, rtol=1e-6)
    assert float(state.opt_state.server.g) == pytest.approx(1.6536782091, rel=1e-5)


def test_beta_one_is_fedavg(two):
    momentum, *_ = two.run(federated.fedavg_m(ETA, ETA * K, 1.0), K, rounds=3)
    plain, *_ = two.run(federated.fedavg(optax.sgd(ETA)), K, rounds=3)
    np.testing.assert_allclose(momentum, [1.7283300000, 0.8667310024, 0.5399437346], rtol=1e-6)
    np.testing.assert_allclose(momentum, plain, rtol=1e-6)


def test_one_local_step_is_sgd_with_momentum(two):
    xs, *_ = two.run(federated.fedavg_m(ETA, GAMMA, BETA), 1, rounds=3)
    np.testing.assert_allclose(xs, [3.86, 3.5996, 3.241256], rtol=1e-6)
    tx = optax.chain(optax.ema(0.9, debias=False), optax.scale(-GAMMA))
    x, state = jnp.float32(4.0), tx.init(jnp.float32(0))
    for expected in xs:
        update, state = tx.update(jnp.mean(two.a * (x - two.b)), state)
        x = x + update
        np.testing.assert_allclose(x, expected, rtol=1e-6)


def test_scaffold_m_first_round_and_limit(two):
    algorithm = federated.scaffold_m(ETA, GAMMA, BETA)
    xs, _, state = two.run(algorithm, K, rounds=1, change=with_controls(two))
    assert xs[0] == pytest.approx(3.8654619485, rel=1e-6)
    assert float(state.opt_state.server.g) == pytest.approx(0.6726902574, rel=1e-5)
    np.testing.assert_allclose(state.opt_state.clients, [4.86139301, 8.59241213], rtol=1e-6)
    for sampled in (2, 1):
        x, state = two.limit(algorithm, K, rounds=4000, change=with_controls(two), sampled=sampled)
        assert x == pytest.approx(0.5, abs=1e-5)


def test_scaffold_is_unbiased_and_scaffold_m_with_beta_one(two):
    x, _ = two.limit(federated.scaffold(ETA, ETA * K), K, rounds=500)
    assert x == pytest.approx(0.5, abs=1e-5)
    plain, *_ = two.run(federated.scaffold(ETA, ETA * K), K, rounds=3)
    momentum, *_ = two.run(federated.scaffold_m(ETA, ETA * K, 1.0), K, rounds=3)
    np.testing.assert_allclose(plain, momentum, rtol=1e-6)


@pytest.mark.parametrize("weights", ["equal", [1.0, 2.0, 3.0, 4.0, 5.0]])
def test_c_is_the_mean_of_the_control_variates(quadratics, weights):
    many = quadratics(np.linspace(1, 3, 5), np.linspace(-1, 1, 5))
    p = np.ones(5) / 5 if weights == "equal" else np.array(weights) / 15
    train = federated.make_train_step(
        many.rounds(federated.scaffold_m(ETA, GAMMA, BETA), K, sampled=2, weights=weights),
        jnp.float32(0),
    )
    state = train.init(jnp.float32(4.0))
    for _ in range(6):
        before = np.asarray(state.opt_state.clients)
        state, _ = train.step(state, many.held)
        after = np.asarray(state.opt_state.clients)
        assert np.sum(before != after) == 2  # those who were absent keep theirs
        np.testing.assert_allclose(state.opt_state.server.c, p @ after, rtol=1e-5, atol=1e-6)


def test_the_mean_gradient_follows_from_the_displacement(two):
    """mean grad = (displacement / (eta K) - (1 - beta) g) / beta + c_i - c."""
    algorithm = federated.scaffold_m(ETA, GAMMA, BETA)
    _, _, state = two.run(algorithm, K, rounds=3, change=with_controls(two))
    x, server, own = state.params, state.opt_state.server, state.opt_state.clients
    new = two.run(algorithm, K, rounds=4, change=with_controls(two))[2].opt_state.clients
    for a, b, c_i, expected in zip(two.a, two.b, own, new, strict=True):
        y = float(x)
        for _ in range(K):
            direction = BETA * (a * (y - b) - c_i + server.c) + (1 - BETA) * server.g
            y -= ETA * float(direction)
        mean = ((x - y) / (ETA * K) - (1 - BETA) * server.g) / BETA + c_i - server.c
        np.testing.assert_allclose(mean, expected, rtol=1e-4)


def test_variance_reduced_trajectory(two):
    algorithm = federated.fedavg_m(ETA, GAMMA, BETA, variance_reduced=True, g0=jnp.float32(7.0))
    xs, *_ = two.run(algorithm, 2, rounds=3)
    np.testing.assert_allclose(xs, [2.742, 2.03932, 1.6361172], rtol=1e-6)


def test_variance_reduced_with_one_step_is_storm(two):
    algorithm = federated.fedavg_m(ETA, GAMMA, BETA, variance_reduced=True, g0=jnp.float32(7.0))
    xs, *_ = two.run(algorithm, 1, rounds=4)
    grad = lambda x: np.mean(two.a * (x - two.b))
    x, previous, g = 4.0, 4.0, 7.0
    for expected in xs:
        g = grad(x) + (1 - BETA) * (g - grad(previous))
        x, previous = x - GAMMA * g, x
        np.testing.assert_allclose(expected, x, rtol=1e-6)


def test_without_g0_the_first_round_is_that_of_beta_one(two):
    reduced = federated.fedavg_m(ETA, GAMMA, BETA, variance_reduced=True)
    first, *_ = two.run(reduced, K, rounds=1)
    plain, *_ = two.run(federated.fedavg_m(ETA, GAMMA, 1.0), K, rounds=1)
    np.testing.assert_allclose(first, plain, rtol=1e-6)


def test_an_empty_round_does_not_start_the_variance_reduced_forms(two):
    reduced = federated.fedavg_m(ETA, GAMMA, BETA, variance_reduced=True)
    plain, *_ = two.run(reduced, K, rounds=3)
    late = lambda key, round: jnp.full(2, round > 0)
    after_one, *_ = two.run(reduced, K, rounds=4, available=late)
    np.testing.assert_allclose(after_one[1:], plain, rtol=1e-5)


def test_g0_is_a_number_of_any_type(two):
    x, *_ = two.run(federated.fedavg_m(ETA, GAMMA, BETA, g0=7), K, rounds=2)
    expected, *_ = two.run(federated.fedavg_m(ETA, GAMMA, BETA, g0=jnp.float32(7.0)), K, rounds=2)
    np.testing.assert_array_equal(x, expected)


def test_scaffold_m_vr_ends_at_the_minimum(two):
    algorithm = federated.scaffold_m(0.02, 0.05, 0.5, variance_reduced=True)
    x, _ = two.limit(algorithm, K, rounds=3000, sampled=1)
    assert x == pytest.approx(0.5, abs=1e-4)


def test_equal_clients_do_not_feel_control_variates(quadratics):
    same = quadratics([2, 2, 2], [1, 1, 1])
    with_c, *_ = same.run(federated.scaffold_m(ETA, GAMMA, BETA), K, rounds=4)
    without, *_ = same.run(federated.fedavg_m(ETA, GAMMA, BETA), K, rounds=4)
    np.testing.assert_allclose(with_c, without, rtol=1e-5)
    # Absent clients keep old ones, so that they part where some are absent.
    with_c, *_ = same.run(federated.scaffold_m(ETA, GAMMA, BETA), K, rounds=4, sampled=1)
    without, *_ = same.run(federated.fedavg_m(ETA, GAMMA, BETA), K, rounds=4, sampled=1)
    assert abs(with_c[-1] - without[-1]) > 1e-3


def test_unequal_numbers_of_steps_leave_g_in_units_of_a_gradient(digits):
    """One model, one linear loss: every client's direction is the same, however many steps."""
    loss = lambda x, batch, key: jnp.full(len(batch["y"]), 1.0) * x
    work = federated.LocalWork(8, epochs=2)
    rounds = federated.make_rounds(federated.fedavg_m(0.1, 1.0, 1.0), loss, work, 10)
    assert len(set(np.asarray(digits.sizes))) > 1
    state, _ = jax.jit(rounds.step)(rounds.init(jnp.float32(0)), digits)
    assert float(state.opt_state.server.g) == pytest.approx(1.0, rel=1e-5)


def test_mistakes_are_told():
    for beta in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            federated.fedavg_m(0.1, 0.1, beta)
    tx = optim.scale_by_global_momentum(0.5, variance_reduced=True)
    with pytest.raises(ValueError, match="previous_grad"):
        tx.update(jnp.ones(2), tx.init(None), g=jnp.ones(2))
