"""The step builder: eight devices give what one gives, with the communication that is needed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from rlib.nn import Siren
from rlib.parallel import (
    make_mesh,
    make_train_step,
    parameter_specs,
    shard_batch,
    state_specs,
    wire_bytes,
)

X = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
BATCH = (X, np.sin(9 * X))
GRAPHDEF, PARAMS, FROZEN = nnx.split(Siren(1, 16, 1, 3, rngs=nnx.Rngs(0)), nnx.Param, ...)


def loss(params, frozen, batch, key):
    x, y = batch
    error = nnx.merge(GRAPHDEF, params, frozen)(x) - y
    return jnp.mean(error**2), {"absolute": jnp.mean(jnp.abs(error)), "step": jnp.float32(3)}


def train(sizes, steps=5, devices=None, **kwargs):
    mesh = make_mesh(sizes, devices)
    built = make_train_step(loss, optax.adam(1e-3), mesh, PARAMS, FROZEN, **kwargs)
    state, history = built.init(PARAMS, FROZEN, jax.random.key(3)), []
    batch = shard_batch(mesh, BATCH)
    for _ in range(steps):
        state, metrics = built.step(state, batch)
        history.append(metrics)
    return built, state, history


@pytest.fixture(scope="module")
def one():
    return train({"data": 1}, devices=jax.devices()[:1])


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 4, "model": 2}, {"model": 8}])
def test_many_devices_give_the_numbers_of_one(sizes, one):
    _, state, history = train(sizes)
    chex.assert_trees_all_close(state.params, one[1].params, atol=1e-5)
    chex.assert_trees_all_close(history, one[2], rtol=1e-4, atol=1e-5)


def test_one_step_is_the_optimisers_own_update(one):
    built = one[0]
    state, metrics = built.step(built.init(PARAMS, FROZEN, jax.random.key(3)), BATCH)
    key = jax.random.fold_in(jax.random.key(3), 0)
    (value, more), grads = jax.value_and_grad(loss, has_aux=True)(PARAMS, FROZEN, BATCH, key)
    updates, _ = optax.adam(1e-3).update(grads, optax.adam(1e-3).init(PARAMS), PARAMS)
    chex.assert_trees_all_close(state.params, optax.apply_updates(PARAMS, updates), atol=1e-6)
    chex.assert_trees_all_close(metrics, {"loss": value, **more}, rtol=1e-5)


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 4}])
def test_microbatches_average_to_the_whole_batch(sizes, one):
    devices = jax.devices()[: sizes["data"]]
    _, state, history = train(sizes, devices=devices, microbatches=4)
    chex.assert_trees_all_close(state.params, one[1].params, atol=1e-5)
    chex.assert_trees_all_close(
        [h["loss"] for h in history], [h["loss"] for h in one[2]], rtol=1e-4
    )


def test_rows_that_do_not_cut_are_refused():
    with pytest.raises(ValueError, match="7 microbatches"):
        train({"data": 8}, microbatches=7)


def test_data_parallel_step_only_reduces_gradients_and_metrics(one, collectives):
    kinds = lambda built: [kind for kind, *_ in collectives(built, BATCH, PARAMS, FROZEN)]
    assert kinds(one[0]) == []
    found = kinds(train({"data": 8}, steps=0)[0])
    assert set(found) == {"all-reduce"}
    leaves = len(jax.tree.leaves(PARAMS))
    assert len(found) <= leaves + 2


def test_microbatches_communicate_once_not_once_a_part():
    """Exactly the bytes of one mean of the gradients and of the three metrics."""
    built, *_ = train({"data": 8}, steps=0, microbatches=4)
    state = jax.eval_shape(built.init, PARAMS, FROZEN, jax.random.key(0))
    sent = wire_bytes(built.step.lower(state, BATCH).compile(), built.mesh)
    size = sum(x.size for x in jax.tree.leaves(PARAMS))
    assert sent.total() == 4 * (size + 3) * 2 * 7 / 8
    assert sent.notes == ()


def test_parameters_live_where_their_names_say():
    built, state, _ = train({"data": 4, "model": 2}, steps=1)
    kernel = state.params["layers"][1]["kernel"][...]
    assert kernel.sharding.spec == P("model", None)
    moments = state.opt_state[0].mu["layers"][1]["kernel"][...]
    assert moments.sharding.spec == P("model", None)
    assert {s.data.shape for s in moments.addressable_shards} == {(8, 16)}
    assert built.shardings.step.spec == P()


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        optax.masked(optax.adam(1e-3), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        optax.inject_hyperparams(optax.adam)(1e-3),
        optax.adafactor(1e-3, min_dim_size_to_factor=8),
        optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    ],
    ids=["adam", "chain", "masked", "injected", "adafactor", "multisteps"],
)
def test_state_of_any_optimiser_is_placed(optimizer):
    mesh = make_mesh({"data": 4, "model": 2})
    built = make_train_step(loss, optimizer, mesh, PARAMS, FROZEN)
    _, metrics = built.step(built.init(PARAMS, FROZEN), shard_batch(mesh, BATCH))
    assert np.isfinite(metrics["loss"])
    abstract = jax.eval_shape(optimizer.init, PARAMS)
    specs = state_specs(abstract, PARAMS, parameter_specs(mesh, PARAMS))
    for leaf, spec in zip(
        jax.tree.leaves(abstract),
        jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
        strict=True,
    ):
        assert len(spec) <= leaf.ndim


def test_the_state_is_donated_and_nothing_compiles_twice(one):
    built = one[0]
    first = built.init(PARAMS, FROZEN)
    second, _ = built.step(first, BATCH)
    assert jax.tree.leaves(first.params)[0].is_deleted()
    compiled = built.step._cache_size()
    built.step(second, BATCH)
    assert built.step._cache_size() == compiled
