"""FlashAttention-2 (arXiv 2307.08691): exact attention in memory that grows with the length.

`flash_attention` beside the order of the first FlashAttention, which keeps its output normalised,
and beside attention that stores its scores: errors against float64, memory of compiled programs,
operations a tile counted in the traced program, tiles left by a causal mask, times in turns, and
a small language model trained with each.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from ml_collections import ConfigDict

from kernels_pallas.attention import bench, flash_attention, implementations
from kernels_pallas.attention.bench import Case
from kernels_pallas.attention.problem import Band, tile_counts
from rlib import data, nn
from rlib.experiment import (
    COLOURS,
    Claim,
    Claims,
    Report,
    Row,
    Run,
    legend,
    named_key,
    panels,
    start,
    styled,
    unknown,
)
from rlib.training import descend

TITLES = {
    "fa2": "FlashAttention-2",
    "fa1": "FlashAttention's order",
    "standard": "einsum, heads first",
    "jax.nn": "jax.nn",
    "reference": "the formula",
}
ORDERS = ("fa2", "fa1", "standard")
ERRORS = tuple(
    f"Largest error of {what} against float64, over the largest value"
    for what in ("output", "gradients")
)
MEMORY = "Temporary memory of forward and gradient (MiB)"
SLOPE = "Log-log slope of temporary memory in the length"
OPERATIONS = "Operations of a tile, by the number of results of that shape"
TILES = "Tiles visited under a causal mask, of all"
TIMES = {"forward": "Time of forward (ms)", "both": "Time of forward and gradient (ms)"}
LOSS = "Training loss, mean of the last ten steps (nats a byte)"
APART = "Largest difference of training losses from those of FlashAttention-2 (nats)"
SPEED = "Speed of forward, backward, and both (TFLOP/s)"
#: TFLOP/s of the forward part with 16384 queries, up to, on an A100.
PUBLISHED = 230.0
Values = dict[str, Any]


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Measure every method, and judge the claims."""
    run = run or Run()
    for method in config.methods:
        if method not in TITLES:
            raise unknown("method", method, TITLES)
    methods = run.select(config.methods)
    timed = [method for method in methods if method != "reference"]
    trained = [method for method in methods if method in config.train.methods]
    seeds = run.seeds(config)
    sizes = {"heads": config.heads, "size": config.size}
    cases = [
        Case(n, kv_heads=kv, causal=causal, **sizes)
        for n in config.exact.lengths
        for causal in (False, True)
        for kv in config.exact.kv_heads
    ]
    work: dict[str, Callable[[], Values]] = {}
    costs: dict[str, float] = {}

    def add(unit: str, cost: float, compute: Callable[[], Values]) -> None:
        work[unit], costs[unit] = compute, cost

    for method in methods:
        for case in cases:
            compute = functools.partial(_errors, config, method, case, seeds)
            add(f"exact/{method}/{_name(case)}/seeds{len(seeds)}", 1.0, compute)
        for n in config.memory.lengths:
            case = Case(n, **sizes)
            add(f"memory/{method}/n{n}", 1.0, functools.partial(_memory, config, method, case))
    for n in config.time.lengths if timed else ():
        compute = functools.partial(_times, config, timed, Case(n, **sizes))
        add(f"time/{'+'.join(timed)}/n{n}", 1 + n**2 / 3e5, compute)
    if "fa2" in methods:
        case = Case(config.time.causal_length, causal=True, **sizes)
        add("causal", 1 + case.length**2 / 1e6, functools.partial(_causal_times, config, case))
    for method in trained:
        trainer = _trainer(config.train, method)
        for seed in seeds:
            compute = functools.partial(_train, config.train, trainer, seed)
            add(f"train/{method}/seed{seed}", 5.0, compute)
    if jax.default_backend() != "cpu":
        add(f"speed/{jax.devices()[0].device_kind}", 60.0, lambda: _speeds(config.speed))
    run.plan(costs)
    found = {unit.partition("/seeds")[0]: run.cached(unit, f) for unit, f in work.items()}
    study = Study(config, methods, timed, trained, seeds, cases, found)
    _draw_growth(run, study)
    _draw_agreement(run, study)
    return Report(study.rows(), study.claims(), study.notes())


def _name(case: Case) -> str:
    return f"n{case.length}/{'causal' if case.causal else 'full'}/kv{case.kv_heads}"


# The methods


def _attention(config: ConfigDict, method: str, case: Case) -> bench.Attention:
    """(q, k, v) -> out in the layout of `flash_attention`."""
    match method:
        case "fa1":
            return first_order(case.causal, config.tile)
        case "standard":
            return bench.RIVALS[bench.EINSUM](case)
        case "jax.nn":
            return bench.RIVALS[bench.BASELINE](case)
    chosen = None if method == "fa2" else method
    return functools.partial(flash_attention, causal=case.causal, implementation=chosen)


def first_order(causal: bool, tile: int) -> bench.Attention:
    """Attention in the order of FlashAttention (arXiv 2205.14135, algorithm 1).

    Tiles of keys pass by all queries of a head; output, maxima m and sums l are kept as if no tile
    followed, so that every tile divides the output by the new l and multiplies it by the old one.
    """

    def hidden(s: jax.Array, j: Any, keys: int) -> jax.Array:
        columns = j * tile + jnp.arange(tile)
        seen = columns < keys
        if causal:
            seen = seen & (columns <= jnp.arange(len(s))[:, None])
        return jnp.where(seen, s, -jnp.inf)

    def tiles(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, -len(x) % tile), (0, 0))).reshape(-1, tile, x.shape[1])

    def forward(q, k, v):
        def step(carry, given):
            out, m, total = carry
            j, key, value = given
            s = hidden(q @ key.T, j, len(k))
            own = jnp.max(s, axis=1, keepdims=True)
            p = jnp.exp(s - jnp.where(own == -jnp.inf, 0, own))
            new = jnp.maximum(m, own)
            before, after = total * jnp.exp(m - new), jnp.exp(own - new)
            total = before + after * jnp.sum(p, axis=1, keepdims=True)
            return ((before * out + after * (p @ value)) / total, new, total), None

        rows = jnp.zeros((len(q), 1))
        first = jnp.zeros((len(q), v.shape[1])), rows - jnp.inf, rows
        keys, values = tiles(k), tiles(v)
        (out, m, total), _ = lax.scan(step, first, (jnp.arange(len(keys)), keys, values))
        return out, (q, k, v, out, m, total)

    def backward(kept, dout):
        q, k, v, out, m, total = kept
        delta = jnp.sum(dout * out, axis=1, keepdims=True)

        def step(dq, given):
            j, key, value = given
            p = jnp.exp(hidden(q @ key.T, j, len(k)) - m) / total
            ds = p * (dout @ value.T - delta)
            return dq + ds @ key, (ds.T @ q, p.T @ dout)

        keys, values = tiles(k), tiles(v)
        dq, (dk, dv) = lax.scan(step, jnp.zeros_like(q), (jnp.arange(len(keys)), keys, values))
        whole = lambda x: x.reshape(-1, x.shape[2])[: len(k)]
        return dq, whole(dk), whole(dv)

    head = jax.custom_vjp(lambda q, k, v: forward(q, k, v)[0])
    head.defvjp(forward, backward)

    def attend(q, k, v):
        b, t, n, _ = q.shape
        group = n // k.shape[2]
        heads = [q / math.sqrt(q.shape[3]), *(jnp.repeat(x, group, axis=2) for x in (k, v))]
        flat = [x.swapaxes(1, 2).reshape(b * n, *x.shape[1::2]) for x in heads]
        out = lax.map(lambda qkv: head(*qkv), tuple(flat))
        return out.reshape(b, n, t, -1).swapaxes(1, 2)

    return attend


# What is measured


def _with_gradients(config: ConfigDict, method: str, case: Case) -> Callable:
    attend = _attention(config, method, case)

    def both(q, k, v, dout):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    return jax.jit(both)


@functools.lru_cache(maxsize=64)
def _in_float64(case: Case, seed: int) -> tuple[np.ndarray, ...]:
    """Output and gradients by the formula, head by head."""
    q, k, v, dout = (np.asarray(x, np.float64)[0] for x in case.draw(seed))
    scale, group = 1 / math.sqrt(case.size), q.shape[1] // k.shape[1]
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for h in range(q.shape[1]):
        g = h // group
        s = scale * q[:, h] @ k[:, g].T
        if case.causal:
            s[np.triu_indices(len(s), 1)] = -np.inf
        p = np.exp(s - s.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        out[:, h] = p @ v[:, g]
        dp = dout[:, h] @ v[:, g].T
        ds = scale * p * (dp - np.sum(p * dp, axis=1, keepdims=True))
        dq[:, h] = ds @ k[:, g]
        dk[:, g] += ds.T @ q[:, h]
        dv[:, g] += p.T @ dout[:, h]
    return out, dq, dk, dv


def _errors(config: ConfigDict, method: str, case: Case, seeds: Sequence[int]) -> Values:
    """Of output and gradients, (seeds, 2)."""
    found = []
    with jax.default_matmul_precision("highest"):
        compute = _with_gradients(config, method, case)
        for seed in seeds:
            errors = [
                np.abs(np.asarray(a, np.float64)[0] - b).max() / np.abs(b).max()
                for a, b in zip(compute(*case.draw(seed)), _in_float64(case, seed), strict=True)
            ]
            found.append([errors[0], max(errors[1:])])
    return {"errors": np.array(found)}


def _memory(config: ConfigDict, method: str, case: Case) -> Values:
    """Bytes beside arguments and results."""
    shapes = jax.eval_shape(case.draw)
    compiled: Any = _with_gradients(config, method, case).lower(*shapes).compile()
    return {"bytes": np.array(compiled.memory_analysis().temp_size_in_bytes)}


def _contestants(config: ConfigDict, methods: Sequence[str], case: Case) -> dict[str, str]:
    """Their names in the benchmark."""
    told = implementations(*jax.eval_shape(case.draw)[:3], causal=case.causal)
    chosen = next(name for name, text in told.items() if text == "chosen")
    names = {"fa2": f"{bench.OURS}{chosen}", "standard": bench.EINSUM, "jax.nn": bench.BASELINE}
    return {method: names.get(method, method) for method in methods}


def _times(config: ConfigDict, methods: Sequence[str], case: Case) -> Values:
    """Seconds of all methods in turns, by method and part."""
    names = _contestants(config, methods, case)
    more = {"fa1": lambda case: _attention(config, "fa1", case)}
    records = bench.measure(
        [case], config.time.turns, parts=tuple(TIMES), more=more, only=names.values()
    )
    return {m: _seconds(r) for m, r in zip(names, records, strict=True)}


def _causal_times(config: ConfigDict, case: Case) -> Values:
    """Seconds with a causal mask and without, in turns."""
    full = lambda case: _attention(config, "fa2", case._replace(causal=False))
    causal = _contestants(config, ["fa2"], case)["fa2"]
    records = bench.measure(
        [case],
        config.time.causal_turns,
        parts=tuple(TIMES),
        more={"full": full},
        only=[causal, "full"],
    )
    return {m: _seconds(r) for m, r in zip(("causal", "full"), records, strict=True)}


def _seconds(record: bench.Record) -> Values:
    if record.reason:
        raise RuntimeError(f"{record.name}: {record.reason}")
    return {part: np.array(values) for part, values in record.seconds.items()}


def _speeds(options: ConfigDict) -> Values:
    """TFLOP/s of all that runs on this accelerator, by attention, case and part."""
    heads = options.hidden // options.size
    cases = [
        Case(n, heads, None, options.size, causal, options.dtype, max(options.tokens // n, 1))
        for n in options.lengths
        for causal in options.causal
    ]
    found: Values = {}
    for record in bench.measure(cases, options.turns):
        mask = "causal" if record.case.causal else "full"
        for part, seconds in record.seconds.items():
            operations = bench.PARTS[part] * record.case.operations
            group = f"N={record.case.length}, {mask}, {part}"
            found.setdefault(record.name, {})[group] = 1e-12 * operations / np.array(seconds)
    return found


# Operations of a tile


def _operations(config: ConfigDict, method: str) -> dict[str, float]:
    """Of one tile of keys, counted in the traced loop over tiles of the forward part."""
    case = Case(4 * config.tile, heads=1, size=config.size)
    attend: Callable = first_order(False, config.tile)
    if method == "fa2":
        attend = functools.partial(flash_attention, implementation="xla")
    traced = jax.make_jaxpr(attend)(*case.draw()[:3])
    body = next(body for body in _bodies(traced.jaxpr) if _products(body))
    # Axes of length one come and go.
    shape = lambda eqn: tuple(size for size in eqn.outvars[0].aval.shape if size > 1)
    scores, accumulator = map(shape, _products(body)[-2:])
    rows = accumulator[:-1]

    def count(operation: str, wanted: tuple[int, ...]) -> float:
        shapes = [shape(eqn) for eqn in _all(body) if eqn.primitive.name == operation]
        return float(shapes.count(wanted))

    return {
        "accumulator: products": count("mul", accumulator),
        "accumulator: quotients": count("div", accumulator),
        "scores: exponentials": count("exp", scores),
        "rows: exponentials": count("exp", rows),
    }


def _inner(eqn: Any) -> Iterator[Any]:
    for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield getattr(value, "jaxpr", value)


def _all(jaxpr: Any) -> Iterator[Any]:
    """Equations, those of what is called included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner(eqn):
            yield from _all(inner)


def _bodies(jaxpr: Any) -> Iterator[Any]:
    """Bodies of loops, innermost first."""
    for eqn in jaxpr.eqns:
        for inner in _inner(eqn):
            yield from _bodies(inner)
            if eqn.primitive.name in ("scan", "while"):
                yield inner


def _products(jaxpr: Any) -> list[Any]:
    return [eqn for eqn in _all(jaxpr) if eqn.primitive.name == "dot_general"]


# The training


def _trainer(options: ConfigDict, method: str) -> Callable:
    """(key, batches) -> the loss of each step."""
    case = Case(options.length, causal=True)
    attend = _attention(ConfigDict({"tile": options.length}), method, case)

    def network(key: jax.Array) -> nn.Transformer:
        return nn.Transformer(
            256,
            layers=options.layers,
            embed=options.embed,
            heads=options.heads,
            kv_heads=options.kv_heads,
            rngs=nnx.Rngs(key),
            attention_fn=attend,
        )

    @jax.jit
    def train(key: jax.Array, batches: jax.Array) -> jax.Array:
        graphdef, params, rest = nnx.split(network(key), nnx.Param, ...)

        def loss(params, given, losses):
            step, tokens = given
            value = nn.next_token_loss(nnx.merge(graphdef, params, rest)(tokens), tokens)
            return value, losses.at[step].set(value)

        given = jnp.arange(len(batches)), batches
        optimizer = optax.adam(options.learning_rate)
        return descend(loss, params, optimizer, given, jnp.zeros(len(batches))).carry

    return train


def _train(options: ConfigDict, trainer: Callable, seed: int) -> Values:
    """The loss of each step."""
    stream = iter(
        data.stream(options.text, batch_size=options.batch, seed=seed, length=options.length)
    )
    batches = np.stack([next(stream)["tokens"] for _ in range(options.steps)])
    with jax.default_matmul_precision("highest"):
        losses = trainer(named_key(seed, "weights"), jnp.asarray(batches))
    return {"losses": np.asarray(losses)}


# The report


class Study:
    """What was found, by the methods that ran."""

    def __init__(
        self,
        config: ConfigDict,
        methods: list[str],
        timed: list[str],
        trained: list[str],
        seeds: Sequence[int],
        cases: list[Case],
        found: dict[str, Values],
    ):
        self.config, self.methods, self.timed, self.trained = config, methods, timed, trained
        self.seeds, self.cases, self._found = seeds, cases, found
        self.counts = {m: _operations(config, m) for m in ("fa2", "fa1") if m in methods}

    def errors(self, method: str) -> np.ndarray:
        """(cases, seeds, 2), of output and gradients."""
        return np.stack([self._found[f"exact/{method}/{_name(c)}"]["errors"] for c in self.cases])

    def memory(self, method: str) -> np.ndarray:
        """Bytes, by length."""
        lengths = self.config.memory.lengths
        return np.array([float(self._found[f"memory/{method}/n{n}"]["bytes"]) for n in lengths])

    def slope(self, method: str) -> float:
        lengths = np.log(self.config.memory.lengths)
        return float(np.polyfit(lengths, np.log(self.memory(method)), 1)[0])

    def seconds(self, method: str, part: str, n: int) -> np.ndarray:
        """By turn."""
        return self._found[f"time/{'+'.join(self.timed)}/n{n}"][method][part]

    def ratio(self, method: str, part: str) -> np.ndarray:
        """FlashAttention-2's time over another's with the most queries, by turn."""
        n = max(self.config.time.lengths)
        return self.seconds("fa2", part, n) / self.seconds(method, part, n)

    def skipping(self, part: str) -> np.ndarray:
        """The time without a mask over that with a causal one, by turn."""
        found = self._found["causal"]
        return found["full"][part] / found["causal"][part]

    def losses(self, method: str) -> np.ndarray:
        """(seeds, steps)"""
        return np.stack([self._found[f"train/{method}/seed{s}"]["losses"] for s in self.seeds])

    def apart(self, method: str) -> np.ndarray:
        """|difference| of losses from FlashAttention-2's, (seeds, steps)."""
        return np.abs(self.losses(method) - self.losses("fa2"))

    def speeds(self) -> Values:
        return next((v for unit, v in self._found.items() if unit.startswith("speed/")), {})

    def tiles(self) -> dict[int, tuple[int, int]]:
        """Visited and masked, by the side of square tiles."""
        n = self.config.tiles.n
        return {b: tile_counts(n, n, b, b, Band(right=0)) for b in self.config.tiles.sides}

    def rows(self) -> list[Row]:
        return [
            *self._error_rows(),
            *self._memory_rows(),
            *self._count_rows(),
            *self._time_rows(),
            *self._train_rows(),
            *self._speed_rows(),
        ]

    def _error_rows(self) -> Iterator[Row]:
        for i, metric in enumerate(ERRORS):
            for method in self.methods:
                errors = self.errors(method)
                for n in self.config.exact.lengths:
                    for causal in (False, True):
                        of = [c.length == n and c.causal == causal for c in self.cases]
                        group = f"N={n}{', causal' if causal else ''}"
                        yield Row(method, group, metric, errors[of, :, i].max(axis=0))

    def _memory_rows(self) -> Iterator[Row]:
        for method in self.methods:
            sizes = self.memory(method) / 2**20
            for n, size in zip(self.config.memory.lengths, sizes, strict=True):
                yield Row(method, f"N={n}", MEMORY, [size])
        for method in self.methods:
            yield Row(method, "slope", SLOPE, [self.slope(method)])

    def _count_rows(self) -> Iterator[Row]:
        for method, counts in self.counts.items():
            for name, value in counts.items():
                yield Row(method, name, OPERATIONS, [value])
        n = self.config.tiles.n
        for side, (visited, masked) in self.tiles().items():
            name, group = f"tiles of {side} x {side}", f"N={n}"
            yield Row(name, f"{group}: visited", TILES, [visited])
            yield Row(name, f"{group}: all", TILES, [(n // side) ** 2])
            yield Row(name, f"{group}: masked by element", TILES, [masked])

    def _time_rows(self) -> Iterator[Row]:
        for part, metric in TIMES.items():
            for method in self.timed:
                for n in self.config.time.lengths:
                    values = 1e3 * self.seconds(method, part, n)
                    yield Row(method, f"N={n}", metric, values)
        if "fa2" not in self.methods:
            return
        n = max(self.config.time.lengths)
        for method in self.timed:
            for part, title in TIMES.items():
                metric = f"FlashAttention-2's time over another's, N={n}, by turn"
                group = title.removeprefix("Time of ").removesuffix(" (ms)")
                if method != "fa2":
                    yield Row(f"over {method}", group, metric, self.ratio(method, part))
        n = self.config.time.causal_length
        for part, title in TIMES.items():
            metric = f"Time without a mask over that with a causal one, N={n}, by turn"
            group = title.removeprefix("Time of ").removesuffix(" (ms)")
            yield Row("fa2", group, metric, self.skipping(part))

    def _train_rows(self) -> Iterator[Row]:
        steps = self.config.train.steps
        for method in self.trained:
            yield Row(method, f"{steps} steps", LOSS, self.losses(method)[:, -10:].mean(axis=1))
        for method in self.trained if "fa2" in self.trained else ():
            if method != "fa2":
                yield Row(method, f"{steps} steps", APART, self.apart(method).max(axis=1))

    def _speed_rows(self) -> Iterator[Row]:
        ours = next(iter(self.speeds()), "")  # the one that is chosen
        a100 = "A100" in jax.devices()[0].device_kind
        for name, groups in self.speeds().items():
            for group, values in groups.items():
                comparable = a100 and name == ours and group == "N=16384, full, forward"
                yield Row(name, group, SPEED, values, PUBLISHED if comparable else None)

    def claims(self) -> list[Claim]:
        claims = Claims(self.methods)
        self._claim_exactness(claims)
        self._claim_memory(claims)
        self._claim_counts(claims)
        self._claim_times(claims)
        self._claim_training(claims)
        return claims

    def _claim_exactness(self, claims: Claims) -> None:
        most = math.log2(self.config.exact.margin)
        for i, what in enumerate(("Output", "Gradients")):
            errors = lambda method, i=i: np.log2(self.errors(method)[:, :, i])

            def spread(errors=errors) -> np.ndarray:
                of = np.stack([errors(method) for method in ORDERS])
                return np.ptp(of, axis=0).max(axis=0)

            claims.add(
                f"{what}: FlashAttention-2's error against float64 is at most twice that of"
                " standard attention, for every length, mask and grouping (largest log2 of the"
                " ratio)",
                ("fa2", "standard"),
                lambda errors=errors: (errors("fa2") - errors("standard")).max(axis=0),
                at_most=most,
            )
            claims.add(
                "and errors of both orders and of standard attention are within a factor of two"
                " of each other (largest log2)",
                ORDERS,
                spread,
                at_most=most,
            )

    def _claim_memory(self, claims: Claims) -> None:
        add = functools.partial(claims.add, exact=True)
        for method in ("standard", "jax.nn"):
            add(
                f"Memory of {TITLES[method]} grows with the square of the length (slope - 2)",
                (method,),
                lambda m=method: self.slope(m) - 2,
                within=0.2,
            )
        for method in ("fa2", "fa1"):
            add(
                f"that of {TITLES[method]} no faster than the length (slope - 1)",
                (method,),
                lambda m=method: self.slope(m) - 1,
                at_most=0.2,
            )
        n, share = max(self.config.memory.lengths), self.config.memory.share
        add(
            f"With {n} queries FlashAttention-2 needs at most 1/{share} of jax.nn's memory"
            " (ratio of jax.nn's to its)",
            ("fa2", "jax.nn"),
            lambda: self.memory("jax.nn")[-1] / self.memory("fa2")[-1],
            at_least=share,
        )

    def _claim_counts(self, claims: Claims) -> None:
        add = functools.partial(claims.add, exact=True)

        def off(method: str, *expected: float) -> float:
            return max(
                abs(a - b) for a, b in zip(self.counts[method].values(), expected, strict=True)
            )

        add(
            "A tile costs FlashAttention's order two products and a quotient of the output's size,"
            " and two exponentials a row beside those of scores (largest difference)",
            ("fa1",),
            lambda: off("fa1", 2, 1, 1, 2),
            at_most=0,
        )
        add(
            "FlashAttention-2 one product, no quotient, and one exponential a row",
            ("fa2",),
            lambda: off("fa2", 1, 0, 1, 1),
            at_most=0,
        )
        n = self.config.tiles.n
        add(
            "A causal mask leaves (T^2 + T) / 2 of T^2 tiles, and masks T of them by element"
            " (largest difference)",
            (),
            lambda: max(
                max(abs(visited - (t * t + t) // 2), abs(masked - t))
                for t, (visited, masked) in ((n // b, v) for b, v in self.tiles().items())
            ),
            at_most=0,
        )

    def _claim_times(self, claims: Claims) -> None:
        times, n = self.config.time, max(self.config.time.lengths)
        parts = {"forward": "forward", "both": "forward and gradient"}
        for part, title in parts.items():
            claims.add(
                f"N={times.causal_length}, {title}: a causal mask makes it faster (time without"
                " over time with)",
                ("fa2",),
                lambda part=part: self.skipping(part),
                at_least=times.causal,
            )
        bounds = {"jax.nn": times.jax_nn, "standard": times.standard, "fa1": times.fa1}
        for method, most in bounds.items():
            for part, title in parts.items():
                claims.add(
                    f"N={n}, {title}: FlashAttention-2 is faster than {TITLES[method]}"
                    " (ratio of times)",
                    ("fa2", method),
                    lambda m=method, part=part: self.ratio(m, part),
                    at_most=most,
                )

    def _claim_training(self, claims: Claims) -> None:
        options = self.config.train
        for method in ("jax.nn", "reference"):
            if {"fa2", method} <= set(options.methods):
                claims.add(
                    f"Losses of a language model over {options.steps} steps are those with"
                    f" {TITLES[method]} (log10 of the largest difference, nats)",
                    ("fa2", method),
                    lambda m=method: np.log10(np.maximum(self.apart(m).max(axis=1), 1e-9)),
                    at_most=math.log10(options.close),
                )

    def notes(self) -> list[str]:
        config, kind = self.config, jax.devices()[0].device_kind
        cpu = jax.default_backend() == "cpu"
        told = [
            "; ".join(f"{method}: {TITLES[method]}" for method in self.methods) + ".",
            f"{config.heads} heads of {config.size}, float32, batch 1; errors are the largest over"
            f" {' and '.join(map(str, config.exact.kv_heads))} heads of keys.",
            "Values of times are turns, in which methods follow each other, not seeds; spread and"
            " intervals are over turns.",
            f"FlashAttention's order is timed with tiles of {config.tile} keys and all queries of a"
            " head, FlashAttention-2 with the tiles that it chooses.",
            f"The language model: {config.train.layers} layers, {config.train.embed} wide,"
            f" {config.train.heads} heads over {config.train.kv_heads} of keys, sequences of"
            f" {config.train.length} bytes.",
        ]
        if cpu:
            told.append(
                "The paper's speeds (1.7 to 3.0 times FlashAttention, 3 to 10 times standard"
                " attention, up to 230 TFLOP/s forward) are of kernels on an A100 in half"
                " precision; nothing here reproduces them. On a GPU or TPU the same command adds"
                " speeds."
            )
        elif "A100" not in kind:
            told.append(f"The paper's speeds are of an A100; this is {kind}.")
        return told


# Figures


def _colour(method: str) -> str:
    return COLOURS[list(TITLES).index(method)]


def _lengths(axes: Axes, lengths: Sequence[int], **labels: str) -> None:
    """A logarithmic axis of lengths, and of what is shown."""
    axes.set(xscale="log", yscale="log", xlabel="queries, and keys", **labels)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())


def _guide(axes: Axes, lengths: Sequence[int], last: float, power: int, text: str) -> None:
    """A line of a slope that ends at a value."""
    x = np.array([lengths[-1] / 4, lengths[-1]], float)
    y = last * (x / x[-1]) ** power
    axes.plot(x, y, color="#999999", linestyle=":", linewidth=1)
    axes.annotate(
        text, (x[0], y[0]), (-3, 0), textcoords="offset points", ha="right", va="center",
        fontsize=8, color="#666666",
    )  # fmt: skip


@styled
def _draw_growth(run: Run, study: Study) -> None:
    lengths, times = study.config.memory.lengths, study.config.time.lengths
    shown = {"memory": "temporary memory (MiB)", **{p: f"{t[8:]}" for p, t in TIMES.items()}}
    figure, axes = panels(1, len(shown), size=(3.5, 3.1))
    arrays: dict[str, Any] = {"lengths": np.array(lengths), "times": np.array(times)}
    for panel, (what, label) in zip(axes[0], shown.items(), strict=True):
        for method in study.methods if what == "memory" else study.timed:
            if what == "memory":
                x, y = lengths, study.memory(method) / 2**20
            else:
                x = times
                y = np.array([1e3 * np.median(study.seconds(method, what, n)) for n in x])
            arrays[f"{what} {method}"] = y
            panel.plot(x, y, "o-", color=_colour(method), label=TITLES[method], markersize=3.5)
        _lengths(panel, lengths if what == "memory" else times, title=label)
    if {"fa2", "standard"} <= set(study.methods):
        for method, power in (("standard", 2), ("fa2", 1)):
            last = study.memory(method)[-1] / 2**20
            _guide(axes[0, 0], lengths, last * 0.5, power, f"$N^{power}$" if power > 1 else "$N$")
    legend(figure, axes[0, 0], columns=5)
    run.figure("growth", figure, **arrays)


@styled
def _draw_agreement(run: Run, study: Study) -> None:
    figure, axes = panels(1, 4, size=(3.0, 3.1))
    lengths = study.config.exact.lengths
    arrays: dict[str, Any] = {"lengths": np.array(lengths)}
    for panel, i, what in zip(axes[0], (0, 1), ("output", "gradients"), strict=False):
        for method in study.methods:
            errors = study.errors(method)[:, :, i]
            by = [errors[[c.length == n for c in study.cases]].ravel() for n in lengths]
            arrays[f"{what} {method}"] = np.stack(by)
            y = [1e6 * np.mean(each) for each in by]
            panel.plot(lengths, y, "o-", color=_colour(method), label=TITLES[method], markersize=4)
        _lengths(panel, lengths, title=f"{what}: largest error, mean ($10^{{-6}}$)")
        panel.set(yscale="linear", ylim=(0, None))
    for i, method in enumerate(study.trained):
        losses = study.losses(method)
        arrays[f"losses {method}"] = losses
        steps = np.arange(1, losses.shape[1] + 1)
        axes[0, 2].plot(
            steps, losses.mean(axis=0), color=_colour(method), linewidth=max(4 - 1.5 * i, 0.8)
        )
        if method != "fa2" and "fa2" in study.trained:
            apart = np.maximum.accumulate(study.apart(method).max(axis=0))
            axes[0, 3].plot(steps, np.maximum(apart, 1e-9), color=_colour(method))
    axes[0, 2].set(xlabel="step", title="training loss (nats a byte)")
    axes[0, 3].axhline(study.config.train.close, color="#999999", linestyle=":")
    axes[0, 3].set(yscale="log", xlabel="step", title="difference of losses, largest so far")
    legend(figure, axes[0, 0], columns=5)
    run.figure("agreement", figure, **arrays)


if __name__ == "__main__":
    start(main)
