"""Two scalar clients with losses a/2 (x - b)^2, and a small problem of real clients."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlib import data, federated, training


class Quadratics:
    """a_i/2 (x - b_i)^2 of clients i, exact gradients."""

    def __init__(self, a, b):
        self.a, self.b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        self.held = federated.client_data(
            {"a": self.a, "b": self.b}, [np.array([i]) for i in range(len(a))]
        )

    @staticmethod
    def loss(x, batch, key):
        return batch["a"] * (x - batch["b"]) ** 2 / 2

    def rounds(self, algorithm, steps, **options):
        work = federated.LocalWork(None, steps=steps)
        return federated.make_rounds(algorithm, self.loss, work, len(self.a), **options)

    def run(self, algorithm, steps, rounds, start=4.0, change=lambda state: state, **options):
        """x after each round, the metrics, and the last state."""
        train = federated.make_train_step(self.rounds(algorithm, steps, **options), jnp.float32(0))
        state, xs, seen = change(train.init(jnp.float32(start))), [], []
        for _ in range(rounds):
            state, metrics = train.step(state, self.held)
            xs.append(float(state.params))
            seen.append({name: float(value) for name, value in metrics.items()})
        return np.array(xs), seen, state

    def limit(self, algorithm, steps, rounds, start=4.0, change=lambda state: state, **options):
        """x after many rounds, and the state."""
        train = federated.make_train_step(self.rounds(algorithm, steps, **options), jnp.float32(0))
        state = change(train.init(jnp.float32(start)))
        phases = [training.Phase(train, rounds)]
        state, _ = training.fit(phases, state, self.held, chunk=rounds)
        return float(state.params), state


@pytest.fixture(scope="session")
def two():
    """Curvatures 1 and 3, minima at -1 and 1: the minimum of the mean is 0.5."""
    return Quadratics([1, 3], [-1, 1])


@pytest.fixture(scope="session")
def quadratics():
    return Quadratics


@pytest.fixture(scope="session")
def digits():
    """Ten clients of unequal sizes."""
    x, y = data.images("digits")
    examples = {"x": x.reshape(-1, 64), "y": y}
    return federated.client_data(
        examples, data.partition_dirichlet(examples["y"], 10, 0.5, least=20)
    )
