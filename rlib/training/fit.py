"""The training loop: many steps per device call."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from rlib.parallel import TrainState, TrainStep, batch_spec, place

Tree = Any
History = dict[str, np.ndarray]


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


def fit(
    phases: Sequence[Phase],
    state: TrainState,
    data: Tree | Iterator[Tree],
    *,
    chunk: int = 100,
    look: Callable[[TrainState], Mapping[str, Any]] | None = None,
    on_chunk: Callable[[TrainState, History], None] | None = None,
) -> tuple[TrainState, History]:
    """Train until the phases are done; continues where `state` stands.

    `chunk` steps run as one device call, and the host looks at metrics and time in between only.
    A phase is compiled once, whatever the number of steps; the state's buffers are donated.

    Args:
        phases: in order; `state.phase` says which one comes next.
        state: from `train.init` or a checkpoint. Its buffers are used up.
        data: device-resident arrays, all of them the batch of every step, or an iterator of host
            batches, which must stand where `state` does. With several processes each one's
            iterator gives its own rows of the batch
            (`data.stream(process_index=..., process_count=...)`).
        chunk: steps per device call; about 2 s of work or less keeps Ctrl-C kind.
        look: asked after each chunk for more numbers by name, for example held-out losses.
        on_chunk: called after each chunk with the state and the metrics of the chunk.

    Returns:
        The state, and for every metric its values, one per step done here, or per chunk for those
        of `look`.

    Raises:
        ValueError: `chunk` below 1; a name of `look` is that of a metric. What a step's `check`
            raises.

    >>> import optax
    >>> from rlib.parallel import make_mesh, make_train_step
    >>> loss = lambda w, _, batch, key: (jnp.mean((batch - w) ** 2), {})
    >>> train = make_train_step(loss, optax.sgd(0.25), make_mesh({"data": -1}), jnp.zeros(()))
    >>> state, history = fit([Phase(train, steps=3)], train.init(jnp.zeros(())), jnp.ones(8))
    >>> float(state.params), history["loss"].tolist()
    (0.875, [1.0, 0.25, 0.0625])
    >>> look = lambda state: {"w": state.params}
    >>> phases, state = [Phase(train, steps=4)], train.init(jnp.zeros(()))
    >>> fit(phases, state, jnp.ones(8), chunk=2, look=look)[1]["w"].tolist()
    [0.75, 0.9375]
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: a device call runs at least one step")
    chunks: list[History] = []
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
                state, metrics = _run_resident(state, data, count, chunk, train.step)
            chunks.append({name: np.asarray(values)[:count] for name, values in metrics.items()})
            if train.check is not None:
                train.check(done, chunks[-1])
            seen = look(state) if look is not None else {}
            if twice := chunks[-1].keys() & seen.keys():
                raise ValueError(f"look gives {min(twice)!r}, which is a metric of every step")
            chunks[-1] |= {name: np.asarray(value)[None] for name, value in seen.items()}
            done += count
            if on_chunk is not None:
                on_chunk(state, chunks[-1])
        if index + 1 < len(phases):
            start = done
            phase, phase_start = place(train.mesh, (np.int32(index + 1), np.int32(start)))
            state = state._replace(phase=phase, phase_start=phase_start)
    return state, join_histories(chunks)


def join_histories(histories: Iterable[History]) -> History:
    """One history of several that follow each other.

    >>> parts = [{"loss": np.array([3.0, 2.0])}, {"loss": np.array([1.0])}]
    >>> join_histories(parts)["loss"].tolist()
    [3.0, 2.0, 1.0]
    """
    values: dict[str, list[np.ndarray]] = {}
    for history in histories:
        for name, new in history.items():
            values.setdefault(name, []).append(new)
    return {name: np.concatenate(parts) for name, parts in values.items()}


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
    state: TrainState, batch_of: Callable[[Array], Tree], count: Array, chunk: int, step
) -> tuple[TrainState, Tree]:
    """Run `count` steps; metrics fill the first `count` of `chunk` places."""
    shapes = jax.eval_shape(lambda s: step(s, batch_of(jnp.int32(0)))[1], state)
    metrics = jax.tree.map(lambda x: jnp.zeros((chunk, *x.shape), x.dtype), shapes)

    def body(i: Array, carry: tuple[TrainState, Tree]) -> tuple[TrainState, Tree]:
        state, metrics = carry
        state, new = step(state, batch_of(i))
        return state, jax.tree.map(lambda all_, one: all_.at[i].set(one), metrics, new)

    return jax.lax.fori_loop(0, count, body, (state, metrics))


@partial(jax.jit, static_argnames=("chunk", "step"), donate_argnames="state")
def _run_resident(state, data, count, chunk, step):
    return _steps(state, lambda _: data, count, chunk, step)


@partial(jax.jit, static_argnames=("chunk", "step"), donate_argnames="state")
def _run_streamed(state, batches, count, chunk, step):
    return _steps(state, lambda i: jax.tree.map(lambda x: x[i], batches), count, chunk, step)
