"""Attention as loops over tiles in plain JAX: memory that grows with the length, on any machine.

The order of FlashAttention-2 (arXiv 2307.08691): a block of queries keeps its running maximum m,
sum l and sum of weighted values a, while tiles of keys pass by,

    s = scale q k^T,  m' = max(m, max s),  p = exp(s - m'),
    l <- exp(m - m') l + sum p,  a <- exp(m - m') a + p v

and ends with o = a / l and L = m + log l. The gradient recomputes p = exp(s - L) by tiles of keys:

    dv = p^T do,  dp = do v^T,  ds = p (dp - D),  dk = scale ds^T q,  dq += scale ds k

with D = rowsum(do o) less the gradient of L. Heads whose tiles are small go together.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.attention.problem import (
    Problem,
    additive,
    padded,
    softcapped,
    tile_range,
    varying_like,
)


class Blocks(NamedTuple):
    """Queries of a block, keys of a tile, and how many key heads go together."""

    q: int
    kv: int
    heads: int


def why_not(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why this implementation cannot serve these arrays, or None."""
    return None if q.size and k.size else "a loop over tiles needs a query and a key"


def why_not_on(platform: str, kind: str) -> None:
    """Why this implementation cannot run on a device; it always can."""


def choose_blocks(q: jax.Array, k: jax.Array, *, gradient: bool) -> Blocks:
    """What measured best on CPUs: tiles that stay in cache, larger forward, few heads at a time.

    Elsewhere, where nothing was measured, as many heads as have 2^26 scores keep a device busy.
    """
    (b, t, n, _), (s, heads) = q.shape, k.shape[1:3]
    most_q, most_kv = (512, 128) if gradient else (512, 256) if t <= 1024 else (1024, 512)
    even = lambda size, most: -(-size // -(-size // most))
    block_q, block_kv = even(t, most_q), even(s, most_kv)
    most = 2**18 if jax.default_backend() == "cpu" else 2**26
    fit = max(1, most // (block_q * block_kv * (n // heads)))
    together = max(c for c in range(1, b * heads + 1) if b * heads % c == 0 and c <= fit)
    return Blocks(block_q, block_kv, together)


def forward(problem, q, k, v, bias=None, q_ids=None, kv_ids=None, *, blocks=None):
    """As `reference.forward`, tile by tile."""
    blocks = blocks or choose_blocks(q, k, gradient=False)
    tiles = _Tiles(problem, q, k, v, bias, q_ids, kv_ids, blocks)
    band, wide, block = problem.band, tiles.wide, tiles.blocks.q

    def of_rows(group, k, v, i, q):
        bounds = tile_range(band, i * block, tiles.last_query(i), tiles.blocks.kv, tiles.keys)

        def step(masked, j, carry):
            a, m, total = carry
            s, _ = tiles.scores(group, i, j, q, k[j], masked=masked)
            new = jnp.maximum(m, jnp.max(s, axis=-1, keepdims=True))
            safe = jnp.where(new == -jnp.inf, 0, new)
            p, old = jnp.exp(s - safe), jnp.exp(m - safe)
            total = old * total + jnp.sum(p, axis=-1, keepdims=True)
            pv = _rows_by_keys(p.astype(v.dtype), v[j], wide)
            return old * a + pv, new, total

        a = tiles.zeros(*q.shape[:-1], v.shape[-1])
        total = tiles.zeros(*q.shape[:-1], 1)
        a, m, total = tiles.loop(
            step, band, tiles.keys, tiles.blocks.kv, bounds, (a, total - jnp.inf, total)
        )
        some = ~(total <= 0)  # not a number stays that
        total = jnp.where(some, total, 1)
        return (a / total).astype(q.dtype), jnp.where(some, m + jnp.log(total), -jnp.inf)

    def of_group(xs):
        group, q, k, v = xs
        return lax.map(lambda xs: of_rows(group, k, v, *xs), (jnp.arange(q.shape[0]), q))

    out, lse = lax.map(of_group, (tiles.groups, tiles.q, tiles.k, tiles.v))
    return tiles.of_queries(out), tiles.of_queries(lse)[..., 0].swapaxes(1, 2)


def backward(
    problem, q, k, v, bias, q_ids, kv_ids, out, lse, dout, dlse, *, bias_gradient, blocks=None
):
    """As `reference.backward`, tile by tile."""
    blocks = blocks or choose_blocks(q, k, gradient=True)
    tiles = _Tiles(problem, q, k, v, bias, q_ids, kv_ids, blocks)
    band, wide, block = problem.band.transposed, tiles.wide, tiles.blocks.kv
    delta = jnp.sum(dout.astype(wide) * out.astype(wide), axis=-1)
    delta = delta - dlse.astype(wide).swapaxes(1, 2)
    # Queries that see nothing, and those of padding, get weights exp(-inf) = 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse).swapaxes(1, 2)
    rows = tiles.queries(dout), tiles.queries(lse, jnp.inf), tiles.queries(delta)

    def of_keys(group, rows, carry, xs):
        j, k, v = xs
        last = jnp.minimum((j + 1) * block, tiles.keys) - 1
        bounds = tile_range(band, j * block, last, tiles.blocks.q, tiles.count)

        def step(masked, i, carry):
            dk, dv, dq, dbias = carry
            q, do, lse, delta = (x[i] for x in rows)
            s, capped = tiles.scores(group, i, j, q, k, masked=masked, ragged=True)
            p = jnp.exp(s - lse)
            narrow = p.astype(do.dtype)
            dv = dv + _keys_by_rows(narrow, do, wide)
            dp = _rows_and_keys(do, v, wide)
            ds = p * (dp - delta)
            if dbias is not None:
                axes = [a for a, d in ((1, 2), (2, 4), (3, 6)) if dbias.shape[d] == 1]
                total = jnp.sum(ds, axis=axes, keepdims=True)
                dbias = dbias.at[tiles.of_bias(group, i, j)].add(total)
            if problem.softcap is not None:
                ds = ds * (1 - (capped / problem.softcap) ** 2)
            ds = ds.astype(q.dtype)
            dk = dk + _keys_by_rows(ds, q, wide)
            dq = dq.at[i].add(_rows_by_keys(ds, k, wide))
            return dk, dv, dq, dbias

        carry = (tiles.zeros(*k.shape), tiles.zeros(*v.shape), *carry)
        dk, dv, *carry = tiles.loop(step, band, tiles.count, tiles.blocks.q, bounds, carry)
        return tuple(carry), (dk, dv)

    def of_group(dbias, xs):
        group, q, k, v, *rows = xs
        carry = tiles.zeros(*q.shape), dbias
        each = lambda carry, xs: of_keys(group, (q, *rows), carry, xs)
        (dq, dbias), (dk, dv) = lax.scan(each, carry, (jnp.arange(k.shape[0]), k, v))
        dq, dk = dq * problem.scale, dk * tiles.after
        return dbias, (dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype))

    dbias = tiles.zeros(*tiles.bias.shape) if bias_gradient else None
    xs = tiles.groups, tiles.q, tiles.k, tiles.v, *rows
    dbias, (dq, dk, dv) = lax.scan(of_group, dbias, xs)
    if dbias is not None:
        dbias = tiles.as_bias(dbias).astype(bias.dtype)
    return tiles.of_queries(dq), tiles.of_keys(dk), tiles.of_keys(dv), dbias


class _Tiles:
    """The arguments heads first and cut into tiles; h counts groups of c key heads.

    Attributes:
        q: [h, nq, c, g, block_q, D], scaled unless it is of half precision, which that rounds.
        k, v: [h, nk, c, block_kv, D or E].
        bias: [B?, K?, g?, nq?, block_q?, nk?, block_kv?], each 1 where it broadcasts, or None.
        after: what scores are multiplied by, as q was not.
    """

    def __init__(self, problem, q, k, v, bias, q_ids, kv_ids, blocks):
        self.problem = problem
        self.batch, self.count, self.n, _ = q.shape
        self.keys, self.heads = k.shape[1:3]
        self.blocks = blocks
        self.wide = jnp.promote_types(q.dtype, jnp.float32)
        half = q.dtype.itemsize < 4
        self.after = problem.scale if half else 1.0
        self.like = tuple(x for x in (q, k, v, bias, q_ids, kv_ids) if x is not None)
        self.q = self.queries(q if half else q * problem.scale)
        self.k, self.v = self.of_heads(k), self.of_heads(v)
        self.groups = jnp.arange(self.q.shape[0])
        self.bias_shape = None if bias is None else bias.shape
        self.bias = None if bias is None else self._cut_bias(bias)
        rows = lambda ids, block: padded(ids, 1, block).reshape(self.batch, -1, block)
        self.q_ids = None if q_ids is None else rows(q_ids, self.blocks.q)
        self.kv_ids = None if kv_ids is None else rows(kv_ids, self.blocks.kv)

    def last_query(self, i):
        return jnp.minimum((i + 1) * self.blocks.q, self.count) - 1

    def zeros(self, *shape: int) -> jax.Array:
        return varying_like(jnp.zeros(shape, self.wide), *self.like)

    def queries(self, x: jax.Array, fill: float = 0) -> jax.Array:
        """[B, T, N, d] -> [h, nq, c, g, block_q, d]; d = 1 is added to [B, T, N]."""
        x = padded(x if x.ndim == 4 else x[..., None], 1, self.blocks.q, fill)
        group = self.n // self.heads
        x = x.reshape(self.batch, -1, self.blocks.q, self.heads, group, x.shape[-1])
        x = x.transpose(0, 3, 1, 4, 2, 5)
        return jnp.moveaxis(x.reshape(-1, self.blocks.heads, *x.shape[2:]), 1, 2)

    def of_queries(self, x: jax.Array) -> jax.Array:
        """The inverse of `queries`."""
        x = jnp.moveaxis(x, 2, 1)
        x = x.reshape(self.batch, self.heads, *x.shape[2:]).transpose(0, 2, 4, 1, 3, 5)
        return x.reshape(self.batch, -1, self.n, x.shape[-1])[:, : self.count]

    def of_heads(self, x: jax.Array) -> jax.Array:
        """[B, S, K, d] -> [h, nk, c, block_kv, d]."""
        x = padded(x, 1, self.blocks.kv)
        x = x.reshape(self.batch, -1, self.blocks.kv, self.heads, x.shape[-1])
        x = x.transpose(0, 3, 1, 2, 4)
        return jnp.moveaxis(x.reshape(-1, self.blocks.heads, *x.shape[2:]), 1, 2)

    def of_keys(self, x: jax.Array) -> jax.Array:
        """The inverse of `of_heads`."""
        x = jnp.moveaxis(x, 2, 1)
        x = x.reshape(self.batch, self.heads, *x.shape[2:]).transpose(0, 2, 3, 1, 4)
        return x.reshape(self.batch, -1, self.heads, x.shape[-1])[:, : self.keys]

    def _cut_bias(self, x: jax.Array) -> jax.Array:
        for axis, block in ((2, self.blocks.q), (3, self.blocks.kv)):
            x = padded(x, axis, block) if x.shape[axis] > 1 else x
        cut = lambda size, block: (1, 1) if size == 1 else (size // block, block)
        heads = (1, 1) if x.shape[1] == 1 else (self.heads, self.n // self.heads)
        rows, columns = cut(x.shape[2], self.blocks.q), cut(x.shape[3], self.blocks.kv)
        return x.reshape(x.shape[0], *heads, *rows, *columns)

    def as_bias(self, x: jax.Array) -> jax.Array:
        """The inverse of the cut of a bias."""
        b, heads, group, rows, block_q, columns, block_kv = x.shape
        x = x.reshape(b, heads * group, rows * block_q, columns * block_kv)
        return x[:, :, : self.bias_shape[2], : self.bias_shape[3]]

    def places(self, group: Any) -> tuple[Any, Any]:
        """Batch and key head of each head of a group, [c] each."""
        flat = group * self.blocks.heads + jnp.arange(self.blocks.heads)
        return flat // self.heads, flat % self.heads

    def of_bias(self, group: Any, i: Any, j: Any) -> tuple[Any, ...]:
        """Index of a tile [c, g?, block_q?, block_kv?] of the bias, 0 where it broadcasts."""
        batch, head = self.places(group)
        at = lambda axis, x: x if self.bias.shape[axis] > 1 else 0 * x
        every = slice(None)
        return at(0, batch), at(1, head), every, at(3, i), every, at(5, j), every

    def scores(self, group, i, j, q, k, *, masked: bool, ragged: bool = False):
        """Scores of a tile [c, g, block_q, block_kv], and the capped ones before the bias.

        Args:
            masked: hide what is not to be seen; else only keys of padding, if `ragged`.
        """
        s = _rows_and_keys(q, k, self.wide)
        s = s if self.after == 1 else s * self.after
        s = capped = softcapped(s, self.problem.softcap)
        if self.bias is not None:
            s = s + additive(self.bias[self.of_bias(group, i, j)], self.wide)
        columns = j * self.blocks.kv + jnp.arange(self.blocks.kv)
        seen = True
        if (masked or ragged) and self.keys % self.blocks.kv:
            seen = columns < self.keys
        if masked:
            rows = i * self.blocks.q + jnp.arange(self.blocks.q)[:, None]
            seen = self.problem.band.sees(rows, columns) & seen
        if self.q_ids is not None:
            batch, _ = self.places(group)
            same = self.q_ids[batch, i][:, :, None] == self.kv_ids[batch, j][:, None, :]
            seen = same[:, None] & seen
        return s if seen is True else jnp.where(seen, s, -jnp.inf), capped

    def loop(self, step, band, size, block, bounds, carry):
        """Run `step(masked, index, carry)` over tiles: those across the band's edges masked."""
        begin, full, edge, end = bounds
        across = band.right is not None or size % block != 0
        parts = [(begin, full, True)] if band.left is not None else []
        parts += [(full, edge, False)] + ([(edge, end, True)] if across else [])
        for start, stop, masked in parts:
            run = lambda index, carry, masked=masked: step(masked, index, carry)
            carry = lax.fori_loop(start, stop, run, carry)
        return carry


# Products of a tile. One head at a time is a product of matrices, which XLA's CPU compiler makes
# faster than one of arrays with an axis of length one.


def _product(x: jax.Array, y: jax.Array, contract: tuple[int, int], wide: Any) -> jax.Array:
    """[c, ., .] and [c, ., .] -> [c, ., .], over the axes of the matrices that are named."""

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        axes = (contract[:1], contract[1:]), ((), ())
        return lax.dot_general(x, y, axes, preferred_element_type=wide)

    return product(x[0], y[0])[None] if x.shape[0] == 1 else jax.vmap(product)(x, y)


def _flat(x: jax.Array) -> jax.Array:
    """[c, g, q, .] -> [c, g q, .]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _rows_and_keys(rows: jax.Array, keys: jax.Array, wide: Any) -> jax.Array:
    """[c, g, q, d] and [c, k, d] -> [c, g, q, k]."""
    return _product(_flat(rows), keys, (1, 1), wide).reshape(*rows.shape[:-1], -1)


def _rows_by_keys(weights: jax.Array, keys: jax.Array, wide: Any) -> jax.Array:
    """[c, g, q, k] and [c, k, d] -> [c, g, q, d]."""
    return _product(_flat(weights), keys, (1, 0), wide).reshape(*weights.shape[:-1], -1)


def _keys_by_rows(weights: jax.Array, rows: jax.Array, wide: Any) -> jax.Array:
    """[c, g, q, k] and [c, g, q, d] -> [c, k, d]."""
    return _product(_flat(weights), _flat(rows), (0, 0), wide)
