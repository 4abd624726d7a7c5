"""Compiling the training step for machines that are not there (extra `aot`)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rlib.nn import Siren
from rlib.parallel import h100_mesh, make_train_step, tpu_mesh

pytestmark = pytest.mark.aot

MACHINES = {
    "v5e-256": (lambda: tpu_mesh("v5e:16x16", {"data": 64, "model": 4}), "tpu"),
    "two slices of v5e-16": (
        lambda: tpu_mesh("v5e:4x4", {"data": 16, "model": 2}, num_slices=2),
        "tpu",
    ),
    "v6e-16": (lambda: tpu_mesh("v6e:4x4", {"data": -1}), "tpu"),
    "8 H100": (lambda: h100_mesh({"data": 4, "model": 2}), "cuda"),
    "32 H100": (lambda: h100_mesh({"data": -1}, hosts=4), "cuda"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_step_compiles_and_shards(machine):
    make, platform = MACHINES[machine]
    mesh = make()
    rows, hidden = 256 * mesh.size, 512
    network = nnx.eval_shape(lambda: Siren(1, hidden, 1, 4, rngs=nnx.Rngs(0)))
    graphdef, params, frozen = nnx.split(network, nnx.Param, ...)

    def loss(params, frozen, batch, key):
        x, y = batch
        return jnp.mean((nnx.merge(graphdef, params, frozen)(x) - y) ** 2), {}

    built = make_train_step(loss, optax.adam(1e-4), mesh, params, frozen, microbatches=2)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(built.init, params, frozen, key)
    batch = (jax.ShapeDtypeStruct((rows, 1), np.float32),) * 2
    compiled = built.step.trace(state, batch).lower(lowering_platforms=(platform,)).compile()
    text = compiled.as_text()
    assert re.search(r"all-reduce", text)
    kernel = hidden * hidden // mesh.shape.get("model", 1)
    assert re.search(
        rf"f32\[({hidden},{hidden // mesh.shape.get('model', 1)}|{kernel // hidden},{hidden})\]",
        text,
    )
    used = compiled.memory_analysis()
    assert used.argument_size_in_bytes < 4 * (3 * 4 * kernel + 20 * hidden + 4 * rows)
