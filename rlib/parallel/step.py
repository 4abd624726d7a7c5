"""The step builder: from a loss and an optimiser to a sharded, jitted training step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from rlib.parallel.sharding import (
    LOGICAL_AXIS_RULES,
    Tree,
    batch_spec,
    data_axis_size,
    named,
    parameter_specs,
    state_specs,
)

#: loss_fn(params, frozen, batch, key) -> (mean loss over the batch, dictionary of scalars)
LossFn = Callable[[Tree, Tree, Tree, Array], tuple[Float[Array, ""], dict[str, Array]]]
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that a training needs to go on.

    Fields:
        step: steps done, int32.
        params: what the optimiser changes.
        opt_state: the optimiser's state.
        frozen: what the loss needs beside, unchanged by steps (constants of the model).
        key: a typed key; a step uses `fold_in(key, step)`.
    """

    step: Int[Array, ""]
    params: Tree
    opt_state: Tree
    frozen: Tree
    key: Key[Array, ""]


class TrainStep(NamedTuple):
    """A training on a mesh.

    Fields:
        init: (params, frozen, key) -> TrainState, placed by `shardings`.
        step: (state, batch) -> (state, metrics); jitted, donates the state. `metrics` holds
            "loss" and what the loss function returned, averaged over microbatches.
        shardings: TrainState of NamedShardings.
        mesh: the mesh.
    """

    init: Callable[..., TrainState]
    step: Callable[[TrainState, Tree], tuple[TrainState, Metrics]]
    shardings: TrainState
    mesh: Mesh


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    params: Tree,
    frozen: Tree = (),
    *,
    microbatches: int = 1,
    rules: Mapping[str, str | None] = LOGICAL_AXIS_RULES,
) -> TrainStep:
    """Build the training step of a model on a mesh.

    The batch is split over the data axis, parameters by their logical names; the compiler adds the
    communication. Everything but shapes may differ between the trainings that share a step.

    Args:
        loss_fn: a mean over the batch's leading axis.
        optimizer: any optax transformation.
        mesh: from `make_mesh`, or from `topology` to compile for a machine one does not own.
        params, frozen: arrays or their `eval_shape`; only shapes, dtypes and names are read.
        microbatches: the batch is cut into that many parts (per device, along its rows), and their
            gradients are averaged in a scan: less memory, and on a CPU a working set that stays
            in cache. The rows per device must divide by it.
        rules: mesh axis of each logical name.

    Example:
        >>> import optax
        >>> from rlib.parallel import make_mesh
        >>> loss = lambda w, _, batch, key: (jnp.mean((batch - w) ** 2), {})
        >>> train = make_train_step(loss, optax.sgd(0.5), make_mesh({"data": -1}), jnp.zeros(()))
        >>> state, metrics = train.step(train.init(jnp.zeros(())), jnp.ones((8,)))
        >>> float(state.params), float(metrics["loss"])
        (1.0, 1.0)
    """
    abstract = jax.eval_shape(lambda tree: tree, (params, frozen))
    specs = parameter_specs(mesh, abstract[0], rules)
    abstract_opt = jax.eval_shape(optimizer.init, abstract[0])
    shardings = TrainState(
        step=NamedSharding(mesh, P()),  # type: ignore[arg-type]
        params=named(mesh, specs),
        opt_state=named(mesh, state_specs(abstract_opt, abstract[0], specs)),
        frozen=named(mesh, parameter_specs(mesh, abstract[1], rules)),
        key=NamedSharding(mesh, P()),  # type: ignore[arg-type]
    )

    def init(params: Tree, frozen: Tree = (), key: Array | None = None) -> TrainState:
        key = jax.random.key(0) if key is None else key
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), frozen, key)

    def gradients(state: TrainState, batch: Tree, key: Array) -> tuple[Metrics, Tree]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.frozen, batch, key
        )
        return {"loss": loss, **metrics}, grads

    def accumulated(state: TrainState, batch: Tree, key: Array) -> tuple[Metrics, Tree]:
        parts = jax.tree.map(lambda x: _cut(x, microbatches, mesh), batch)

        def add(total: Any, part: tuple[Array, Tree]) -> tuple[Any, None]:
            index, rows = part
            return jax.tree.map(
                jnp.add, total, gradients(state, rows, jax.random.fold_in(key, index))
            ), None

        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, state, first, key)
        )
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(microbatches), parts))
        return jax.tree.map(lambda x: x / microbatches, total)

    def step(state: TrainState, batch: Tree) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        compute = gradients if microbatches == 1 else accumulated
        metrics, grads = compute(state, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.frozen, state.key), metrics

    return TrainStep(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step,
            in_shardings=(shardings, named(mesh, batch_spec(mesh))),
            out_shardings=(shardings, None),
            donate_argnums=0,
        ),
        shardings=shardings,
        mesh=mesh,
    )


def _cut(x: Array, parts: int, mesh: Mesh) -> Array:
    """(rows, ...) -> (parts, rows / parts, ...), where each device cuts its own rows."""
    shards = data_axis_size(mesh)
    if x.shape[0] % (shards * parts):
        raise ValueError(
            f"{x.shape[0]} rows do not divide into {parts} microbatches on each of {shards} devices"
        )
    rows = x.shape[0] // (shards * parts)
    x = x.reshape(shards, parts, rows, *x.shape[1:]).swapaxes(0, 1)
    x = jax.lax.with_sharding_constraint(x, named(mesh, batch_spec(mesh, 1)))
    return x.reshape(parts, shards * rows, *x.shape[3:])
