"""The federated round: who takes part, their local work, the mean of what they send, the server.

An algorithm is what a client does and the server's step; everything else is here and the same for
all: sampling, drop-outs, padding, chunks, the mesh, links, means, and state that clients keep. A
round is a pure function and a `TrainStep`, so `training.fit` runs many rounds per device call.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from rlib.compression import Codec, Identity, decode_tree, encode_tree, payload_bytes
from rlib.federated.clients import (
    Batches,
    ClientData,
    Grad,
    LocalWork,
    Losses,
    batches_of,
    gradient_of,
)
from rlib.parallel import TrainState, TrainStep, batch_spec, data_axis_size, make_mesh

Tree = Any
Scalars = dict[str, Array]
#: Parameters of dense clients that a CPU trains side by side: beyond it leaves its caches.
PARAMETERS_AT_ONCE = 2**20


class Cohort(NamedTuple):
    """Who took part in a round.

    Fields:
        count: clients whose message counts.
        share: their part of all clients' weights, so that `share * mean` is the sum over them of
            p_i m_i with weights p_i that sum to 1 over all clients; S / N for equal weights.
        round: rounds before this one.
    """

    count: Int[Array, ""]  # type: ignore[assignment]
    share: Float[Array, ""]
    round: Int[Array, ""]


class Algorithm(NamedTuple):
    """A federated algorithm: `local` and `apply`, and whichever of the others it needs.

    Clients send x^t - x_K or what else is subtracted from the model, as a gradient is.

    Fields:
        local: (client, down, batches, grad) -> (message, client, scalars). What one client does
            with its own state and what came down; `local_steps` runs its steps.
        apply: (params, server, mixed, cohort) -> (params, server, scalars). The server's step.
        down: (params, server, round) -> what travels to the clients of a round.
        init: params -> the server's state beside the parameters.
        client: params -> what one client keeps between rounds, at first; () for nothing.
        mix: (messages along a leading axis, weights that sum to 1) -> mixed; None for the weighted
            mean, which is summed up client by client and needs no room for all messages.
    """

    local: Callable[[Tree, Tree, Batches, Grad], tuple[Tree, Tree, Scalars]]
    apply: Callable[[Tree, Tree, Tree, Cohort], tuple[Tree, Tree, Scalars]]
    down: Callable[[Tree, Tree, Array], Tree] = lambda params, server, round: params
    init: Callable[[Tree], Tree] = lambda params: ()
    client: Callable[[Tree], Tree] = lambda params: ()
    mix: Callable[[Tree, Array], Tree] | None = None


class FederatedState(NamedTuple):
    """What lasts between rounds beside the model; the `opt_state` of a `TrainState`.

    Fields:
        server: the algorithm's.
        clients: of every client, leading axis N (over a mesh padded to a multiple of its axis).
        errors: what compressed messages left out, leading axis N, with `error_feedback`.
    """

    server: Tree
    clients: Tree
    errors: Tree


class Rounds(NamedTuple):
    """Rounds of an algorithm, as pure functions: to be compiled, scanned, mapped over settings.

    Fields:
        init: (params, frozen=(), key=None) -> TrainState.
        step: (state, ClientData) -> (state, metrics): "loss" (of the local steps, weighted; NaN if
            nobody took part), "clients" (that took part), "nonfinite" (left out for what is not
            finite), "bytes_up" and "bytes_down" (of what was sent), and the algorithm's own.
        mesh: over which clients are split, or None.
        check: of `TrainStep`: with `nonfinite="error"` it raises. Call it with the metrics of
            `simulate`; `training.fit` does.
    """

    init: Callable[..., TrainState]
    step: Callable[[TrainState, ClientData], tuple[TrainState, Scalars]]
    mesh: Mesh | None
    check: Callable[[int, dict[str, Any]], None] | None = None


def make_rounds(
    algorithm: Algorithm,
    loss: Losses,
    work: LocalWork,
    clients: int,
    sampled: int | None = None,
    *,
    weights: Literal["examples", "equal"] | Sequence[float] = "examples",
    replace: bool = False,
    available: Callable[[Array, Array], Bool[Array, " clients"]] | None = None,
    dropout: float = 0.0,
    nonfinite: Literal["drop", "error"] = "drop",
    up: Codec | None = None,
    down: Codec | None = None,
    error_feedback: bool = False,
    at_once: int | None = None,
    mesh: Mesh | None = None,
) -> Rounds:
    """Build the round of an algorithm.

    A client's message counts with its weight over the sum of those that took part. A round in
    which nobody did changes nothing.

    Args:
        loss: of each example, so that padding can be left out of means.
        work: how much a client does in a round.
        clients: their number N.
        sampled: S of them take part in a round, uniformly drawn; None for all.
        weights: p_i: by examples, equal, or N numbers >= 0.
        replace: draw with replacement; a client that is drawn twice trains twice. Not for
            algorithms whose clients keep state.
        available: (key, round) -> who can be drawn; if fewer than S, fewer take part.
        dropout: probability that a client that was drawn sends nothing, and keeps its old state.
        nonfinite: a client of whom something is not finite is left out and counted ("drop"), or
            stops the training ("error": `training.fit` raises FloatingPointError). A server's step
            that is not finite is not taken, and all clients of its round count as such (what
            they keep has moved on).
        up, down: codecs of the messages, and of what travels to the clients, single numbers apart;
            what is computed on is what arrives. None sends arrays as they are.
        error_feedback: add to a client's message what its earlier ones left out. Without it no
            lossy codec goes with clients that keep state: what they believe to have sent and what
            arrived would part for good.
        at_once: clients that are trained side by side (`vmap`); the others follow (`scan`). None:
            all on accelerators; on a CPU one where the model has convolutions, else as many as have
            `PARAMETERS_AT_ONCE` together, by measurement. Fewer need less memory.
        mesh: splits a round's clients, and state that they keep, over its data axis; examples are
            on every device.

    Raises:
        ValueError: sizes that do not fit: more clients sampled than there are, weights that are
            negative or sum to 0, a probability outside [0, 1); replacement, or a lossy codec
            without error feedback, with client state. While tracing: `available` of another shape.
        TypeError: while tracing: state that changes from integers to floats or back.

    Example:
        >>> import optax
        >>> from rlib.federated import client_data, fedavg
        >>> loss = lambda x, batch, key: (batch - x) ** 2 / 2
        >>> rounds = make_rounds(fedavg(optax.sgd(0.5)), loss, LocalWork(None, steps=1), clients=2)
        >>> held = client_data(np.array([0.0, 4.0]), [np.array([0]), np.array([1])])
        >>> state, metrics = rounds.step(rounds.init(jnp.zeros(())), held)
        >>> float(state.params), float(metrics["loss"]), int(metrics["clients"])
        (1.0, 4.0, 2)
    """
    drawn = clients if sampled is None else sampled
    if drawn < 1 or (drawn > clients and not replace):
        raise ValueError(f"sampled={sampled}: a round has 1 to {clients} clients")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is no probability below 1")
    if nonfinite not in ("drop", "error"):
        raise ValueError(f'nonfinite={nonfinite!r}; it must be "drop" or "error"')
    if error_feedback and (up is None or replace):
        raise ValueError("error_feedback needs a codec `up`, and sampling without replacement")
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once={at_once}: at least one client is trained at once")
    given_weights = _numbers(weights, clients)
    shards = 1 if mesh is None else data_axis_size(mesh)
    axis = None if mesh is None else batch_spec(mesh)[0]
    places = -(-clients // shards) * shards

    def message_of(params: Tree, server: Tree) -> Tree:
        """Shapes of what a client sends."""
        one = Batches(
            rows=jnp.zeros((1, 1), jnp.int32),
            weights=jnp.ones((1, 1)),
            keys=jax.random.split(jax.random.key(0), 1),
            ragged=False,
        )

        def send(params: Tree, server: Tree) -> Tree:
            sends = algorithm.down(params, server, jnp.zeros((), jnp.int32))
            grad = lambda x, batch: (jnp.zeros(()), jax.tree.map(jnp.zeros_like, x))
            return algorithm.local(algorithm.client(params), sends, one, grad)[0]

        return jax.eval_shape(send, params, server)

    def init(params: Tree, frozen: Tree = (), key: Array | None = None) -> TrainState:
        params = jax.tree.map(jnp.asarray, params)
        server, client = jax.tree.map(
            jnp.asarray, (algorithm.init(params), algorithm.client(params))
        )
        error: Tree = ()
        if replace and jax.tree.leaves(client):
            raise ValueError(
                "replace=True, but clients of this algorithm keep state, which two draws of one "
                "client in a round would overwrite"
            )
        lossy = up is not None and not isinstance(up, Identity)
        if lossy and jax.tree.leaves(client) and not error_feedback:
            raise ValueError(
                f"up={up}, but clients of this algorithm keep state, which follows what they sent "
                "and not what arrived: give error_feedback=True"
            )
        if error_feedback:
            like = message_of(params, server)
            error = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), like)
        every = lambda x: jnp.broadcast_to(x, (places, *jnp.shape(x)))
        kept = FederatedState(server, *jax.tree.map(every, (client, error)))
        key = jax.random.key(0) if key is None else key
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, zero, params, kept, frozen, key)

    def train(client: Tree, error: Tree, slot, ident, arrived: Tree, held: ClientData, key):
        """One client's round: what arrives of its message, its new state, scalars, finite."""
        batch_key, code_key = jax.random.split(jax.random.fold_in(key, slot))
        batches = batches_of(work, batch_key, held.rows[ident], held.sizes[ident])
        grad = gradient_of(loss, held.examples)
        message, client, scalars = algorithm.local(client, arrived, batches, grad)
        if error_feedback:
            message = jax.tree.map(jnp.add, message, error)
        sent = _through(up, code_key, message)
        if error_feedback:
            error = jax.tree.map(jnp.subtract, message, sent)
        # A codec may make finite numbers of what is not finite.
        return sent, (client, error), scalars, _is_finite((message, sent, client))

    def cohort(size: int, arrived: Tree, held: ClientData, kept: Tree, slots: _Slots, key: Array):
        """All slots of one device, `size` at once: what clients keep, sums, messages to mix."""
        over = _side_by_side(train, size)

        def chunk(given: tuple[_Slots, Tree]) -> tuple[_Sums, Tree, Tree]:
            part, old = given
            sent, new, scalars, finite = over((*old, part.number, part.ident), arrived, held, key)
            counts = finite & (part.weight > 0)
            weight = jnp.where(counts, part.weight, 0.0)
            # Zeros before weights, for 0 times NaN is NaN.
            sent, scalars = _where(counts, (sent, scalars), _zeros((sent, scalars)), "local")
            sums = _Sums(
                weight=jnp.sum(weight),
                count=jnp.sum(counts),
                nonfinite=jnp.sum(~finite & (part.weight > 0)),
                scalars=_weighted_sum(weight, scalars),
                message=() if algorithm.mix else _weighted_sum(weight, sent),
            )
            new = _where(counts, new, old, "local")
            return sums, new, (sent, weight) if algorithm.mix else ()

        def body(total: _Sums, given: tuple[_Slots, Tree]) -> tuple[_Sums, Tree]:
            sums, *rows = chunk(given)
            return jax.tree.map(jnp.add, total, sums), rows

        # Rows are read before the loop and written after it: in it the compiler would copy the
        # state of all clients for each chunk, where it reads later than it writes.
        in_chunks = lambda x: x.reshape(-1, size, *x.shape[1:])
        given = jax.tree.map(in_chunks, (slots, _take(kept, slots.ident, axis)))
        first = jax.tree.map(lambda x: x[0], given)
        sums = _zeros(jax.eval_shape(lambda: chunk(first)[0]))
        sums, rows = lax.scan(body, sums, given)
        new, messages = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        kept = _put(kept, slots.ident, new, axis)
        if axis is not None:
            sums = lax.psum(sums, axis)
            messages = jax.tree.map(lambda x: lax.all_gather(x, axis, tiled=True), messages)
        return kept, sums, messages

    def step(state: TrainState, held: ClientData) -> tuple[TrainState, Scalars]:
        if held.sizes.shape != (clients,):
            raise ValueError(f"data of {held.sizes.shape[0]} clients for rounds of {clients}")
        held = jax.tree.map(jnp.asarray, held)
        params, (server, *kept) = state.params, state.opt_state
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), 4)
        p = held.sizes.astype(jnp.float32) if given_weights is None else given_weights
        p = p / jnp.sum(p)
        ident, there = _draw(keys[0], clients, drawn, replace, available, state.step)
        reached = jnp.sum(there)
        if dropout:
            there &= jax.random.uniform(keys[1], (drawn,)) >= dropout
        most = -(-drawn // shards)
        size = min(at_once or _at_once(params, drawn, mesh), most)
        size = -(-most // -(-most // size))  # as even chunks as can be
        padding = -drawn % (size * shards)
        # Slots beyond the drawn clients have a place beyond the last one: reads there are
        # clamped, writes dropped.
        slots = _Slots(
            ident=jnp.pad(ident, (0, padding), constant_values=places),
            weight=jnp.pad(jnp.where(there, p[ident], 0.0), (0, padding)),
            number=jnp.arange(drawn + padding),
        )
        sends = algorithm.down(params, server, state.step)
        arrived = _through(down, keys[2], sends)
        whole = lambda arrived, held, kept, slots, key: cohort(
            size, arrived, held, kept, slots, key
        )
        if mesh is not None:
            split = P(axis)
            whole = jax.shard_map(
                whole,
                mesh=mesh,
                in_specs=(P(), P(), split, split, P()),
                out_specs=(split, P(), P()),
                check_vma=False,  # sums and messages are equal on all devices by `psum` and gather
            )
        kept, sums, messages = whole(arrived, held, tuple(kept), slots, keys[3])
        someone = sums.weight > 0
        over = jnp.where(someone, sums.weight, 1.0)
        if algorithm.mix:
            messages, weight = messages
            mixed = algorithm.mix(messages, weight / over)
        else:
            mixed = jax.tree.map(lambda x: (x / over).astype(x.dtype), sums.message)
        about = Cohort(sums.count, sums.weight, state.step)
        *new, found = algorithm.apply(params, server, mixed, about)
        good = someone & _is_finite(new)
        new_params, new_server = _where(good, tuple(new), (params, server), "apply")
        metrics = {
            **jax.tree.map(lambda x: jnp.where(someone, x / over, jnp.nan), sums.scalars),
            **found,
            "clients": sums.count,
            "nonfinite": sums.nonfinite + jnp.where(good, 0, sums.count),
            "bytes_up": jnp.sum(there).astype(jnp.float32) * _bytes(up, message_of(params, server)),
            "bytes_down": reached.astype(jnp.float32) * _bytes(down, sends),
        }
        opt_state = FederatedState(new_server, *kept)
        return state._replace(step=state.step + 1, params=new_params, opt_state=opt_state), metrics

    return Rounds(init, step, mesh, _refuse if nonfinite == "error" else None)


def make_train_step(rounds: Rounds, params: Tree, frozen: Tree = ()) -> TrainStep:
    """The rounds compiled, as `training.fit` takes them: a step is a round, its batch the data.

    Args:
        params, frozen: arrays or their `eval_shape`; only shapes are read.

    >>> import optax
    >>> from rlib import training
    >>> from rlib.federated import client_data, fedavg
    >>> loss = lambda x, batch, key: (batch - x) ** 2 / 2
    >>> rounds = make_rounds(fedavg(optax.sgd(0.5)), loss, LocalWork(None, steps=1), clients=2)
    >>> held = client_data(np.array([0.0, 4.0]), [np.array([0]), np.array([1])])
    >>> train = make_train_step(rounds, jnp.zeros(()))
    >>> state, history = training.fit(
    ...     [training.Phase(train, steps=3)], train.init(jnp.zeros(())), held
    ... )
    >>> float(state.params), history["loss"].tolist()
    (1.75, [4.0, 2.5, 2.125])
    """
    mesh = rounds.mesh or make_mesh({"data": 1}, jax.devices()[:1])
    state = jax.eval_shape(rounds.init, params, frozen)
    everywhere = NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda _: everywhere, state)
    split = NamedSharding(mesh, batch_spec(mesh))
    kept = jax.tree.map(lambda _: split, (state.opt_state.clients, state.opt_state.errors))
    shardings = shardings._replace(opt_state=FederatedState(shardings.opt_state.server, *kept))
    return TrainStep(
        init=jax.jit(rounds.init, out_shardings=shardings),
        step=jax.jit(
            rounds.step,
            in_shardings=(shardings, everywhere),
            out_shardings=(shardings, None),
            donate_argnums=0,
        ),
        shardings=shardings,
        mesh=mesh,
        check=rounds.check,
    )


class Simulation(NamedTuple):
    """What `simulate` gives.

    Fields:
        state: after the last round.
        metrics: of each round, stacked.
        seen: what `look` gave, stacked.
    """

    state: TrainState
    metrics: Scalars
    seen: Tree


def simulate(
    rounds: Rounds,
    params: Tree,
    held: ClientData,
    number: int,
    *,
    key: Array | None = None,
    state: TrainState | None = None,
    looks: int = 1,
    look: Callable[[Tree], Tree] = lambda params: None,
) -> Simulation:
    """A whole training in one loop; pure, so that rates and seeds can be mapped over.

    Args:
        number: of rounds.
        held: arrays on the device, or arguments of what is compiled around this: host arrays
            would become constants of the program.
        key: of the whole training.
        state: to go on from, in place of `rounds.init(params, (), key)`.
        look: what to compute of the parameters, `looks` times at equal distances.

    Raises:
        ValueError: `looks` does not divide the rounds.

    >>> import optax
    >>> from rlib.federated import client_data, fedavg
    >>> loss = lambda x, batch, key: (batch - x) ** 2 / 2
    >>> held = client_data(np.array([0.0, 4.0]), [np.array([0]), np.array([1])])
    >>> def end(rate):
    ...     rounds = make_rounds(fedavg(optax.sgd(rate)), loss, LocalWork(None, steps=1), 2)
    ...     return simulate(rounds, jnp.zeros(()), held, 3).state.params
    >>> jax.vmap(end)(jnp.array([0.5, 1.0])).tolist()
    [1.75, 2.0]
    """
    if looks < 1 or number % looks:
        raise ValueError(f"{number} rounds are not divisible into {looks} looks")

    def stretch(state: TrainState, _: None) -> tuple[TrainState, Tree]:
        state, metrics = lax.scan(
            lambda state, _: rounds.step(state, held), state, length=number // looks
        )
        return state, (metrics, look(state.params))

    first = rounds.init(params, (), key) if state is None else state
    last, (metrics, seen) = lax.scan(stretch, first, length=looks)
    metrics = jax.tree.map(lambda x: x.reshape(number, *x.shape[2:]), metrics)
    return Simulation(last, metrics, seen)


class _Slots(NamedTuple):
    """Places of a round: a client, the weight of its message (0: does not count), a number."""

    ident: Int[Array, " slots"]
    weight: Float[Array, " slots"]
    number: Int[Array, " slots"]


class _Sums(NamedTuple):
    """Over the clients of a round; scalars and message are weighted."""

    weight: Float[Array, ""]
    count: Int[Array, ""]  # type: ignore[assignment]
    nonfinite: Int[Array, ""]
    scalars: Scalars
    message: Tree


def _numbers(weights: Any, clients: int) -> Array | None:
    """The weights as an array; None for those by examples."""
    if isinstance(weights, str):
        if weights not in ("examples", "equal"):
            raise ValueError(f'weights={weights!r}; "examples", "equal", or {clients} numbers')
        return jnp.ones(clients) if weights == "equal" else None
    values = np.asarray(weights, np.float64)
    if values.shape != (clients,) or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"weights of shape {values.shape}: {clients} finite numbers >= 0 wanted")
    if not values.sum() > 0:
        raise ValueError("weights sum to 0: no client would count")
    return jnp.asarray(values / values.max(), jnp.float32)


def _draw(key, clients: int, drawn: int, replace: bool, available, round: Array):
    """Clients of a round, and whether each is there."""
    there = jnp.ones(drawn, bool)
    if available is not None:
        own, who = jax.random.split(key)
        can = jnp.asarray(available(own, round))
        if can.shape != (clients,) or can.dtype != bool:
            raise ValueError(
                f"available gave {can.dtype} {can.shape}; it must give a boolean for each of "
                f"{clients} clients"
            )
        if replace:
            ident = jax.random.categorical(who, jnp.where(can, 0.0, -jnp.inf), shape=(drawn,))
        else:
            order = jnp.where(can, jax.random.uniform(who, (clients,)), -1.0)
            ident = lax.top_k(order, drawn)[1]
        return ident, can[ident]
    if replace:
        return jax.random.randint(key, (drawn,), 0, clients), there
    if drawn == clients:
        return jnp.arange(clients), there
    # Floyd's algorithm: uniform over subsets, and nothing as long as all clients is touched.
    tops = jnp.arange(clients - drawn, clients)
    tries = jax.random.randint(key, (drawn,), 0, tops + 1)

    def pick(i: Array, chosen: Array) -> Array:
        return chosen.at[i].set(jnp.where(jnp.any(chosen == tries[i]), tops[i], tries[i]))

    return lax.fori_loop(0, drawn, pick, jnp.full(drawn, -1)), there


def _at_once(params: Tree, drawn: int, mesh: Mesh | None) -> int:
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    leaves = jax.tree.leaves(params)
    if platform != "cpu":
        return drawn
    if any(x.ndim > 2 for x in leaves):  # over kernels `vmap` makes grouped convolutions
        return 1
    return max(1, min(drawn, PARAMETERS_AT_ONCE // max(1, sum(x.size for x in leaves))))


def _side_by_side(train: Callable[..., Tree], size: int) -> Callable[..., Tree]:
    """(arguments along a leading axis, *shared arguments) -> results along a leading axis."""
    if size > 1:
        return lambda own, *shared: jax.vmap(lambda mine: train(*mine, *shared))(own)

    # Without `vmap`: a batch of one convolution is compiled as a grouped one.
    def one(own: Tree, *shared: Tree) -> Tree:
        found = train(*jax.tree.map(lambda x: x[0], own), *shared)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], found)

    return one


def _take(kept: Tree, ident: Array, axis: str | None) -> Tree:
    """Rows of the clients `ident`; over a mesh every device asks all others."""
    if axis is None:
        return jax.tree.map(lambda x: x[ident], kept)
    if not jax.tree.leaves(kept):
        return kept
    every = lax.all_gather(ident, axis, tiled=True)

    def take(x: Array) -> Array:
        if x.dtype == bool:  # which devices do not add
            return take(x.astype(jnp.uint8)).astype(bool)
        row = every - lax.axis_index(axis) * x.shape[0]
        mine = (row >= 0) & (row < x.shape[0])
        rows = x[jnp.clip(row, 0, x.shape[0] - 1)]
        rows = _where(mine, rows, jnp.zeros_like(rows), "the mesh")
        return lax.psum_scatter(rows, axis, tiled=True)

    return jax.tree.map(take, kept)


def _put(kept: Tree, ident: Array, new: Tree, axis: str | None) -> Tree:
    """Write rows back; those of no client are dropped."""
    if axis is None:
        return jax.tree.map(lambda x, rows: x.at[ident].set(rows, mode="drop"), kept, new)
    if not jax.tree.leaves(kept):
        return kept
    every = lax.all_gather(ident, axis, tiled=True)

    def put(x: Array, rows: Array) -> Array:
        row = every - lax.axis_index(axis) * x.shape[0]
        row = jnp.where((row >= 0) & (row < x.shape[0]), row, x.shape[0])
        return x.at[row].set(lax.all_gather(rows, axis, tiled=True), mode="drop")

    return jax.tree.map(put, kept, new)


def _where(chosen: Array, new: Tree, old: Tree, who: str) -> Tree:
    """`new` where chosen (by the leading axis if there is one), else `old`; in types of `old`."""

    def pick(a: Any, b: Array) -> Array:
        a = jnp.asarray(a)
        if jnp.issubdtype(a.dtype, jnp.floating) != jnp.issubdtype(b.dtype, jnp.floating):
            raise TypeError(f"{who} turned state of {b.dtype} into {a.dtype}; begin with {a.dtype}")
        mask = chosen.reshape(chosen.shape + (1,) * (a.ndim - chosen.ndim))
        return jnp.where(mask, a, b).astype(b.dtype)

    return jax.tree.map(pick, new, old)


def _zeros(like: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def _weighted_sum(weight: Array, tree: Tree) -> Tree:
    """Over the leading axis, in float32 at least."""

    def total(x: Array) -> Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.tensordot(weight.astype(x.dtype), x, axes=1)

    return jax.tree.map(total, tree)


def _is_finite(tree: Tree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def _through(codec: Codec | None, key: Array, tree: Tree) -> Tree:
    """What arrives of a tree at the other end of a link."""
    if codec is None:
        return tree
    structure: Any = jax.tree.structure(tree)
    leaves = jax.tree.leaves(tree)
    arrays = [x for x in leaves if jnp.ndim(x)]
    arrived = iter(decode_tree(codec, encode_tree(codec, key, arrays), arrays))
    return structure.unflatten([next(arrived) if jnp.ndim(x) else x for x in leaves])


def _bytes(codec: Codec | None, tree: Tree) -> int:
    leaves = jax.tree.leaves(tree)
    if codec is None:
        return payload_bytes(leaves)
    arrays = [x for x in leaves if jnp.ndim(x)]
    coded = jax.eval_shape(lambda x: encode_tree(codec, jax.random.key(0), x), arrays)
    return payload_bytes(coded) + payload_bytes([x for x in leaves if not jnp.ndim(x)])


def _refuse(first: int, metrics: dict[str, Any]) -> None:
    counts = np.asarray(metrics["nonfinite"])
    if np.any(counts):
        at = int(np.argmax(counts > 0))
        raise FloatingPointError(
            f"round {first + at}: something of {int(counts[at])} clients is not finite; take a "
            'smaller rate, or nonfinite="drop"'
        )
