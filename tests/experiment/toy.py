"""Toy (arXiv 0000.00000): an experiment of a second, for tests of the run."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlib import optim, parallel, training
from rlib.experiment import Report, Row, Run, judge, named_key, panels, start


def loss(w, frozen, batch, key):
    return jnp.mean((batch - w) ** 2), {}


class Numbers:
    """A resumable stream of random batches."""

    def __init__(self, seconds):
        self.index, self.seconds = 0, seconds

    def __iter__(self):
        return self

    def __next__(self):
        self.index += 1
        time.sleep(self.seconds)
        batch = np.random.default_rng(self.index).normal(size=(8, 1)).astype(np.float32)
        return np.split(batch, jax.process_count())[jax.process_index()]

    def get_state(self):
        return {"next_index": self.index}

    def set_state(self, state):
        self.index = state["next_index"]


def main(config, run=None):
    run = run or Run()
    methods = run.select(["plain", "double", "onebit"])
    units = {f"{method}/seed{seed}": 1.0 for method in methods for seed in run.seeds(config)}
    run.plan(units)
    mesh = run.mesh(config)
    plain = parallel.make_train_step(loss, optax.adam(config.optimizer.rate), mesh, jnp.zeros(1))
    onebit = optim.onebit_adam(config.optimizer.rate, axis_name="data")
    warm, compressed = (
        parallel.make_train_step(loss, onebit, mesh, jnp.zeros(1), worker_axis="data", stage=stage)
        for stage in ("warmup", "compressed")
    )
    half = config.steps // 2
    phases = {
        "onebit": [training.Phase(warm, half), training.Phase(compressed, config.steps - half)]
    }
    rows = []
    for method in methods:
        values = []
        for seed in run.seeds(config):
            unit = f"{method}/seed{seed}"

            def compute(unit=unit, method=method, seed=seed):
                if os.environ.get("TOY_FAIL") == unit:
                    raise RuntimeError("injected")
                todo = phases.get(method, [training.Phase(plain, config.steps)])
                state = todo[0].train.init(jnp.zeros(1), (), named_key(seed, "toy"))
                data = Numbers(float(os.environ.get("TOY_SLEEP", "0")))
                state, history = run.fit(unit, todo, state, data, chunk=2)
                factor = 2.0 if method == "double" else 1.0
                return {"w": factor * float(state.params[0]) + seed, "loss": history["loss"]}

            values.append(run.cached(unit, compute)["w"])
        rows.append(Row(method, "numbers", "w", values))
    figure, axes = panels()
    axes[0, 0].plot(values)
    run.figure("values", figure, values=np.array(values))
    return Report(rows, [judge("w is positive", rows[0].values, at_least=0)])


if __name__ == "__main__":
    Run.checkpoint_seconds = 0.0
    start(main, memory_keys=("steps",))
