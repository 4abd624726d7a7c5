"""The compressed step of a Transformer for machines that are not there (extra `aot`)."""

import jax
import numpy as np
import pytest
from flax import nnx

from rlib.nn import Transformer, next_token_loss
from rlib.optim import onebit_adam
from rlib.parallel import h100_mesh, make_train_step, tpu_mesh, wire_bytes

pytestmark = pytest.mark.aot

MACHINES = {
    "v5e-256": (lambda: tpu_mesh("v5e:16x16", {"data": 64, "model": 4}), "tpu"),
    "two slices of v5e-16": (
        lambda: tpu_mesh("v5e:4x4", {"data": 8, "model": 4}, num_slices=2),
        "tpu",
    ),
    "64 H100": (lambda: h100_mesh({"data": 16, "model": 4}, hosts=8), "cuda"),
}


def compiled(mesh, platform, stage):
    make = lambda: Transformer(256, layers=2, embed=256, heads=8, rngs=nnx.Rngs(0))
    graphdef, params, frozen = nnx.split(nnx.eval_shape(make), nnx.Param, ...)

    def loss(params, frozen, tokens, key):
        return next_token_loss(nnx.merge(graphdef, params, frozen)(tokens), tokens), {}

    step = make_train_step(
        loss,
        onebit_adam(1e-3, axis_name="data"),
        mesh,
        params,
        frozen,
        worker_axis="data",
        stage=stage,
    )
    state = jax.eval_shape(step.init, params, frozen, jax.eval_shape(lambda: jax.random.key(0)))
    batch = jax.ShapeDtypeStruct((2 * mesh.shape["data"], 64), np.uint8)
    return step.step.trace(state, batch).lower(lowering_platforms=(platform,)).compile()


@pytest.mark.parametrize("machine", MACHINES)
def test_the_compressed_step_compiles_and_sends_a_fraction(machine):
    make, platform = MACHINES[machine]
    mesh = make()
    program = compiled(mesh, platform, "compressed")
    assert "u8[" in program.as_text()
    sent = {s: wire_bytes(compiled(mesh, platform, s), mesh) for s in ("warmup", "compressed")}
    over_data = {s: report.total("data") for s, report in sent.items()}
    assert over_data["compressed"] < over_data["warmup"] / 20
    assert sent["compressed"].total("data", dtype="f32") < over_data["warmup"] / 100
    if machine.startswith("two slices"):
        between = {s: report.total("slices") for s, report in sent.items()}
        assert 0 < between["compressed"] < between["warmup"] / 10
