"""How many words attention moves between a small fast memory and a large slow one.

Saha and Ye, "The I/O Complexity of Attention, or How Optimal is Flash Attention?",
arXiv 2402.07443. The cache holds m words, computing happens on cached words only, and the cost is
the number of words read and written. For q, k, v of (n, d) the least cost of exact attention with
ordinary matrix products is, up to a constant,

    max(n d, min(n^2 d / sqrt(m), n^2 d^2 / m))             `io_lower_bound`

The two curves cross at m = d^2. With more cache FlashAttention is optimal; with less it is not, and
tiling both products by squares, with the scores in slow memory, is. `count_transfers` has the
exact counts of both and of two baselines, `simulate` executes them in a cache that counts and
refuses what does not fit, `choose_attention` says which to take, and with which tiles.

All sizes are words, not bytes: 96 KiB are 49152 words of bfloat16. There is no causal mask, and no
scale: give q / sqrt(d). What an operation holds for a moment, such as a product of two words or a
new maximum of one row, is not counted, as in the paper.

Deviations (no official code exists)

| | paper | official code | here |
|---|---|---|---|
| counts | O(.), of FlashAttention too | - | exact, ragged edges included |
| where the winner changes | m = d^2, up to a constant | - | counted: about 0.22 d^2 for large d |
| overflow of exp | not treated | - | "square_safe": a running maximum, 2 n words more |
| outputs of square tiling | "written to cache" | - | written to memory: the former is a misprint |
| row sums divide | each product of tiles | - | the same; a finished tile in the jnp version |
| FlashAttention | cited | - | both loop orders, inner tiles of one row or column |
| unfused attention | not counted | - | three passes; a row that fits is read once by the softmax |
| smallest cache | any m | - | 4 words ("square"), 4 d + 3 (FlashAttention) |
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = [
    "KINDS",
    "Cache",
    "Plan",
    "Simulation",
    "Transfers",
    "choose_attention",
    "count_transfers",
    "io_lower_bound",
    "plan_attention",
    "simulate",
    "square_tiling_attention",
]

#: What is counted and executed: square tiling as published and with a running maximum,
#: FlashAttention with queries and with keys in the outer loop, and the passes of unfused attention.
KINDS = ("square", "square_safe", "fa2", "fa1", "unfused")


class Plan(NamedTuple):
    """An algorithm and its tiles.

    Fields:
        kind: of `KINDS`.
        block_q: rows of queries a tile; of the square kinds and "unfused" the side of all tiles.
        block_kv: keys a tile; of "unfused" how much of a row of scores the softmax holds.
    """

    kind: str
    block_q: int
    block_kv: int


class Transfers(NamedTuple):
    """Words read from and written to slow memory, and the most that the cache held."""

    reads: int
    writes: int
    live: int

    @property
    def total(self) -> int:
        """Words read and written."""
        return self.reads + self.writes


class Simulation(NamedTuple):
    """What an execution gave.

    Fields:
        out: attention, (n, d), float64.
        transfers: what was counted.
        densest: the most scores that were finished within m transfers in a row.
    """

    out: np.ndarray
    transfers: Transfers
    densest: int


# What is counted


def io_lower_bound(n: int, d: int, m: int) -> float:
    """Words that exact attention of (n, d) has to move with m words of cache, up to a constant.

    Raises:
        ValueError: a size is no whole number of at least 1.

    >>> io_lower_bound(1024, 64, 64**2) == 1024**2  # both bounds are n^2 where they cross
    True
    >>> io_lower_bound(1024, 64, 10**6)  # inputs have to be read
    65536.0
    """
    _check_sizes(n=n, d=d, m=m)
    return max(float(n * d), min(n * n * d / math.sqrt(m), n * n * d * d / m))


def plan_attention(kind: str, n: int, d: int, m: int, *, inner: int = 1) -> Plan:
    """The tiles for a cache of m words: as large as it holds, floor(sqrt(m / 4)) of square tiling.

    The latter is as published; a `Plan` of any other side that fits can be counted and executed.

    Args:
        kind: of `KINDS`.
        n, d: queries (and keys), and their width.
        m: words.
        inner: tile of FlashAttention's inner loop. Hardware wants more than one row; the words
            moved hardly depend on it while it is small beside the outer tile.

    Raises:
        ValueError: an unknown kind, a size below 1, or a cache that does not hold one tile.

    >>> plan_attention("square", 1024, 64, 4096), plan_attention("fa2", 1024, 64, 4096)
    (Plan(kind='square', block_q=32, block_kv=32), Plan(kind='fa2', block_q=30, block_kv=1))
    """
    _check_kind(kind)
    _check_sizes(n=n, d=d, m=m, inner=inner)
    inner = min(inner, n)
    match kind:
        case "fa2":
            outer = (m - 2 * inner * d) // (2 * d + inner + 2)
            plan, least = Plan(kind, min(outer, n), inner), Plan(kind, 1, inner)
        case "fa1":
            outer = (m - 2 * inner * (d + 1)) // (2 * d + inner)
            plan, least = Plan(kind, inner, min(outer, n)), Plan(kind, inner, 1)
        case "unfused":
            side = min(math.isqrt(m // 3), max(n, d))
            plan, least = Plan(kind, side, min(m - 2, n)), Plan(kind, 1, 1)
        case _:
            side = min(math.isqrt(m // 4), max(n, d))
            plan, least = Plan(kind, side, side), Plan(kind, 1, 1)
    needed = count_transfers(least, n, d).live
    if m < needed:
        raise ValueError(f"m={m}: {kind} at n={n}, d={d} needs a cache of at least {needed} words")
    return plan


def count_transfers(plan: Plan, n: int, d: int) -> Transfers:
    """Words that a plan moves for (n, d), and the cache that it needs; what `simulate` counts.

    "fa1" reads outputs, sums and maxima in its first pass too; that they are zero or -inf in slow
    memory at the start costs nothing. "fa2" writes a logarithm a row beside the outputs.

    Raises:
        ValueError: an unknown kind, or a size or tile below 1.

    >>> count_transfers(Plan("square", 4, 4), 64, 16)
    Transfers(reads=65600, writes=5184, live=52)
    >>> count_transfers(Plan("fa2", 64, 1), 1024, 64)
    Transfers(reads=2162688, writes=66560, live=8512)
    """
    _check_plan(plan)
    _check_sizes(n=n, d=d)
    rows, columns = -(-n // plan.block_q), -(-n // plan.block_kv)
    b, c = min(plan.block_q, n), min(plan.block_kv, n)
    across, wide = -(-d // plan.block_q), min(plan.block_q, d)
    products = 3 * n * d * rows + n * n * across  # tiles of q k^T and of the scores times v
    flash = 2 * d * (b + c) + b * c + 2 * b
    match plan.kind:
        case "fa2":
            return Transfers(n * d + 2 * n * d * rows, n * d + n, flash)
        case "fa1":
            reads = 2 * n * d + columns * (2 * n * d + 2 * n)
            return Transfers(reads, columns * (n * d + 2 * n), flash)
        case "unfused":
            looks = 1 if c == n else 2  # at the scores, by the softmax
            live = max(b * b + 2 * b * wide, c + 2)
            return Transfers(products + looks * n * n, 2 * n * n + n * d, live)
    kept = 2 if plan.kind == "square_safe" else 1  # numbers a row
    writes = n * n + kept * n + n * d
    return Transfers(products + kept * n, writes, b * b + 2 * b * wide + kept * b)


def choose_attention(n: int, d: int, m: int, *, inner: int = 1) -> Plan:
    """The plan that moves fewer words: FlashAttention ("fa2") or square tiling ("square").

    Args:
        n, d: queries (and keys), and their width.
        m: usable words of the fast memory. A multiprocessor of an H100 has 58112 words of float32
            for a block, a TPU v5e 33554432.
        inner: as `plan_attention`.

    Raises:
        ValueError: a size below 1, or fewer than 4 words.

    >>> choose_attention(8192, 128, 58112, inner=64)
    Plan(kind='fa2', block_q=129, block_kv=64)
    >>> choose_attention(8192, 512, 16384)  # less than a quarter of d^2
    Plan(kind='square', block_q=64, block_kv=64)
    """
    square = plan_attention("square", n, d, m)
    try:
        flash = plan_attention("fa2", n, d, m, inner=inner)
    except ValueError:
        _check_sizes(inner=inner)
        return square
    moved = lambda plan: count_transfers(plan, n, d).total
    return flash if moved(flash) <= moved(square) else square


# What is executed


class Cache:
    """Fast memory of m words that counts what moves, and places nothing by itself.

    Attributes:
        reads, writes: words moved so far.
        live, peak: words held now, and at most so far.

    Raises:
        ValueError: more than m words at once; a tile is stored or freed that is not held.

    >>> cache, slow = Cache(6), np.arange(8.0)
    >>> tile = cache.load(slow[:4])
    >>> tile *= 2
    >>> cache.store(tile, slow[:4])
    >>> cache.free(tile)
    >>> slow[:4].tolist(), cache.reads, cache.writes, cache.live, cache.peak
    ([0.0, 2.0, 4.0, 6.0], 4, 4, 0, 4)
    >>> cache.load(slow)
    Traceback (most recent call last):
    ValueError: 8 words more: 0 of m=6 are held
    """

    def __init__(self, m: int):
        _check_sizes(m=m)
        self.m = m
        self.reads = self.writes = self.live = self.peak = 0
        self._held: dict[int, np.ndarray] = {}
        self._times: list[int] = []
        self._finished: list[int] = []

    def new(self, shape: int | tuple[int, ...], value: float = 0.0) -> np.ndarray:
        """Room for what is computed."""
        return self._hold(np.full(shape, value))

    def load(self, source: np.ndarray) -> np.ndarray:
        """A tile of slow memory, copied into the cache."""
        tile = self._hold(source.copy())
        self.reads += tile.size
        return tile

    def store(self, tile: np.ndarray, target: np.ndarray) -> None:
        """Write a tile that is held to slow memory; it stays."""
        self._look_up(tile)
        target[...] = tile
        self.writes += tile.size

    def free(self, *tiles: np.ndarray) -> None:
        """Forget tiles."""
        for tile in tiles:
            self._look_up(tile)
            del self._held[id(tile)]
            self.live -= tile.size

    def finish(self, scores: int) -> None:
        """Note that so many entries of q k^T are complete."""
        self._times.append(self.reads + self.writes)
        self._finished.append(scores)

    def densest(self) -> int:
        """The most scores that were finished within m transfers in a row."""
        if not self._times:
            return 0
        times, sums = np.array(self._times), np.cumsum([0, *self._finished])
        ends = np.searchsorted(times, times + self.m, side="right")
        return int(np.max(sums[ends] - sums[:-1]))

    def _hold(self, tile: np.ndarray) -> np.ndarray:
        if self.live + tile.size > self.m:
            raise ValueError(f"{tile.size} words more: {self.live} of m={self.m} are held")
        self._held[id(tile)] = tile
        self.live += tile.size
        self.peak = max(self.peak, self.live)
        return tile

    def _look_up(self, tile: np.ndarray) -> None:
        if id(tile) not in self._held:
            raise ValueError(f"a tile of shape {tile.shape} is not held in the cache")


def simulate(plan: Plan, q: np.ndarray, k: np.ndarray, v: np.ndarray, m: int) -> Simulation:
    """Execute a plan in a `Cache` of m words, in float64: softmax(q k^T) v, and what it moved.

    Slow: a Python loop over tiles. Kind "square" takes exp of the scores as they are, as published,
    which overflows beyond 709.

    Args:
        q, k, v: (n, d).
        m: words.

    Raises:
        ValueError: shapes that are not one (n, d), an unknown kind, a size or tile below 1, or
            a plan that needs more than m words.

    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 8, 2))
    >>> simulate(Plan("square", 2, 2), q, k, v, 16).transfers
    Transfers(reads=264, writes=88, live=14)
    """
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    _check_shapes(q, k, v)
    needed = count_transfers(plan, *q.shape).live
    cache = Cache(m)
    if needed > m:
        raise ValueError(f"m={m}: {plan} needs a cache of {needed} words")
    execute = {"fa2": _fa2, "fa1": _fa1, "unfused": _unfused}.get(plan.kind, _square)
    out = execute(cache, plan, q, k, v)
    return Simulation(out, Transfers(cache.reads, cache.writes, cache.peak), cache.densest())


def _tiles(size: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]


def _width(part: slice) -> int:
    return part.stop - part.start


def _square(cache: Cache, plan: Plan, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    safe = plan.kind == "square_safe"
    (n, d), side = q.shape, plan.block_q
    rows, columns = _tiles(n, side), _tiles(d, side)
    scores, out, stored_sums, stored_tops = _slow(n, n), _slow(n, d), _slow(n), _slow(n)
    for i in rows:
        sums = cache.new(_width(i))
        tops = cache.new(_width(i), -np.inf) if safe else None
        for j in rows:
            tile = _product(cache, q, k, i, j, columns)
            if tops is None:
                np.exp(tile, out=tile)
                sums += tile.sum(axis=1)
            else:
                _update(tile, sums, tops)
            cache.store(tile, scores[i, j])
            cache.free(tile)
        cache.store(sums, stored_sums[i])
        cache.free(sums)
        if tops is not None:
            cache.store(tops, stored_tops[i])
            cache.free(tops)
    for i in rows:
        sums = cache.load(stored_sums[i])
        tops = cache.load(stored_tops[i]) if safe else None
        for j in columns:
            tile = cache.new((_width(i), _width(j)))
            for h in rows:
                left, right = cache.load(scores[i, h]), cache.load(v[h, j])
                if tops is not None:
                    np.exp(left - tops[:, None], out=left)
                left /= sums[:, None]
                tile += left @ right
                cache.free(left, right)
            cache.store(tile, out[i, j])
            cache.free(tile)
        cache.free(*[part for part in (sums, tops) if part is not None])
    return out


def _fa2(cache: Cache, plan: Plan, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    n, d = q.shape
    out, logs = _slow(n, d), _slow(n)
    for i in _tiles(n, plan.block_q):
        query, mixed = cache.load(q[i]), cache.new((_width(i), d))
        sums, tops = cache.new(_width(i)), cache.new(_width(i), -np.inf)
        for j in _tiles(n, plan.block_kv):
            key, value = cache.load(k[j]), cache.load(v[j])
            tile = cache.new((_width(i), _width(j)))
            np.matmul(query, key.T, out=tile)
            cache.finish(tile.size)
            mixed *= _update(tile, sums, tops, keep=False)[:, None]
            mixed += tile @ value
            cache.free(key, value, tile)
        mixed /= sums[:, None]
        sums[:] = tops + np.log(sums)
        cache.store(mixed, out[i])
        cache.store(sums, logs[i])
        cache.free(query, mixed, sums, tops)
    return out


def _fa1(cache: Cache, plan: Plan, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    n, d = q.shape
    out, stored_sums, stored_tops = np.zeros((n, d)), np.zeros(n), np.full(n, -np.inf)
    for j in _tiles(n, plan.block_kv):
        key, value = cache.load(k[j]), cache.load(v[j])
        for i in _tiles(n, plan.block_q):
            query, mixed = cache.load(q[i]), cache.load(out[i])
            sums, tops = cache.load(stored_sums[i]), cache.load(stored_tops[i])
            tile = cache.new((_width(i), _width(j)))
            np.matmul(query, key.T, out=tile)
            cache.finish(tile.size)
            mixed *= sums[:, None]
            mixed *= _update(tile, sums, tops, keep=False)[:, None]
            mixed += tile @ value
            mixed /= sums[:, None]
            cache.store(mixed, out[i])
            cache.store(sums, stored_sums[i])
            cache.store(tops, stored_tops[i])
            cache.free(query, mixed, sums, tops, tile)
        cache.free(key, value)
    return out


def _unfused(cache: Cache, plan: Plan, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    (n, d), side = q.shape, plan.block_q
    rows, columns, parts = _tiles(n, side), _tiles(d, side), _tiles(n, plan.block_kv)
    scores, out = _slow(n, n), _slow(n, d)
    for i in rows:
        for j in rows:
            tile = _product(cache, q, k, i, j, columns)
            cache.store(tile, scores[i, j])
            cache.free(tile)
    for row in scores:
        total, top = cache.new(1), cache.new(1, -np.inf)
        for part in parts:
            held = cache.load(row[part])
            _update(held[None], total, top)
            if len(parts) > 1:
                cache.free(held)
        for part in parts:
            if len(parts) > 1:
                held = cache.load(row[part])
            held[:] = np.exp(held - top) / total
            cache.store(held, row[part])
            cache.free(held)
        cache.free(total, top)
    for i in rows:
        for j in columns:
            tile = cache.new((_width(i), _width(j)))
            for h in rows:
                left, right = cache.load(scores[i, h]), cache.load(v[h, j])
                tile += left @ right
                cache.free(left, right)
            cache.store(tile, out[i, j])
            cache.free(tile)
    return out


def _slow(*shape: int) -> np.ndarray:
    """Slow memory; what is read before it is written shows."""
    return np.full(shape, np.nan)


def _product(
    cache: Cache, q: np.ndarray, k: np.ndarray, i: slice, j: slice, columns: list[slice]
) -> np.ndarray:
    """A tile of scores, from tiles of queries and keys."""
    tile = cache.new((_width(i), _width(j)))
    for h in columns:
        left, right = cache.load(q[i, h]), cache.load(k[j, h])
        tile += left @ right.T
        cache.free(left, right)
    cache.finish(tile.size)
    return tile


def _update(
    tile: np.ndarray, sums: np.ndarray, tops: np.ndarray, *, keep: bool = True
) -> np.ndarray:
    """Take scores into running sums and maxima; what earlier sums were multiplied by.

    The tile becomes exp(scores - maximum) unless it is to be kept.
    """
    new = np.maximum(tops, tile.max(axis=1))
    scale = np.exp(tops - new)
    weights = np.exp(tile - new[:, None], out=None if keep else tile)
    sums *= scale
    sums += weights.sum(axis=1)
    tops[:] = new
    return scale


# Square tiling for arrays of JAX


@functools.partial(jax.jit, static_argnames=("block", "stable"))
def square_tiling_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, block: int, stable: bool = True
) -> jax.Array:
    """softmax(q k^T) v by square tiles, the scores in memory; for caches below a quarter of d^2.

    Works under `jit`, `vmap` (heads, batches) and `grad`. Scores and sums are float32, or float64
    for such arguments.

    Args:
        q, k, v: (n, d); no scale is applied.
        block: side of the tiles, `choose_attention(n, d, m).block_q` for a cache of m words.
        stable: subtract a running maximum. Without, as published, float32 overflows for scores
            above 88.

    Returns:
        (n, d), of q's type.

    Raises:
        ValueError: shapes that are not one (n, d), or a tile below 1.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 6, 4))
    >>> out = square_tiling_attention(q, k, v, block=4)
    >>> bool(jnp.allclose(out, jax.nn.softmax(q @ k.T) @ v, atol=1e-5))
    True
    """
    _check_shapes(q, k, v)
    _check_sizes(block=block)
    n, d = q.shape
    rows, columns = -(-n // block), -(-d // block)
    side, wide = -(-n // rows), -(-d // columns)  # even tiles pad least
    dtype = jnp.promote_types(q.dtype, jnp.float32)

    def tiles(x: jax.Array) -> jax.Array:
        """(rows, columns, side, wide), zeros at the edges."""
        x = jnp.pad(x.astype(dtype), ((0, rows * side - n), (0, columns * wide - d)))
        return x.reshape(rows, side, columns, wide).swapaxes(1, 2)

    queries, keys, values = tiles(q), tiles(k), tiles(v)
    positions = jnp.arange(rows * side).reshape(rows, side)

    def score_row(query: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One row of tiles of scores, or of their exp, and the sums and maxima of its rows."""

        def step(carry, inputs):
            sums, tops = carry
            key, position = inputs
            add = lambda h, tile: tile + query[h] @ key[h].T
            tile = lax.fori_loop(0, columns, add, jnp.zeros((side, side), dtype))
            tile = jnp.where(position < n, tile, -jnp.inf)
            if not stable:
                tile = jnp.exp(tile)
                return (sums + tile.sum(axis=1), tops), tile
            # Sums and weights are of the same maxima, whose derivative therefore cancels.
            new = jnp.maximum(tops, lax.stop_gradient(tile.max(axis=1)))
            weights = jnp.exp(tile - new[:, None])
            return (jnp.exp(tops - new) * sums + weights.sum(axis=1), new), tile

        start = (jnp.zeros(side, dtype), jnp.full(side, -jnp.inf, dtype))
        (sums, tops), row = lax.scan(step, start, (keys, positions))
        return row, sums, tops

    def out_row(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        row, sums, tops = inputs

        def weights(h: jax.Array) -> jax.Array:
            return jnp.exp(row[h] - tops[:, None]) if stable else row[h]

        def column(j: jax.Array) -> jax.Array:
            add = lambda h, tile: tile + weights(h) @ values[h, j]
            tile = lax.fori_loop(0, rows, add, jnp.zeros((side, wide), dtype))
            return tile / sums[:, None]

        return lax.map(column, jnp.arange(columns))

    out = lax.map(out_row, lax.map(score_row, queries))
    out = out.swapaxes(1, 2).reshape(rows * side, columns * wide)
    return out[:n, :d].astype(q.dtype)


# What is refused


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name}={size!r}: a whole number of at least 1 is needed")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: one of {', '.join(KINDS)} is needed")


def _check_plan(plan: Plan) -> None:
    _check_kind(plan.kind)
    _check_sizes(block_q=plan.block_q, block_kv=plan.block_kv)


def _check_shapes(*arrays: np.ndarray | jax.Array) -> None:
    shapes = tuple(tuple(array.shape) for array in arrays)
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise ValueError(f"q, k, v of shapes {shapes}: one shape (n, d) is needed")
