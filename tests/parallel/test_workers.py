"""The step builder's distributed form: what travels, what is local, what stays equal."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from rlib.collectives import chunk_length
from rlib.compression import TopK, packed_shape
from rlib.nn import Gaussian
from rlib.optim import clip_by_global_norm, econtrol, onebit_adam, skip_nonfinite
from rlib.parallel import (
    PerWorker,
    local_value_and_grad,
    make_mesh,
    make_train_step,
    resize_workers,
    shard_batch,
    wire_bytes,
)

GRAPHDEF, PARAMS, FROZEN = nnx.split(
    Gaussian(2, 16, 1, 3, scale=1.0, rngs=nnx.Rngs(0)), nnx.Param, ...
)
DRAW = np.random.default_rng(0)
X = DRAW.uniform(-1, 1, (64, 2)).astype(np.float32)
BATCH = (X, np.sin(3 * X[:, :1]) * X[:, 1:])


def loss(params, frozen, batch, key):
    x, y = batch
    return jnp.mean((nnx.merge(GRAPHDEF, params, FROZEN)(x) - y) ** 2), {}


def onebit(**kwargs):
    return onebit_adam(1e-2, axis_name="data", v_floor=0.0, **kwargs)


def build(optimizer, sizes, stage, **kwargs):
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    return make_train_step(loss, optimizer, mesh, PARAMS, worker_axis="data", stage=stage, **kwargs)


def train(optimizer, sizes, stages, batch=BATCH, **kwargs):
    steps = {stage: build(optimizer, sizes, stage, **kwargs) for stage in dict.fromkeys(stages)}
    first = steps[stages[0]]
    state, losses = first.init(PARAMS), []
    placed = shard_batch(first.mesh, batch)
    for stage in stages:
        state, metrics = steps[stage].step(state, placed)
        losses.append(float(metrics["loss"]))
    return state, losses


STAGES = ["warmup"] * 5 + ["compressed"] * 10


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 4, "model": 2}, {"data": 2, "model": 4}])
def test_replicas_stay_equal_by_hash_and_training_works(sizes, assert_replicas_equal):
    state, losses = train(onebit(), sizes, STAGES)
    assert_replicas_equal((state.params, state.opt_state))
    assert losses[-1] < losses[0]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("sizes", [{"data": 2}, {"data": 2, "model": 2}])
@pytest.mark.parametrize("options", [{}, {"error_feedback": False}])
def test_one_program_with_both_stages_equals_two(sizes, options):
    by_count, _ = train(onebit(warmup_steps=2, **options), sizes, [None] * 4)
    by_stage, _ = train(onebit(**options), sizes, ["warmup"] * 2 + ["compressed"] * 2)
    chex.assert_trees_all_close(by_count.params, by_stage.params, rtol=1e-5, atol=1e-6)


def test_the_warm_up_is_the_plain_data_parallel_step():
    adam = optax.chain(onebit_adam(1e-2, warmup_steps=99))
    plain = make_train_step(loss, adam, make_mesh({"data": 8}), PARAMS)
    expected = plain.init(PARAMS)
    for _ in range(5):
        expected, metrics = plain.step(expected, shard_batch(plain.mesh, BATCH))
    state, losses = train(onebit(), {"data": 8}, ["warmup"] * 5)
    chex.assert_trees_all_close(state.params, expected.params, atol=1e-5)
    assert losses[-1] == pytest.approx(float(metrics["loss"]), rel=1e-5)


def test_eight_devices_give_what_eight_workers_on_one_give():
    """The compressed step on a mesh against `vmap` over workers on one device."""
    tx = onebit()
    state, _ = train(tx, {"data": 8}, STAGES)
    shards = jax.tree.map(lambda x: x.reshape(8, 8, *x.shape[1:]), BATCH)
    params = PARAMS
    opt = jax.jit(jax.vmap(lambda _: tx.init(params), axis_name="data"))(jnp.arange(8))

    @partial(jax.jit, static_argnames="stage")
    def step(params, opt, stage):
        grads = jax.vmap(lambda b: jax.grad(loss, has_aux=True)(params, (), b, None)[0])(shards)
        one = lambda g, s: tx.update(g, s, params, stage=stage)
        updates, opt = jax.vmap(one, axis_name="data")(grads, opt)
        return optax.apply_updates(params, jax.tree.map(lambda u: u[0], updates)), opt

    for stage in STAGES:
        params, opt = step(params, opt, stage)
    chex.assert_trees_all_close(state.params, params, atol=1e-4)


def test_state_of_workers_has_their_axis_and_no_other():
    built = build(onebit(), {"data": 4, "model": 2}, "compressed")
    state = built.init(PARAMS)
    onebit_state = state.opt_state[0]
    kernel = onebit_state.carried.value["layers"][1]["kernel"][...]
    assert kernel.shape == (4, 16, 16)
    assert kernel.sharding.spec == P("data", "model", None)
    server = onebit_state.server_error.value["layers"][1]["kernel"][...]
    assert server.shape == (4, 2 * 32)  # 8 x 16 on a device, in 4 chunks
    assert server.sharding.spec == P("data", ("model",))
    assert onebit_state.m["layers"][1]["kernel"][...].sharding.spec == P("model", None)


def test_the_compressed_step_sends_bits_and_scales_only(collectives):
    found = collectives(build(onebit(), {"data": 8}, "compressed"), BATCH, PARAMS)
    assert sum(kind == "all-to-all" and dtype == "u8" for kind, dtype, _ in found) == 1
    leaves = len(jax.tree.leaves(PARAMS))
    for kind, dtype, shape in found:
        size = np.prod([int(n) for n in shape.split(",") if n] or [1])
        assert dtype == "u8" or size <= 8 * leaves, (kind, dtype, shape)


def test_the_warm_up_holds_no_packed_exchange(collectives):
    found = collectives(build(onebit(), {"data": 8}, "warmup"), BATCH, PARAMS)
    assert {kind for kind, *_ in found} == {"all-reduce"}


def test_tensor_sharding_adds_no_collective_to_the_compressed_exchange():
    """On 4 x 2 the model axis carries what the forward and backward pass need, no more."""

    def over_model(built):
        state = jax.eval_shape(built.init, PARAMS)
        report = wire_bytes(built.step.lower(state, BATCH).compile(), built.mesh)
        assert not report.notes
        return [(r.kind, r.dtype, r.count, r.bytes_sent) for r in report.rows if "model" in r.axes]

    sizes = {"data": 4, "model": 2}
    plain = make_train_step(loss, optax.adam(1e-2), make_mesh(sizes), PARAMS)
    assert over_model(build(onebit(), sizes, "compressed")) == over_model(plain)


def test_the_compressed_step_sends_exactly_its_bytes():
    """Bits, each tensor's chunk in whole bytes and rows of 128, out and back, and the scales."""
    built = build(onebit(), {"data": 8}, "compressed")
    state = jax.eval_shape(built.init, PARAMS)
    report = wire_bytes(built.step.lower(state, BATCH).compile(), built.mesh)
    sizes = [x.size for x in jax.tree.leaves(PARAMS)]
    row = sum(math.prod(packed_shape(chunk_length(n, 8))) for n in sizes)
    row += -row % 128
    assert report.total(kind="all-to-all", dtype="u8") == 7 * row
    assert report.total(kind="all-gather", dtype="u8") == 7 * row
    # Scales of both phases, gathered, and the mean loss.
    scales = report.total(dtype="f32")
    assert scales == 2 * 7 * 4 * len(sizes) + 2 * 7 / 8 * 4


def test_one_worker_whose_tensors_are_split(assert_replicas_equal):
    state, losses = train(onebit(), {"data": 1, "model": 2}, STAGES)
    assert losses[-1] < losses[0]
    assert_replicas_equal((state.params, state.opt_state))


def test_one_worker_on_a_mesh_is_the_one_worker_algorithm():
    state, _ = train(onebit(), {"data": 1}, STAGES)
    tx = onebit_adam(1e-2, v_floor=0.0)
    params, opt = PARAMS, tx.init(PARAMS)

    @partial(jax.jit, static_argnames="stage")
    def step(params, opt, stage):
        grads = jax.grad(loss, has_aux=True)(params, (), BATCH, None)[0]
        updates, opt = tx.update(grads, opt, params, stage=stage)
        return optax.apply_updates(params, updates), opt

    for stage in STAGES:
        params, opt = step(params, opt, stage)
    chex.assert_trees_all_close(state.params, params, atol=1e-4)


def test_a_worker_axis_that_is_not_there_or_not_used_is_named():
    with pytest.raises(ValueError, match="'pod' is no axis"):
        make_train_step(loss, onebit(), make_mesh({"data": 8}), PARAMS, worker_axis="pod")
    alone = make_train_step(
        loss, optax.sgd(0.1), make_mesh({"data": 8}), PARAMS, worker_axis="data"
    )
    with pytest.raises(ValueError, match="differ between the workers of 'data'"):
        alone.step.lower(jax.eval_shape(alone.init, PARAMS), BATCH)
    with pytest.raises(ValueError, match="no axis 'data' here"):
        make_train_step(loss, onebit(), make_mesh({"data": 8}), PARAMS, stage="compressed")


def test_local_gradients_are_local_and_compile_no_collective():
    mesh = make_mesh({"data": 8})
    value_and_grad = local_value_and_grad(lambda w, x: jnp.mean((x - w) ** 2), "data")
    local = jax.jit(
        jax.shard_map(
            lambda w, x: jax.tree.map(lambda v: v[None], value_and_grad(w, x)),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P("data"),
        )
    )
    x = np.arange(8, dtype=np.float32)
    _, grads = local(jnp.float32(1), x)
    np.testing.assert_allclose(grads, 2 * (1 - x))
    assert "all-reduce" not in local.lower(jnp.float32(1), x).compile().as_text()


def test_an_average_that_comes_too_early_is_refused():
    averaging = optax.stateless(lambda g, _: jax.lax.pmean(g, "data"))
    optimizer = optax.chain(averaging, onebit())
    with pytest.raises(ValueError, match="same on all workers"):
        train(optimizer, {"data": 8}, ["compressed"])


def test_microbatches_in_workers():
    whole, _ = train(onebit(), {"data": 4, "model": 2}, STAGES)
    parts, _ = train(onebit(), {"data": 4, "model": 2}, STAGES, microbatches=4)
    chex.assert_trees_all_close(whole.params, parts.params, atol=1e-4)


def test_a_nan_on_one_worker_skips_the_step_on_all(assert_replicas_equal):
    optimizer = skip_nonfinite(onebit(), axis_name="data")
    good, _ = train(optimizer, {"data": 4, "model": 2}, STAGES)
    x = X.copy()
    x[3] = np.nan  # one row, of worker 0
    built = build(optimizer, {"data": 4, "model": 2}, "compressed")
    before = jax.tree.map(np.asarray, (good.params, good.opt_state.inner))
    after, _ = built.step(good, shard_batch(built.mesh, (x, BATCH[1])))
    assert int(after.opt_state.skipped) == 1
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, (after.params, after.opt_state.inner)), before
    )
    assert_replicas_equal((after.params, after.opt_state))
    again, metrics = built.step(after, shard_batch(built.mesh, BATCH))
    assert np.isfinite(float(metrics["loss"]))
    assert int(again.opt_state.skipped) == 1


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 4, "model": 2}])
def test_clipping_uses_the_norms_of_all_workers_and_shards(sizes):
    """sqrt(mean over workers of ||g_i||^2), whatever the tensor sharding."""
    n = sizes["data"]
    shards = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), BATCH)
    of_worker = lambda b: jax.grad(loss, has_aux=True)(PARAMS, (), b, None)[0]
    grads = jax.jit(jax.vmap(of_worker))(shards)
    rms = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)) / n)
    step_of = lambda factor: optax.chain(
        clip_by_global_norm(factor * rms, "data"),
        optax.stateless(lambda g, _: jax.lax.pmean(g, "data")),
        optax.scale(-1.0),
    )
    mean = jax.tree.map(lambda g: g.mean(axis=0), grads)
    for factor, expected in ((0.25, 0.25), (4.0, 1.0)):
        state, _ = train(step_of(factor), sizes, [None])
        moved = jax.tree.map(lambda a, b: a - b, PARAMS, state.params)
        chex.assert_trees_all_close(
            moved, jax.tree.map(lambda g, e=expected: e * g, mean), atol=1e-6
        )


def test_econtrol_through_the_same_builder(assert_replicas_equal, collectives):
    optimizer = econtrol(0.05, TopK(fraction=0.1), axis_name="data")
    state, losses = train(optimizer, {"data": 4, "model": 2}, ["first"] + ["rest"] * 30)
    assert_replicas_equal((state.params, state.opt_state))
    assert losses[-1] < losses[0]
    found = collectives(build(optimizer, {"data": 8}, "rest"), BATCH, PARAMS)
    total = sum(x.size for x in jax.tree.leaves(PARAMS))
    for _, _, shape in found:
        assert np.prod([int(n) for n in shape.split(",") if n] or [1]) <= 8 * 0.1 * total + 8


@pytest.mark.parametrize(
    ("policy", "value", "shape", "expected"),
    [
        ("mean", [[1.0], [3.0]], (4, 1), [[2.0]] * 4),
        ("zeros", [[1.0], [3.0]], (1, 1), [[0.0]]),
        ("concatenate", [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]], (3, 2), [[1.0, 2], [3, 4], [5, 0]]),
        ("concatenate", [[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]], (1, 5), [[1.0, 2, 3, 4, 5]]),
        ("concatenate", [[1.0, 2.0, 3.0, 4.0, 5.0]], (4, 2), [[1.0, 2], [3, 4], [5, 0], [0, 0]]),
    ],
)
def test_another_number_of_workers(policy, value, shape, expected):
    resized = resize_workers(PerWorker({"w": jnp.array(value)}, policy), {"w": shape})
    np.testing.assert_array_equal(resized.value["w"], expected)
    assert resized.on_resize == policy
