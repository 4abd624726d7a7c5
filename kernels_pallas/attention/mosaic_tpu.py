"""Attention on a TPU: Pallas kernels over the tiles that the mask leaves, and no others.

Which tiles those are is known while tracing, so the grid's last axis runs over a list of them, and
the blocks' indices are read from the list (scalar prefetch): a causal mask costs no empty steps.

Forward, by rows of tiles: FlashAttention-2's order, with exponentials in base 2. Backward, one
kernel by columns of tiles, on transposed scores, so that what belongs to a query is a row: five
products a tile, where two kernels for dq and for dk and dv need seven. The gradient of a head's
queries stays in VMEM all along, in float32; longer sequences are cut into parts that fit.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.problem import (
    HIDDEN,
    LOG2E,
    Band,
    Problem,
    additive,
    padded,
    shape_like,
    softcapped,
    tile_range,
)

_FIRST, _LAST, _MASKED = 1, 2, 4
#: Bytes of VMEM for the gradients of a head's queries: in float32, and twice as they go out.
_QUERY_BYTES = 24 * 2**20
_VMEM_BYTES = 64 * 2**20


class Blocks(NamedTuple):
    """Queries and keys of a tile."""

    q: int
    kv: int


def why_not(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why the kernels cannot serve these arrays on any TPU, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"TPU kernels serve float32 and bfloat16, q is {q.dtype}"
    if max(q.shape[3], v.shape[3]) > 512:
        return f"TPU kernels serve head sizes up to 512, not {q.shape[3]} and {v.shape[3]}"
    if not (q.size and k.size):
        return "TPU kernels need a query and a key"
    return None


def why_not_on(platform: str, kind: str) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    return None if platform == "tpu" else f"it runs on TPUs, this is {kind}"


def choose_blocks(q: jax.Array, k: jax.Array) -> Blocks:
    """Tiles of 512 queries and keys, smaller for short arrays; multiples of 128."""
    fit = lambda size: min(512, -(-size // 128) * 128)
    return Blocks(fit(q.shape[1]), fit(k.shape[1]))


class Visits(NamedTuple):
    """The tiles that a kernel visits, in order: their row, column, and flags; int32 each."""

    rows: np.ndarray
    columns: np.ndarray
    flags: np.ndarray


def visits(band: Band, queries: int, keys: int, blocks: Blocks, *, by: str, every=False) -> Visits:
    """Tiles by rows or by columns; a row or column of none has one, all of it masked.

    Args:
        band: which keys a query sees.
        by: "rows" or "columns".
        every: the tiles that the mask hides, too.
    """
    across = (-(-queries // blocks.q), -(-keys // blocks.kv))
    first = np.arange(across[0]) * blocks.q
    last = np.minimum(first + blocks.q, queries) - 1
    bounds = tile_range(band, first, last, blocks.kv, keys, np)
    begin, full, edge, end, _ = (x[:, None] for x in np.broadcast_arrays(*bounds, first))
    column = np.arange(across[1])
    seen = np.full(across, True) if every else (begin <= column) & (column < end)
    masked = ~((full <= column) & (column < edge))
    seen[~seen.any(axis=1), 0] = True
    if by == "columns":
        seen[0, ~seen.any(axis=0)] = True
        columns, rows = np.nonzero(seen.T)
    else:
        rows, columns = np.nonzero(seen)
    major = columns if by == "columns" else rows
    change = np.diff(major, prepend=-1, append=-1) != 0
    flags = _FIRST * change[:-1] + _LAST * change[1:] + _MASKED * masked[rows, columns]
    return Visits(*(np.asarray(x, np.int32) for x in (rows, columns, flags)))


def forward(
    problem, q, k, v, bias=None, q_ids=None, kv_ids=None, *, blocks=None, interpret: Any = False
):
    """As `reference.forward`, by a kernel; `interpret` is that of `pallas_call`."""
    blocks = blocks or choose_blocks(q, k)
    (b, t, n, _), (_, s, _, e) = q.shape, v.shape
    seen = visits(problem.band, t, s, blocks, by="rows")
    given = _Given(problem, q, k, v, bias, q_ids, kv_ids, blocks, transposed=False)
    rows, lanes = given.q.shape[2], min(128, blocks.kv)
    block = lambda size, width, at: pl.BlockSpec((None, None, size, width), at)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, problem, given.some, seen.flags, s, blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, n, len(seen.rows)),
            in_specs=given.specs,
            out_specs=[
                block(blocks.q, e, lambda b, h, i, rows, *_: (b, h, rows[i], 0)),
                block(1, blocks.q, lambda b, h, i, rows, *_: (b, h, 0, rows[i])),
            ],
            scratch_shapes=[
                pltpu.VMEM((blocks.q, e), jnp.float32),
                pltpu.VMEM((blocks.q, lanes), jnp.float32),
                pltpu.VMEM((blocks.q, lanes), jnp.float32),
            ],
        ),
        out_shape=[
            shape_like((b, n, rows, e), q.dtype, q),
            shape_like((b, n, 1, rows), jnp.float32, q),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=_cost(given, seen, blocks, products=2),
        interpret=interpret,
        name="flash_attention_forward",
    )(*seen, *given.arrays)
    return out.swapaxes(1, 2)[:, :t], lse[:, :, 0, :t]


def backward(
    problem, q, k, v, bias, q_ids, kv_ids, out, lse, dout, dlse, *,
    bias_gradient, blocks=None, interpret: Any = False,
):  # fmt: skip
    """Gradients of q, k, v and the bias; arguments as for `xla.backward`.

    A bias' gradient is made of all scores', in memory.
    """
    blocks = blocks or choose_blocks(q, k)
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    delta = delta - dlse
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    width = -(-q.shape[3] // 128) * 128 * (4 + 2 * q.dtype.itemsize)
    part = max(blocks.q, _QUERY_BYTES // width // blocks.q * blocks.q)
    total: Any = None
    dqs, dbiases = [], []
    for start in range(0, q.shape[1], part):
        cut = lambda x, axis, start=start: (
            x if x is None or x.shape[axis] == 1 else
            jax.lax.slice_in_dim(x, start, min(start + part, x.shape[axis]), axis=axis)
        )  # fmt: skip
        band = problem.band._replace(offset=problem.band.offset + start)
        dq, dbias, *new = _backward_part(
            problem._replace(band=band), cut(q, 1), k, v, None if bias is None else cut(bias, 2),
            cut(q_ids, 1), kv_ids, cut(dout, 1), cut(lse, 2), cut(delta, 2),
            bias_gradient, blocks, interpret,
        )  # fmt: skip
        dqs.append(dq)
        dbiases.append(dbias)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    dk, dv = (x.astype(like.dtype) for x, like in zip(total, (k, v), strict=True))
    dbias = None
    if bias_gradient:
        dbias = jnp.concatenate(dbiases, axis=2)
        axes = [a for a in range(4) if bias.shape[a] == 1]
        dbias = jnp.sum(dbias, axis=axes, keepdims=True).astype(bias.dtype)
    return jnp.concatenate(dqs, axis=1), dk, dv, dbias


def _backward_part(
    problem, q, k, v, bias, q_ids, kv_ids, dout, lse, delta, bias_gradient, blocks, interpret
):
    (b, t, n, d), (_, s, heads, e) = q.shape, v.shape
    group = n // heads
    seen = visits(problem.band, t, s, blocks, by="columns", every=bias_gradient)
    given = _Given(problem, q, k, v, bias, q_ids, kv_ids, blocks, transposed=True)
    (rows, columns) = (given.q.shape[2], given.k.shape[2])
    do = padded(dout.swapaxes(1, 2), 2, blocks.q)
    lse = padded(lse, 2, blocks.q, jnp.inf)[:, :, None]
    delta = padded(delta, 2, blocks.q)[:, :, None]
    block = lambda size, width, at: pl.BlockSpec((None, None, size, width), at)
    of_row = lambda b, h, i, rows, *_: (b, h, 0, rows[i])
    of_column = lambda b, h, i, rows, columns, flags: (b, h, columns[i], 0)
    # Of grouped heads the partial sums stay in float32.
    partial = jnp.float32 if group > 1 else k.dtype
    out_specs = [
        block(rows, d, lambda b, h, i, *_: (b, h, 0, 0)),
        block(blocks.kv, d, of_column),
        block(blocks.kv, e, of_column),
    ]
    out_shape = [
        shape_like((b, n, rows, d), q.dtype, q),
        shape_like((b, n, columns, d), partial, q),
        shape_like((b, n, columns, e), partial, q),
    ]
    if bias_gradient:
        at = lambda b, h, i, rows, columns, flags: (b, h, columns[i], rows[i])
        out_specs.append(block(blocks.kv, blocks.q, at))
        out_shape.append(shape_like((b, n, columns, rows), jnp.float32, q))
    dq, dk, dv, *dbias = pl.pallas_call(
        functools.partial(
            _backward_kernel, problem, given.some, seen.flags, s, blocks, bias_gradient
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b, n, len(seen.rows)),
            in_specs=[
                *given.specs,
                block(blocks.q, e, lambda b, h, i, rows, *_: (b, h, rows[i], 0)),
                block(1, blocks.q, of_row),
                block(1, blocks.q, of_row),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((rows, d), jnp.float32),
                pltpu.VMEM((blocks.kv, d), jnp.float32),
                pltpu.VMEM((blocks.kv, e), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=_cost(given, seen, blocks, products=5),
        interpret=interpret,
        name="flash_attention_backward",
    )(*seen, *given.arrays, do, lse, delta)
    of_heads = lambda x: jnp.sum(
        x[:, :, :s].reshape(b, heads, group, s, -1).astype(jnp.float32), axis=2
    ).swapaxes(1, 2)
    dbias = dbias[0].swapaxes(2, 3)[:, :, :t, :s] if bias_gradient else None
    return dq.swapaxes(1, 2)[:, :t], dbias, of_heads(dk), of_heads(dv)


class _Given:
    """What both kernels read: heads first, padded to whole tiles, each with its block's spec."""

    def __init__(self, problem, q, k, v, bias, q_ids, kv_ids, blocks, transposed):
        group = q.shape[2] // k.shape[2]
        self.q = padded(q.swapaxes(1, 2), 2, blocks.q)
        self.k, self.v = (padded(x.swapaxes(1, 2), 2, blocks.kv) for x in (k, v))
        key = lambda b, h, i, rows, columns, flags: (b, h // group, columns[i], 0)
        spec = lambda size, x, at: pl.BlockSpec((None, None, size, x.shape[3]), at)
        self.arrays = [self.q, self.k, self.v]
        self.specs = [
            spec(blocks.q, q, lambda b, h, i, rows, columns, flags: (b, h, rows[i], 0)),
            spec(blocks.kv, k, key),
            spec(blocks.kv, v, key),
        ]
        #: Which of the optional arrays there are.
        self.some = (bias is not None, q_ids is not None)
        if bias is not None:
            for axis, block in ((2, blocks.q), (3, blocks.kv)):
                bias = padded(bias, axis, block) if bias.shape[axis] > 1 else bias
            on = [size > 1 for size in bias.shape]
            sizes = [blocks.q if on[2] else 1, blocks.kv if on[3] else 1]
            order = (1, 0) if transposed else (0, 1)
            self.arrays.append(bias.swapaxes(2, 3) if transposed else bias)

            def place(b, h, i, rows, columns, flags):
                tile = (rows[i] if on[2] else 0, columns[i] if on[3] else 0)
                return (b if on[0] else 0, h if on[1] else 0, tile[order[0]], tile[order[1]])

            self.specs.append(pl.BlockSpec((None, None, *(sizes[o] for o in order)), place))
        if q_ids is not None:
            for ids, block, along, of_queries in (
                (q_ids, blocks.q, transposed, True),
                (kv_ids, blocks.kv, not transposed, False),
            ):
                ids = padded(ids.astype(jnp.int32), 1, block)
                self.arrays.append(ids[:, None, :] if along else ids[:, :, None])
                size = (None, 1, block) if along else (None, block, 1)
                self.specs.append(pl.BlockSpec(size, _of_ids(along, of_queries)))


def _of_ids(along, of_queries):
    def place(b, h, i, rows, columns, flags):
        tile = rows[i] if of_queries else columns[i]
        return (b, 0, tile) if along else (b, tile, 0)

    return place


def _forward_kernel(problem, some, static_flags, keys, blocks, rows, columns, flags, *refs):
    q_ref, k_ref, v_ref, *refs = refs
    optional, (out_ref, lse_ref, acc_ref, m_ref, l_ref) = refs[:-5], refs[-5:]
    step = pl.program_id(2)
    flag = flags[step]

    @pl.when(flag & _FIRST != 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        m_ref[...] = jnp.full_like(m_ref, HIDDEN)
        l_ref[...] = jnp.zeros_like(l_ref)

    def tile(masked: bool):
        s, _ = _scores(
            problem, some, optional, q_ref[...], k_ref[...], rows[step], columns[step],
            keys, blocks, masked, transposed=False,
        )  # fmt: skip
        lanes = l_ref.shape[1]
        # Lanes hold equal maxima, and partial sums, which one reduction at the end completes.
        new = jnp.maximum(m_ref[...], jnp.max(s, axis=1, keepdims=True))
        p, old = jnp.exp2(s - _lanes(new, s.shape[1])), jnp.exp2(m_ref[...] - new)
        sums = [p[:, i : i + lanes] for i in range(0, p.shape[1], lanes)]
        l_ref[...] = old * l_ref[...] + functools.reduce(jnp.add, sums)
        pv = _dot(p.astype(v_ref.dtype), v_ref[...], ((1,), (0,)))
        acc_ref[...] = _lanes(old, pv.shape[1]) * acc_ref[...] + pv
        m_ref[...] = new

    _each(static_flags, flag, some, tile)

    @pl.when(flag & _LAST != 0)
    def _():
        total = jnp.sum(l_ref[...], axis=1, keepdims=True)
        there = ~(m_ref[:, :1] <= HIDDEN / 2)  # not a number stays that
        out = jnp.where(there, acc_ref[...] / total, 0.0)
        out_ref[...] = out.astype(out_ref.dtype)
        lse = jnp.where(there, m_ref[...] / LOG2E + jnp.log(total), -jnp.inf)
        lse_ref[...] = lse.T[:1]


def _backward_kernel(
    problem, some, static_flags, keys, blocks, bias_gradient, rows, columns, flags, *refs
):
    q_ref, k_ref, v_ref, *refs = refs
    count = 9 + bias_gradient
    optional, (do_ref, lse_ref, delta_ref, *refs) = refs[:-count], refs[-count:]
    dq_ref, dk_ref, dv_ref, *dbias_ref = refs[:-3]
    dq_acc, dk_acc, dv_acc = refs[-3:]
    step = pl.program_id(2)
    flag, row = flags[step], rows[step]

    @pl.when(step == 0)
    def _():
        dq_acc[...] = jnp.zeros_like(dq_acc)

    @pl.when(flag & _FIRST != 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    def tile(masked: bool):
        q, k, do = q_ref[...], k_ref[...], do_ref[...]
        s, capped = _scores(
            problem, some, optional, q, k, row, columns[step], keys, blocks, masked,
            transposed=True,
        )  # fmt: skip
        p = jnp.exp2(s - lse_ref[...])
        dv_acc[...] += _dot(p.astype(do.dtype), do, ((1,), (0,)))
        ds = p * (_dot(v_ref[...], do, ((1,), (1,))) - delta_ref[...])
        if bias_gradient:
            dbias_ref[0][...] = ds
        if problem.softcap is not None:
            ds = ds * (1 - (capped / problem.softcap) ** 2)
        ds = ds.astype(q.dtype)
        dk_acc[...] += _dot(ds, q, ((1,), (0,)))
        at = pl.ds(pl.multiple_of(row * blocks.q, blocks.q), blocks.q)
        dq_acc[at, :] += _dot(ds, k, ((0,), (0,)))

    _each(static_flags, flag, some, tile)

    @pl.when(flag & _LAST != 0)
    def _():
        dk_ref[...] = (dk_acc[...] * problem.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    @pl.when(step == len(static_flags) - 1)
    def _():
        dq_ref[...] = (dq_acc[...] * problem.scale).astype(dq_ref.dtype)


def _each(static_flags, flag, some, tile):
    """Run the kind of tile that the flag tells, of those that occur."""
    masked = static_flags & _MASKED != 0
    if some[1] or masked.all():
        tile(True)
    elif not masked.any():
        tile(False)
    else:
        pl.when(flag & _MASKED != 0)(lambda: tile(True))
        pl.when(flag & _MASKED == 0)(lambda: tile(False))


def _scores(problem, some, optional, q, k, row, column, keys, blocks, masked, transposed):
    """Scores of a tile in base 2, by queries, or by keys if transposed; and the capped ones."""
    if transposed:
        s, query, key = _dot(k, q, ((1,), (1,))), 1, 0
    else:
        s, query, key = _dot(q, k, ((1,), (1,))), 0, 1
    capped = None
    if problem.softcap is None:
        s = s * (problem.scale * LOG2E)
    else:
        capped = softcapped(s * problem.scale, problem.softcap)
        s = capped * LOG2E
    if some[0]:
        s = s + additive(optional[0][...], jnp.float32) * LOG2E
    if masked:
        place = lambda first, axis: first + jax.lax.broadcasted_iota(jnp.int32, s.shape, axis)
        rows, columns = place(row * blocks.q, query), place(column * blocks.kv, key)
        seen = problem.band.sees(rows, columns)
        if keys % blocks.kv:
            seen = seen & (columns < keys)
        if some[1]:
            seen = seen & (optional[-2][...] == optional[-1][...])
        if seen is not True:
            s = jnp.where(seen, s, -jnp.inf if transposed else HIDDEN)
    return s, capped


def _lanes(x, size):
    """Columns that are all equal, as many as `size`."""
    return (
        x[:, :size] if size <= 128 else jnp.concatenate([x] * (-(-size // 128)), axis=1)[:, :size]
    )


def _dot(x, y, contract):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _cost(given, seen, blocks, products):
    b, n, _, d = given.q.shape
    tiles = b * n * len(seen.rows) * blocks.q * blocks.kv
    moved = sum(x.size * x.dtype.itemsize for x in (*given.arrays, given.q))
    return pl.CostEstimate(
        flops=2 * products * tiles * d, transcendentals=tiles, bytes_accessed=moved
    )
