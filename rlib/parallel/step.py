"""The step builder: from a loss and an optimiser to a sharded, jitted training step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from rlib.collectives import vary, varying_axes
from rlib.parallel.sharding import (
    LOGICAL_AXIS_RULES,
    Tree,
    batch_spec,
    data_axis_size,
    named,
    parameter_specs,
    state_specs,
)
from rlib.parallel.workers import is_per_worker, local_value_and_grad

#: loss_fn(params, frozen, batch, key) -> (mean loss over the batch, dictionary of scalars)
LossFn = Callable[[Tree, Tree, Tree, Array], tuple[Float[Array, ""], dict[str, Array]]]
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that a training needs to go on.

    Fields:
        step: steps done, int32.
        phase, phase_start: which phase of a training the next step belongs to, and `step` at its
            beginning; `training.fit` sets them.
        params: what the optimiser changes.
        opt_state: the optimiser's state.
        frozen: what the loss needs beside, unchanged by steps (constants of the model).
        key: a typed key; a step uses `fold_in(key, step)`.
    """

    step: Int[Array, ""]
    phase: Int[Array, ""]
    phase_start: Int[Array, ""]
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
        check: (first step, metrics of some steps from there on) -> None, raises where a training
            is to stop; on the host, between device calls. None for no check.
    """

    init: Callable[..., TrainState]
    step: Callable[[TrainState, Tree], tuple[TrainState, Metrics]]
    shardings: TrainState
    mesh: Mesh
    check: Callable[[int, dict[str, Any]], None] | None = None


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    params: Tree,
    frozen: Tree = (),
    *,
    microbatches: int = 1,
    worker_axis: str | None = None,
    stage: str | None = None,
    rules: Mapping[str, str | None] = LOGICAL_AXIS_RULES,
) -> TrainStep:
    """Build the training step of a model on a mesh.

    The batch is split over the data axis, parameters by their logical names. In the plain form the
    compiler adds the communication. With `worker_axis` the optimiser does: it gets the gradients
    of its worker alone, each device those of its own parameter shards, in a `shard_map` over all
    axes, and whatever it leaves alone is not communicated.

    Steps that share `init`'s state may differ in everything but shapes.

    Args:
        loss_fn: a mean over the batch's leading axis.
        optimizer: any optax transformation; with `worker_axis` one whose updates come out the same
            on all workers.
        mesh: from `make_mesh`, or from `topology` to compile for a machine one does not own.
        params, frozen: arrays or their `eval_shape`; only shapes, dtypes and names are read.
        microbatches: the batch is cut into that many parts (per device, along its rows), and their
            gradients are averaged in a scan: less memory, and on a CPU a working set that stays
            in cache. The rows per device must divide by it.
        worker_axis: mesh axis of the workers that a distributed optimiser talks over.
        stage: passed to `optimizer.update`; static, so that the program of one stage holds that
            stage's collectives only.
        rules: mesh axis of each logical name.

    Raises:
        ValueError: `worker_axis` is no axis of the mesh; while tracing: rows that do not divide.

    Example:
        >>> import optax
        >>> from rlib.parallel import make_mesh
        >>> loss = lambda w, _, batch, key: (jnp.mean((batch - w) ** 2), {})
        >>> train = make_train_step(loss, optax.sgd(0.5), make_mesh({"data": -1}), jnp.zeros(()))
        >>> state, metrics = train.step(train.init(jnp.zeros(())), jnp.ones((8,)))
        >>> float(state.params), float(metrics["loss"])
        (1.0, 1.0)
    """
    if worker_axis is not None and worker_axis not in mesh.axis_names:
        raise ValueError(f"worker_axis {worker_axis!r} is no axis of the mesh {dict(mesh.shape)}")
    abstract, abstract_frozen = jax.eval_shape(lambda tree: tree, (params, frozen))
    specs = parameter_specs(mesh, abstract, rules)
    if worker_axis is None:
        rows = batch_spec(mesh)
        if microbatches > 1 and data_axis_size(mesh) > 1:
            # By hand: the compiler would reduce the gradients of every microbatch.
            gradients = _local_gradients(loss_fn, mesh, specs, rows[0], microbatches, mean=True)
        else:
            gradients = _averaged(jax.value_and_grad(loss_fn, has_aux=True), microbatches)
        init_optimizer, update, opt_specs = _plain(optimizer, abstract, specs, stage)
    else:
        rows = P(worker_axis)
        gradients = _local_gradients(loss_fn, mesh, specs, worker_axis, microbatches, mean=False)
        init_optimizer, update, opt_specs = _manual(
            optimizer, mesh, abstract, specs, worker_axis, stage
        )
    replicated: Any = NamedSharding(mesh, P())
    shardings = TrainState(
        step=replicated,
        phase=replicated,
        phase_start=replicated,
        params=named(mesh, specs),
        opt_state=named(mesh, opt_specs),
        frozen=named(mesh, parameter_specs(mesh, abstract_frozen, rules)),
        key=replicated,
    )

    def init(params: Tree, frozen: Tree = (), key: Array | None = None) -> TrainState:
        key = jax.random.key(0) if key is None else key
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, zero, params, init_optimizer(params), frozen, key)

    def step(state: TrainState, batch: Tree) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for layers that split by hand
            (loss, metrics), grads = gradients(state.params, state.frozen, batch, key)
        params, opt_state = update(grads, state.opt_state, state.params)
        metrics = {"loss": loss, **metrics}
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return TrainStep(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step,
            in_shardings=(shardings, NamedSharding(mesh, rows)),
            out_shardings=(shardings, None),
            donate_argnums=0,
        ),
        shardings=shardings,
        mesh=mesh,
    )


def _updater(optimizer: optax.GradientTransformation, stage: str | None):
    """init, and (grads, state, params) -> (params, state)."""
    transform = optax.with_extra_args_support(optimizer)
    extra = {} if stage is None else {"stage": stage}

    def update(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        updates, state = transform.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return transform.init, update


def _plain(optimizer: optax.GradientTransformation, params: Tree, specs: Tree, stage: str | None):
    """The optimiser under automatic sharding: init, update and the state's specs."""
    init, update = _updater(optimizer, stage)
    return init, update, state_specs(jax.eval_shape(init, params), params, specs)


def _manual(
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    params: Tree,
    specs: Tree,
    worker_axis: str,
    stage: str | None,
):
    """As `_plain`, for a distributed optimiser: each device handles its own shards."""
    init, update = _updater(optimizer, stage)
    shards = jax.shard_map(
        lambda p: (p, init(p)), mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False
    )
    params_shard, state_shard = jax.eval_shape(shards, params)
    opt_specs = state_specs(state_shard, params_shard, specs, worker_axis)

    def outside(state: Tree) -> Tree:
        return jax.tree.map(
            lambda node: (
                jax.tree.map(lambda x: x[None], vary(node, worker_axis))
                if is_per_worker(node)
                else node
            ),
            state,
            is_leaf=is_per_worker,
        )

    def inside(state: Tree) -> Tree:
        return jax.tree.map(
            lambda node: jax.tree.map(lambda x: x[0], node) if is_per_worker(node) else node,
            state,
            is_leaf=is_per_worker,
        )

    def init_shards(params: Tree) -> Tree:
        return outside(init(params))

    def update_shards(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        grads = jax.tree.map(lambda x: x[0], grads)
        params, state = update(grads, inside(state), params)
        if any(worker_axis in varying_axes(leaf) for leaf in jax.tree.leaves(params)):
            raise ValueError(
                f"the optimiser's updates differ between the workers of {worker_axis!r}: build it "
                f"with axis_name={worker_axis!r}, or leave worker_axis out"
            )
        return params, outside(state)

    stacked = _stacked(specs, worker_axis)
    return (
        jax.shard_map(init_shards, mesh=mesh, in_specs=(specs,), out_specs=opt_specs),
        jax.shard_map(
            update_shards,
            mesh=mesh,
            in_specs=(stacked, opt_specs, specs),
            out_specs=(specs, opt_specs),
        ),
        opt_specs,
    )


def _stacked(specs: Tree, worker_axis: str) -> Tree:
    return jax.tree.map(
        lambda spec: P(worker_axis, *spec), specs, is_leaf=lambda node: isinstance(node, P)
    )


def _local_gradients(
    loss_fn: LossFn, mesh: Mesh, specs: Tree, axis: str, microbatches: int, *, mean: bool
) -> Callable[..., Any]:
    """Gradients computed per worker: stacked along a leading axis, or their mean.

    Manual over the worker axis alone: the compiler still splits the model over the others.
    """
    compute = _averaged(local_value_and_grad(loss_fn, axis, has_aux=True), microbatches)

    def of_worker(params: Tree, frozen: Tree, batch: Tree, key: Array) -> tuple[Any, Tree]:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        value, grads = compute(params, frozen, batch, key)
        if mean:
            return jax.lax.pmean((value, grads), axis)
        return jax.lax.pmean(value, axis), jax.tree.map(lambda x: x[None], grads)

    mapped = jax.shard_map(
        of_worker,
        mesh=mesh,
        axis_names={axis},
        in_specs=(P(), P(), P(axis), P()),
        out_specs=(P(), P() if mean else P(axis)),
    )
    placed = named(mesh, specs if mean else _stacked(specs, axis))

    def gradients(params: Tree, frozen: Tree, batch: Tree, key: Array) -> tuple[Any, Tree]:
        value, grads = mapped(params, frozen, batch, key)
        return value, jax.lax.with_sharding_constraint(grads, placed)

    return gradients


def _averaged(compute: Callable[..., Any], microbatches: int) -> Callable[..., Any]:
    """Value and gradient of a batch as the mean over its parts."""
    if microbatches == 1:
        return compute

    def averaged(params: Tree, frozen: Tree, batch: Tree, key: Array) -> tuple[Any, Tree]:
        def part(index: Array, rows: Tree) -> tuple[Any, Tree]:
            return compute(params, frozen, rows, jax.random.fold_in(key, index))

        def add(total: Any, xs: tuple[Array, Tree]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, part(*xs)), None

        rows = jax.tree.map(lambda x: _cut(x, microbatches), batch)
        first = part(jnp.int32(0), jax.tree.map(lambda x: x[0], rows))
        rest = jax.tree.map(lambda x: x[1:], rows)
        total, _ = jax.lax.scan(add, first, (jnp.arange(1, microbatches), rest))
        return jax.tree.map(lambda x: x / microbatches, total)

    return averaged


def _cut(x: Array, parts: int) -> Array:
    """(rows, ...) -> (parts, rows / parts, ...)."""
    if x.shape[0] % parts:
        raise ValueError(f"{x.shape[0]} rows on a device do not divide into {parts} microbatches")
    return x.reshape(parts, -1, *x.shape[1:])
