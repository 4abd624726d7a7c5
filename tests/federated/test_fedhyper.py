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


@pytest.mark.parametrize("client", ["constant", "sl", "cl"])
def test_bounds_of_one_are_fedavg_to_the_bit(two, client):
    fixed = federated.fedhyper(0.05, client=client, gamma_alpha=1.0, gamma_beta=1.0)
    plain = federated.fedavg(optax.sgd(0.05))
    np.testing.assert_array_equal(two.run(fixed, 3, 3)[0], two.run(plain, 3, 3)[0])


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
