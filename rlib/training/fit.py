"""The training loop: many steps per device call."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from rlib.parallel import TrainState, TrainStep, batch_spec, place

Tree = Any
History = dict[str, np.ndarray]
BatchAt = Callable[[Tree, Int[Array, ""]], Tree]


class Phase(NamedTuple):
    """Steps of one program, for example a warm-up.

    Fields:
        train: the step; the phases of a training share the shapes of its state.
        steps: calls of `train.step`, at most.
        until: asked between device calls, with the state; True ends the phase.
    """

    train: TrainStep
    steps: int
    until: Callable[[TrainState], bool] | None = None


def whole_batch(data: Tree, step: Int[Array, ""]) -> Tree:
    """Every step sees all the data."""
    return data


def fit(
    phases: Sequence[Phase],
    state: TrainState,
    data: Tree | Iterator[Tree],
    *,
    batch_at: BatchAt = whole_batch,
    chunk: int = 100,
    on_chunk: Callable[[TrainState, History], None] | None = None,
) -> tuple[TrainState, History]:
    """Train until the phases are done; continues where `state` stands.

    `chunk` steps run as one device call, and the host looks at metrics and time in between only.
    A phase is compiled once, whatever the number of steps; the state's buffers are donated.

    Args:
        phases: in order; `state.phase` says which one comes next.
        state: from `train.init` or a checkpoint. Its buffers are used up.
        data: device-resident arrays, from which `batch_at` picks a batch inside the compiled loop,
            or an iterator of host batches, which must stand where `state` does. With several
            processes each one's iterator gives its own rows of the batch
            (`data.stream(process_index=..., process_count=...)`).
        batch_at: (data, step) -> batch, all data if not given; a module-level function,
            since it is a key of jit's cache.
        chunk: steps per device call; about 2 s of work or less keeps Ctrl-C kind.
        on_chunk: called after each chunk with the state and the metrics since `fit` began.

    Returns:
        The state, and for every metric its values, one per step done here.

    Raises:
        ValueError: `chunk` below 1.

    >>> import optax
    >>> from rlib.parallel import make_mesh, make_train_step
    >>> loss = lambda w, _, batch, key: (jnp.mean((batch - w) ** 2), {})
    >>> train = make_train_step(loss, optax.sgd(0.25), make_mesh({"data": -1}), jnp.zeros(()))
    >>> state, history = fit([Phase(train, steps=3)], train.init(jnp.zeros(())), jnp.ones(8))
    >>> float(state.params), history["loss"].tolist()
    (0.875, [1.0, 0.25, 0.0625])
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: a device call runs at least one step")
    history: dict[str, list[np.ndarray]] = {}
    done, start = int(state.step), int(state.phase_start)
    for index in range(int(state.phase), len(phases)):
        train, steps, until = phases[index]
        while done - start < steps:
            if until is not None and done > start and until(state):
                break
            count = min(chunk, start + steps - done)
            if isinstance(data, Iterator):
                batches = _block(data, count, chunk, train)
                state, metrics = _run_streamed(state, batches, count, chunk, train.step)
            else:
                state, metrics = _run_resident(state, data, count, chunk, train.step, batch_at)
            for name, values in metrics.items():
                history.setdefault(name, []).append(np.asarray(values)[:count])
            done += count
            if on_chunk is not None:
                on_chunk(state, _joined(history))
        if index + 1 < len(phases):
            start = done
            phase, phase_start = place(train.mesh, (np.int32(index + 1), np.int32(start)))
            state = state._replace(phase=phase, phase_start=phase_start)
    return state, _joined(history)


def _joined(history: dict[str, list[np.ndarray]]) -> History:
    return {name: np.concatenate(values) for name, values in history.items()}


def _block(data: Iterator[Tree], count: int, chunk: int, train: TrainStep) -> Tree:
    """`count` host batches, stacked and padded to `chunk`, on the mesh."""
    batches = list(islice(data, count))
    if len(batches) < count:
        raise ValueError(f"the data ended after {len(batches)} batches; {count} more were needed")
    batches += batches[-1:] * (chunk - count)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    sharding = NamedSharding(train.mesh, batch_spec(train.mesh, 1))
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, rows), stacked
    )


def _steps(
    state: TrainState, batch_of: Callable[[Array, TrainState], Tree], count: Array, chunk: int, step
) -> tuple[TrainState, Tree]:
    """Run `count` steps; metrics fill the first `count` of `chunk` places."""
    shapes = jax.eval_shape(lambda s: step(s, batch_of(jnp.int32(0), s))[1], state)
    metrics = jax.tree.map(lambda x: jnp.zeros((chunk, *x.shape), x.dtype), shapes)

    def body(i: Array, carry: tuple[TrainState, Tree]) -> tuple[TrainState, Tree]:
        state, metrics = carry
        state, new = step(state, batch_of(i, state))
        return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), metrics, new)

    return jax.lax.fori_loop(0, count, body, (state, metrics))


@partial(jax.jit, static_argnames=("chunk", "step", "batch_at"), donate_argnames="state")
def _run_resident(state, data, count, chunk, step, batch_at):
    return _steps(state, lambda _, s: batch_at(data, s.step), count, chunk, step)


@partial(jax.jit, static_argnames=("chunk", "step"), donate_argnames="state")
def _run_streamed(state, batches, count, chunk, step):
    batch_of = lambda i, _: jax.tree.map(lambda x: x[i], batches)
    return _steps(state, batch_of, count, chunk, step)
