"""FedSpeed against hand-computed scalars, its laws and the methods that it contains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlib import federated

ETA, LAMBDA, K = 0.1, 10.0, 5


def speed(ascent=0.0, **options):
    return federated.fedspeed(optax.sgd(ETA), LAMBDA, ascent, **options)


def test_it_ends_at_the_minimum_and_duals_at_the_gradients(two):
    x, state = two.limit(speed(), K, rounds=4000)
    assert x == pytest.approx(0.5, abs=1e-5)
    np.testing.assert_allclose(state.opt_state.clients, [1.5, -1.5], rtol=1e-4)
    biased, _ = two.limit(federated.fedavg(optax.sgd(ETA), proximal=1 / LAMBDA), K, rounds=500)
    assert abs(biased - 0.5) > 0.05


def test_first_rounds(two):
    xs, _, _ = two.run(speed(), K, rounds=2)
    np.testing.assert_allclose(xs, [-0.4563978940, -1.5666164092], rtol=2e-6)
    _, _, state = two.run(speed(), K, rounds=1)
    np.testing.assert_allclose(state.opt_state.clients, [0.20072457, 0.24491522], rtol=1e-6)


def test_unnormalised_ascent(two):
    xs, *_ = two.run(speed(0.1, normalize=False), K, rounds=1)
    assert xs[0] == pytest.approx(-0.8621140480, rel=1e-6)
    x, state = two.limit(speed(0.1, normalize=False), K, rounds=4000)
    assert x == pytest.approx(0.56, abs=1e-5)
    np.testing.assert_allclose(state.opt_state.clients, [1.716, -1.716], rtol=1e-4)


def test_normalised_ascent(two):
    xs, *_ = two.run(speed(0.1), K, rounds=3)
    expected = [-0.5781812106, -1.5556528968, -0.6406745189]
    np.testing.assert_allclose(xs, expected, rtol=3e-6)
    x, state = two.limit(speed(0.1), K, rounds=4000)
    assert x == pytest.approx(0.55, abs=1e-5)
    np.testing.assert_allclose(state.opt_state.clients, [1.65, -1.65], rtol=1e-4)


def test_the_dual_is_a_moving_average_of_gradients(two):
    r, previous, x = ETA / LAMBDA, np.zeros(2), 4.0
    weights = r * (1 - r) ** (K - 1 - np.arange(K))
    for rounds in (1, 2, 3):
        _, _, state = two.run(speed(), K, rounds=rounds)
        for i, (a, b) in enumerate(zip(two.a, two.b, strict=True)):
            y, gradients = x, []
            for _ in range(K):
                gradients.append(a * (y - b))
                y -= ETA * (gradients[-1] - previous[i] + (y - x) / LAMBDA)
            expected = (1 - r) ** K * previous[i] + weights @ gradients
            np.testing.assert_allclose(state.opt_state.clients[i], expected, rtol=1e-4)
        previous, x = np.asarray(state.opt_state.clients, np.float64), float(state.params)


def test_the_law_of_displacements(two):
    """x^{t+1} - x^t is this round's mean displacement and the sum of all so far."""
    xs, total = [4.0, *two.run(speed(), K, rounds=4)[0]], 0.0
    for t in range(4):
        _, _, state = two.run(speed(), K, rounds=t + 1)
        mean = -float(state.opt_state.server) - total
        total += mean
        np.testing.assert_allclose(xs[t + 1] - xs[t], mean + total, rtol=1e-4)
    first = two.run(speed(), K, rounds=1)[2].opt_state.server
    assert float(first) == pytest.approx(2.2281989470, rel=1e-6)


def test_both_averages_agree_where_all_take_part_and_part_otherwise(two):
    every, *_ = two.run(speed(), K, rounds=4)
    drawn, *_ = two.run(speed(dual_average="sampled"), K, rounds=4)
    np.testing.assert_allclose(every, drawn, rtol=1e-5)
    every, *_ = two.run(speed(), K, rounds=4, sampled=1)
    drawn, *_ = two.run(speed(dual_average="sampled"), K, rounds=4, sampled=1)
    assert abs(every[-1] - drawn[-1]) > 1e-2


def test_the_server_keeps_the_mean_of_the_duals(two):
    _, _, state = two.run(speed(0.1), K, rounds=5, sampled=1)
    duals = np.asarray(state.opt_state.clients)
    np.testing.assert_allclose(state.opt_state.server, LAMBDA * duals.mean(), rtol=1e-5)


def test_weights_of_clients_are_those_of_the_minimum_and_of_the_mean(two):
    """With weights 1 and 3 the minimum is at (-1 + 9) / (1 + 9)."""
    x, state = two.limit(speed(), K, rounds=4000, weights=[1.0, 3.0], sampled=1)
    assert x == pytest.approx(0.8, abs=1e-3)
    mean = LAMBDA * np.array([0.25, 0.75]) @ np.asarray(state.opt_state.clients)
    np.testing.assert_allclose(state.opt_state.server, mean, atol=1e-3)


def test_without_duals_and_ascent_the_first_round_is_fedprox(two):
    """Duals are 0 in round 0; what is left of them is taken away from the new model."""
    _, _, state = two.run(speed(), K, rounds=1)
    model = 4.0 - float(state.opt_state.server)
    prox, *_ = two.run(federated.fedavg(optax.sgd(ETA), proximal=1 / LAMBDA), K, rounds=1)
    assert model == pytest.approx(prox[0], rel=1e-6)


def test_a_weak_prox_is_fedavg_and_fedsam(two):
    weak = lambda rho: federated.fedspeed(optax.sgd(ETA), 1e9, rho)
    for rho in (0.0, 0.1):
        _, _, state = two.run(weak(rho), K, rounds=1)
        expected, *_ = two.run(federated.fedavg(optax.sgd(ETA), ascent=rho), K, rounds=1)
        assert 4.0 - float(state.opt_state.server) == pytest.approx(expected[0], rel=1e-6)


def test_mixing_is_between_both_gradients(two):
    moved = lambda mixing: two.run(speed(0.1, mixing=mixing), 1, 1)[0][0]
    np.testing.assert_allclose(moved(0.25), 0.75 * moved(0.0) + 0.25 * moved(1.0), rtol=1e-6)
    assert moved(0.0) == pytest.approx(two.run(speed(), 1, 1)[0][0], rel=1e-6)


def test_the_ascent_is_over_all_parameters():
    grad = lambda x, batch: (jnp.zeros(()), x)
    params = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, g = federated.sam_gradient(grad, params, None, rho=1.0)
    np.testing.assert_allclose([g["a"][0], g["b"][0]], [3.6, 4.8], rtol=1e-6)


def test_both_gradients_are_of_one_batch(digits):
    """A loss that is linear in x for each batch: the second gradient is the first."""
    loss = lambda x, batch, key: batch["x"] @ x
    work = federated.LocalWork(4, steps=3)
    results = []
    for rho in (0.0, 0.5):
        rounds = federated.make_rounds(speed(rho), loss, work, 10)
        state, _ = jax.jit(rounds.step)(rounds.init(jnp.ones(64)), digits)
        results.append(state.params)
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


def test_mistakes_are_told():
    for options in ({"prox": 0.0}, {"mixing": 2.0}, {"dual_average": "some"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            federated.fedspeed(optax.sgd(0.1), **options)


def test_strengths_can_be_mapped_over(digits):
    loss = lambda x, batch, key: jnp.sum((batch["x"] - x) ** 2, axis=1) / 2
    work = federated.LocalWork(4, steps=3)

    def end(proximal, ascent):
        algorithm = federated.fedavg(optax.sgd(0.1), proximal=proximal, ascent=ascent)
        rounds = federated.make_rounds(algorithm, loss, work, 10)
        return federated.simulate(rounds, jnp.ones(64), digits, 2).state.params

    known = jnp.stack([jax.jit(lambda p=p, r=r: end(p, r))() for p, r in ((0.0, 0.5), (1.0, 0.0))])
    mapped = jax.jit(jax.vmap(end))(jnp.array([0.0, 1.0]), jnp.array([0.5, 0.0]))
    np.testing.assert_allclose(mapped, known, rtol=1e-5)
