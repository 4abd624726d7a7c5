"""Attention on a Hopper GPU: Pallas kernels whose warpgroups share the work of a block.

A block of a kernel has 128 rows, 64 for each of two warpgroups that compute; a third one copies
tiles into a ring of shared memory by TMA, and gives its registers to the others. Only tiles that
the mask leaves are copied, and only those across its edges are masked element by element.

Forward: FlashAttention-2's order, with exponentials in base 2; the two warpgroups take turns, so
that one's softmax runs beside the other's products (the ping-pong of FlashAttention-3, 2407.08608).
Backward: one kernel for dq by rows, one for dk and dv by columns on transposed scores. Each sum has
one order, so that the same arrays give the same bits; an atomic sum of dq would save two of seven
products. Heads beyond 128 have dk and dv in column parts that fit the registers.
"""

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.attention import xla
from kernels_pallas.attention.problem import (
    HIDDEN,
    LOG2E,
    Problem,
    additive,
    padded,
    shape_like,
    tile_range,
)

plgpu: Any
try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:  # a jaxlib without it
    plgpu = None

_WORKERS, _ROWS = 2, 64  # warpgroups that compute, rows of each
_REGISTERS = 240, 24  # of a thread that computes, and of one that copies
_PART = 128  # columns of dk and dv that one kernel makes


class Blocks(NamedTuple):
    """Rows of the tiles that pass by, and stages of their ring, by kernel.

    Fields:
        forward, dq: keys of a tile.
        dkv: queries of a tile.
    """

    forward: tuple[int, int]
    dq: tuple[int, int]
    dkv: tuple[int, int]


#: Where `tune` keeps what it measured: by head size the largest tiles that fit 227 KiB of shared
#: memory, and registers without spills; by "size/dtype/causal or full/length" what was fastest.
TABLE = Path(__file__).with_name("hopper_blocks.json")
LARGEST = 256


def why_not(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why the kernels cannot serve these arrays on any Hopper GPU, or None."""
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"Hopper kernels serve float16 and bfloat16, q is {q.dtype}"
    if max(q.shape[3], v.shape[3]) > LARGEST:
        return f"Hopper kernels serve head sizes up to {LARGEST}, not {q.shape[3]}, {v.shape[3]}"
    if not (q.size and k.size):
        return "Hopper kernels need a query and a key"
    if q.shape[0] > 65535:
        return f"Hopper kernels serve batches up to 65535, not {q.shape[0]}"
    return None


def why_not_on(platform: str, kind: str) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if plgpu is None:
        return "it needs Mosaic GPU, which this jaxlib lacks"
    if 12080 <= _cuda_runtime() < 12091:
        return "the assembler of CUDA 12.8.0 to 12.9.0 miscompiles masked loops"
    hopper = any(name in kind for name in ("H100", "H200", "H800", "H20", "GH200"))
    if platform in ("gpu", "cuda") and hopper:
        return None
    return f"it runs on Hopper GPUs, this is {kind}"


def _cuda_runtime() -> int:
    """Such as 12091; 0 where there is none."""
    try:
        from jax._src.lib import cuda_versions

        return cuda_versions.cuda_runtime_get_version() if cuda_versions else 0
    except (ImportError, AttributeError, RuntimeError):
        return 0


@functools.cache
def _table() -> dict[str, dict[str, list[int]]]:
    return json.loads(TABLE.read_text())


def choose_blocks(problem: Problem, q: jax.Array, v: jax.Array) -> Blocks:
    """What `tune` found for the longest length up to this one, else by head size alone."""
    size = _whole(max(q.shape[3], v.shape[3]))
    mask = "full" if problem.band.right is None else "causal"
    chosen = dict(_table()[str(size)])
    at = f"{size}/{q.dtype}/{mask}/"
    lengths = [int(key.removeprefix(at)) for key in _table() if key.startswith(at)]
    if lengths:
        shorter = (length for length in lengths if length <= q.shape[1])
        chosen |= _table()[f"{at}{max(shorter, default=min(lengths))}"]
    return Blocks(**{name: (rows, stages) for name, (rows, stages) in chosen.items()})


def _whole(size: int) -> int:
    """A head size as the kernels take it: a multiple of 64, zeros beyond the given."""
    return -(-size // 64) * 64


# Kernels. `Problem` and sizes are static; a thread of Pallas is a warpgroup.


class _Ring(NamedTuple):
    """Shared memory that tiles pass through.

    Fields:
        copies: pairs of (index of a tile -> a view of global memory, the stages that it goes to).
        full, free: barriers, one a stage; every copy arrives at `full`.
    """

    copies: Sequence[tuple[Callable[[Any], Any], Any]]
    full: Any
    free: Any


def _slot(step: Any, stages: int) -> Any:
    if stages & (stages - 1) == 0:  # counts from 0, so that this is the remainder
        return step & jnp.int32(stages - 1)
    return lax.rem(step, jnp.int32(stages))


def _load(rings: Sequence[_Ring], begin: Any, end: Any, stages: int) -> None:
    """The loader's part: copy all tiles, each into a stage that is free."""
    plgpu.set_max_registers(_REGISTERS[1], action="decrease")

    def step(i, _):
        slot = _slot(i - begin, stages)
        for ring in rings:

            @pl.when(i - begin >= stages)
            def _(ring=ring):
                plgpu.barrier_wait(ring.free.at[slot])

            for source, memory in ring.copies:
                plgpu.copy_gmem_to_smem(source(i), memory.at[slot], ring.full.at[slot])

    def last(i, _):  # interpret mode wants every phase of a barrier seen
        for ring in rings:
            plgpu.barrier_wait(ring.free.at[_slot(i - begin, stages)])

    lax.fori_loop(begin, end, step, None)
    lax.fori_loop(jnp.maximum(end - stages, begin), end, last, None)


def _load_keys(problem, queries, keys, block, stages, group, arrays):
    """The loader's part of a kernel by rows: the tiles of keys and values that its rows meet.

    Args:
        arrays: of keys and of values: global memory, the stages of its ring, `full` and `free`.

    Returns:
        The block of rows of this program, and `tile_range` of it.
    """
    b, h, i = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("i")
    rows = _WORKERS * _ROWS
    if problem.band.right is not None and problem.band.left is None:
        i = -(-queries // rows) - 1 - i  # later rows see more: the longest come first
    bounds = tile_range(problem.band, i * rows, (i + 1) * rows - 1, block, keys)
    bounds = tuple(jnp.asarray(x, jnp.int32) for x in bounds)
    kv = lax.div(h, jnp.int32(group))
    tile_of = lambda ref: lambda j: ref.at[b, pl.ds(j * block, block), kv]

    @pl.when(lax.axis_index("worker") == _WORKERS)
    def _():
        rings = [_Ring([(tile_of(ref), ring)], full, free) for ref, ring, full, free in arrays]
        _load(rings, bounds[0], bounds[3], stages)

    return i, bounds


def _loops(band, size, block, bounds, segments, step, carry):
    """Run `step(masked, i, carry)` over tiles, as they are copied: the band's edges masked."""
    begin, full, edge, end = (jnp.asarray(x, jnp.int32) for x in bounds)
    if segments:
        parts = [(begin, end, True)]
    else:
        parts = [(begin, full, True)] if band.left is not None else []
        parts += [(full, edge, False)]
        parts += [(edge, end, True)] if band.right is not None or size % block else []
    for start, stop, masked in parts:
        carry = lax.fori_loop(start, stop, functools.partial(step, masked), carry)
    return carry


def _scores(machine, problem, s, keys, row, column, transposed, masked, bias, same):
    """Raw products of a tile -> scores, a factor that makes them of base 2, and tanh of a softcap.

    Args:
        s: in the layout of the tensor cores, by queries, or by keys if transposed.
        keys: their number without padding.
        row, column: the tile's first query and key.
        bias: a tile of it, or None.
        same: whether queries and keys are of one segment, or None.
    """
    factor, tanh = 1.0, None
    if problem.softcap is not None:
        tanh = _tanh(s * (problem.scale / problem.softcap))
        s = tanh * (problem.softcap * LOG2E)
    elif bias is None and problem.scale > 0:
        factor = problem.scale * LOG2E  # one operation with the subtraction that follows
    else:
        s = s * (problem.scale * LOG2E)
    if bias is not None:
        s = s + additive(bias, jnp.float32) * LOG2E
    if masked:
        # Distances within the tile first: their places are known to each thread.
        rows, columns = (
            machine.places(s.shape, axis) for axis in ((1, 0) if transposed else (0, 1))
        )
        seen = problem.band._replace(offset=0).sees(
            rows, columns - (row - column + problem.band.offset)
        )
        if keys % (_WORKERS * _ROWS):
            seen = seen & (columns < keys - column)
        if same is not None:
            seen = seen & same
        if seen is not True:
            s = jnp.where(seen, s, HIDDEN / factor)
    return s, factor, tanh


def _tanh(x):
    """To float32; the instruction for it errs by 2^-11."""
    return 1 - 2 / (1 + jnp.exp2(2 * LOG2E * x))


class _Extra(NamedTuple):
    """References to the optional arrays, rows being queries, or keys on transposed scores.

    Fields:
        bias: [B?, N?, rows?, columns?], each 1 where it broadcasts, or None.
        row_ids, column_ids: segments [B, rows] and [B, columns], or None.
    """

    bias: Any = None
    row_ids: Any = None
    column_ids: Any = None

    def of_tile(self, machine, b, h, row, column, shape):
        """The bias of a tile, and whether rows and columns are of one segment."""
        rows, columns = pl.ds(row, shape[0]), pl.ds(column, shape[1])
        read = functools.partial(machine.read, checked=False)
        spread = lambda x, axis: lax.broadcast_in_dim(x, shape, [axis])
        bias = same = None
        if self.bias is not None:
            at = lambda axis, x: 0 if self.bias.shape[axis] == 1 else x
            ref = self.bias.at[at(0, b), at(1, h)]
            if ref.shape[0] == 1:
                bias = spread(read(ref.at[0], (columns,), along=1), 1)
            elif ref.shape[1] == 1:
                bias = spread(read(ref.at[:, 0], (rows,), along=0), 0)
            else:
                bias = read(ref, (rows, columns), along=None)
        if self.row_ids is not None:
            row_ids = read(self.row_ids.at[b], (rows,), along=0)
            column_ids = read(self.column_ids.at[b], (columns,), along=1)
            same = spread(row_ids, 0) == spread(column_ids, 1)
        return bias, same


class _Hopper:
    """Products and layouts of a GPU's tensor cores."""

    def zeros(self, shape, fill=0.0):
        """A matrix of a warpgroup, or a column of numbers, one a row of a matrix."""
        layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
        return plgpu.layout_cast(jnp.full(shape, fill, jnp.float32), layout)

    def places(self, shape, axis):
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def read(self, ref, index, along, checked=True):
        """A vector for each row (along=0) or column (1) of a matrix, or a matrix (None)."""
        layout = plgpu.Layout.WGMMA if along is None else plgpu.Layout.WGMMA.reduce(1 - along)
        view = ref.at[index] if index else ref
        # It takes no index from jax 0.11 on.
        none = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
        return plgpu.load(view, *none, layout=layout, optimized=checked)

    def product(self, a, b, *, start=None, turned=False, meanwhile=lambda: None):
        """start + a b, or a b^T; `meanwhile` is done while it is computed.

        Args:
            a: shared memory, or a matrix in registers.
            b: shared memory.
            start: a matrix, or the shape of zeros.
        """

        def compute(acc):
            plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)) if turned else b)
            meanwhile()
            return acc[...] if isinstance(start, tuple) else None

        if isinstance(start, tuple):
            return pl.run_scoped(compute, plgpu.ACC(start, jnp.float32))
        return pl.run_state(compute)(plgpu.ACC.init(start))


class _Simulated:
    """The same for interpret mode, which knows no tensor cores."""

    def zeros(self, shape, fill=0.0):
        return jnp.full(shape, fill, jnp.float32)

    def places(self, shape, axis):
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def read(self, ref, index, along, checked=True):
        return ref[index] if index else ref[...]

    def product(self, a, b, *, start=None, turned=False, meanwhile=lambda: None):
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
        result = jnp.dot(a, b.T if turned else b, preferred_element_type=jnp.float32)
        meanwhile()
        return result if isinstance(start, tuple) else start + result


def _forward_kernel(machine, problem, keys, block, stages, group, q, k, v, extra, *refs):
    out, lse, qs, ks, vs, os, ls, q_full, k_full, v_full, k_free, v_free, turn = refs
    os = qs if os is None else os
    b, h, worker = (lax.axis_index(n) for n in ("b", "h", "worker"))
    rings = (k, ks, k_full, k_free), (v, vs, v_full, v_free)
    i, bounds = _load_keys(problem, q.shape[1], keys, block, stages, group, rings)
    begin, end = bounds[0], bounds[3]

    @pl.when(worker < _WORKERS)
    def _():
        plgpu.set_max_registers(_REGISTERS[0], action="increase")
        row = (i * _WORKERS + worker) * _ROWS
        mine, size = qs.at[worker], vs.shape[-1]
        plgpu.copy_gmem_to_smem(q.at[b, pl.ds(row, _ROWS), h], mine, q_full.at[worker])
        plgpu.barrier_wait(q_full.at[worker])

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(end > begin)
        def _():
            plgpu.barrier_wait(k_full.at[0])

        pl.when(worker == 1)(take_turns)

        def step(masked, j, carry):
            acc, m, total = carry
            slot = _slot(j - begin, stages)

            shape = (_ROWS, block)
            more = extra.of_tile(machine, b, h, row, j * block, shape)
            s = machine.product(mine, ks.at[slot], start=shape, turned=True, meanwhile=take_turns)
            plgpu.barrier_arrive(k_free.at[slot])
            s, factor, _ = _scores(machine, problem, s, keys, row, j * block, False, masked, *more)
            new = jnp.maximum(m, s.max(axis=1) * factor)
            old = jnp.exp2(m - new)
            p = jnp.exp2(s * factor - lax.broadcast_in_dim(new, shape, [0]))
            acc = acc * lax.broadcast_in_dim(old, acc.shape, [0])
            narrow = p.astype(v.dtype)
            if size <= _PART:  # before the other's turn where registers allow
                total = total * old + p.sum(axis=1)
                acc, total, new, narrow = lax.optimization_barrier((acc, total, new, narrow))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_full.at[slot])
            plgpu.barrier_wait(turn)
            if size > _PART:
                total = total * old + p.sum(axis=1)

            def next_keys():
                @pl.when(j + 1 < end)
                def _():
                    plgpu.barrier_wait(k_full.at[_slot(j + 1 - begin, stages)])

            acc = machine.product(narrow, vs.at[slot], start=acc, meanwhile=next_keys)
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, new, total

        zeros = machine.zeros
        carry = zeros((_ROWS, size)), zeros((_ROWS,), HIDDEN), zeros((_ROWS,))
        acc, m, total = _loops(
            problem.band, keys, block, bounds, extra.row_ids is not None, step, carry
        )
        pl.when(worker == 0)(take_turns)
        there = ~(m <= HIDDEN / 2)  # not a number stays that
        total = jnp.where(there, total, 1.0)
        inverse = jnp.where(there, 1 / total, 0.0)
        result = os.at[worker]
        result[...] = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(out.dtype)
        ls[worker] = jnp.where(there, m / LOG2E + jnp.log(total), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, out.at[b, pl.ds(row, _ROWS), h])
        plgpu.copy_smem_to_gmem(ls.at[worker], lse.at[b, h, pl.ds(row, _ROWS)])
        plgpu.wait_smem_to_gmem(0)


def _dq_kernel(machine, problem, keys, block, stages, group, q, k, v, do, lse, delta, extra, *refs):
    dq, qs, dos, ls, ds_, ks, vs, own, k_full, v_full, k_free, v_free = refs
    b, h, worker = (lax.axis_index(n) for n in ("b", "h", "worker"))
    rings = (k, ks, k_full, k_free), (v, vs, v_full, v_free)
    i, bounds = _load_keys(problem, q.shape[1], keys, block, stages, group, rings)
    begin = bounds[0]

    @pl.when(worker < _WORKERS)
    def _():
        plgpu.set_max_registers(_REGISTERS[0], action="increase")
        row = (i * _WORKERS + worker) * _ROWS
        place = pl.ds(row, _ROWS)
        copies = (
            (q.at[b, place, h], qs), (do.at[b, place, h], dos),
            (lse.at[b, h, place], ls), (delta.at[b, h, place], ds_),
        )  # fmt: skip
        for source, there in copies:
            plgpu.copy_gmem_to_smem(source, there.at[worker], own.at[worker])
        plgpu.barrier_wait(own.at[worker])
        lse_, delta_ = (machine.read(x.at[worker], (), along=0) for x in (ls, ds_))

        def step(masked, j, acc):
            slot, shape = _slot(j - begin, stages), (_ROWS, block)
            plgpu.barrier_wait(k_full.at[slot])
            more = extra.of_tile(machine, b, h, row, j * block, shape)
            s = machine.product(qs.at[worker], ks.at[slot], start=shape, turned=True)
            s, factor, tanh = _scores(
                machine, problem, s, keys, row, j * block, False, masked, *more
            )
            p = jnp.exp2(s * factor - lax.broadcast_in_dim(lse_, shape, [0]))
            plgpu.barrier_wait(v_full.at[slot])
            start = lax.broadcast_in_dim(-delta_, shape, [0])
            dp = machine.product(dos.at[worker], vs.at[slot], start=start, turned=True)
            plgpu.barrier_arrive(v_free.at[slot])
            ds = p * dp
            if tanh is not None:
                ds = ds * (1 - tanh * tanh)
            acc = machine.product(ds.astype(q.dtype), ks.at[slot], start=acc)
            plgpu.barrier_arrive(k_free.at[slot])
            return acc

        acc = _loops(
            problem.band, keys, block, bounds, extra.row_ids is not None, step,
            machine.zeros((_ROWS, qs.shape[-1])),
        )  # fmt: skip
        mine = qs.at[worker]
        mine[...] = (acc * problem.scale).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, dq.at[b, place, h])
        plgpu.wait_smem_to_gmem(0)


def _dkv_kernel(
    machine,
    problem,
    keys,
    queries,
    block,
    stages,
    group,
    parts,
    q,
    k,
    v,
    do,
    lse,
    delta,
    extra,
    *refs,
):
    dk, dv, ks, vs, staged, qs, dos, ls, ds_, own, full, free = refs
    b, h, j, worker = (lax.axis_index(n) for n in ("b", "h", "i", "worker"))
    rows, band = _WORKERS * _ROWS, problem.band.transposed
    bounds = tile_range(band, j * rows, (j + 1) * rows - 1, block, queries)
    begin, end = (jnp.asarray(bounds[n], jnp.int32) for n in (0, 3))
    kv = lax.div(h, jnp.int32(group))
    of_k, of_v = parts

    @pl.when(worker == _WORKERS)
    def _():
        place = lambda i: pl.ds(i * block, block)
        of_rows = lambda ref: lambda i: ref.at[b, place(i), h]
        of_sums = lambda ref: lambda i: ref.at[b, h, place(i)]
        copies = (of_rows(q), qs), (of_rows(do), dos), (of_sums(lse), ls), (of_sums(delta), ds_)
        _load([_Ring(copies, full, free)], begin, end, stages)

    @pl.when(worker < _WORKERS)
    def _():
        plgpu.set_max_registers(_REGISTERS[0], action="increase")
        column = j * rows + worker * _ROWS
        place = pl.ds(column, _ROWS)
        for source, there in ((k, ks), (v, vs)):
            plgpu.copy_gmem_to_smem(source.at[b, place, kv], there.at[worker], own.at[worker])
        plgpu.barrier_wait(own.at[worker])

        def step(masked, i, carry):
            dk_acc, dv_acc = carry
            slot, shape = _slot(i - begin, stages), (_ROWS, block)
            plgpu.barrier_wait(full.at[slot])
            more = extra.of_tile(machine, b, h, column, i * block, shape)
            s = machine.product(ks.at[worker], qs.at[slot], start=shape, turned=True)
            s, factor, tanh = _scores(
                machine, problem, s, keys, i * block, column, True, masked, *more
            )
            lse_ = machine.read(ls.at[slot], (), along=1)
            p = jnp.exp2(s * factor - lax.broadcast_in_dim(lse_, shape, [1]))
            values = _columns(dos.at[slot], of_v)
            dv_acc = machine.product(p.astype(q.dtype), values, start=dv_acc)
            start = lax.broadcast_in_dim(-machine.read(ds_.at[slot], (), along=1), shape, [1])
            dp = machine.product(vs.at[worker], dos.at[slot], start=start, turned=True)
            ds = p * dp
            if tanh is not None:
                ds = ds * (1 - tanh * tanh)
            dk_acc = machine.product(ds.astype(q.dtype), _columns(qs.at[slot], of_k), start=dk_acc)
            plgpu.barrier_arrive(free.at[slot])
            return dk_acc, dv_acc

        width = lambda part: part[1] - part[0]
        carry = machine.zeros((_ROWS, width(of_k))), machine.zeros((_ROWS, width(of_v)))
        # Rows of padding have weights 0; keys of padding are in masked tiles, or cut off after.
        dk_acc, dv_acc = _loops(
            band, queries, block, bounds, extra.row_ids is not None, step, carry
        )
        for result, there, out in (
            (dk_acc * problem.scale, ks if staged is None else staged, dk),
            (dv_acc, vs if staged is None else staged, dv),
        ):
            there.at[worker][...] = result.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(there.at[worker], out.at[b, place, h])
            if staged is not None:  # both results go through it
                plgpu.wait_smem_to_gmem(0)
        plgpu.wait_smem_to_gmem(0)


def _columns(ref, part):
    return (
        ref if ref.shape[-1] == part[1] - part[0] else ref.at[:, pl.ds(part[0], part[1] - part[0])]
    )


# Calls


def _memory(dtype: Any, block: int, stages: int) -> tuple[Callable[[int], Any], ...]:
    """Shared memory of a kernel as tensor cores read it: width -> workers' own rows, and a ring.

    A product over the rows of a tile takes as many at a time as a swizzle is long.
    """
    swizzle = min(block, 64)
    transforms = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(2 * swizzle))
    tiled = functools.partial(plgpu.SMEM, dtype=dtype, transforms=transforms)
    return lambda width: tiled((_WORKERS, _ROWS, width)), lambda width: tiled(
        (stages, block, width)
    )


def _call(kernel, name, grid, outputs, scratch, arguments, interpret):
    out_type = [shape_like(shape, dtype, arguments[0]) for shape, dtype in outputs]
    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("h", "b", "i"),  # the last one changes first: blocks that share keys and values
        num_threads=_WORKERS + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,  # rows are reduced within a warp
        ),
        interpret=interpret,
    )(*arguments)


class _Given:
    """Arrays padded to whole blocks and head sizes, and those of the optional ones there are."""

    def __init__(self, q, k, v, bias, q_ids, kv_ids, tile_q, tile_kv, size=64):
        self.q = padded(padded(q, 3, size), 1, tile_q)
        self.k, self.v = (padded(padded(x, 3, size), 1, tile_kv) for x in (k, v))
        self.group = q.shape[2] // k.shape[2]
        if bias is not None:
            bias = bias.astype(jnp.float32)
            single = bias.shape[2:] == (1, 1)
            if single:  # what broadcasts tells a row of it from a column
                bias = jnp.broadcast_to(bias, (*bias.shape[:3], k.shape[1]))
            for axis, tile in ((2, tile_q), (3, tile_kv)):
                there = bias.shape[axis] > 1 or (single and axis == 3)
                bias = padded(bias, axis, tile) if there else bias
        if q_ids is not None:
            q_ids = padded(q_ids.astype(jnp.int32), 1, tile_q)
            kv_ids = padded(kv_ids.astype(jnp.int32), 1, tile_kv)
        self.optional = (bias, q_ids, kv_ids)

    def extra(self, transposed=False):
        """The optional arrays that there are, by queries or by keys."""
        bias, q_ids, kv_ids = self.optional
        if transposed:
            bias = None if bias is None else bias.swapaxes(2, 3)
            q_ids, kv_ids = kv_ids, q_ids
        return [x for x in (bias, q_ids, kv_ids) if x is not None]

    def bind(self, kernel, required):
        """The kernel as a function of references, with an `_Extra` of what there is."""

        def bound(*refs):
            given = list(refs[required:])
            extra = _Extra(*(None if x is None else given.pop(0) for x in self.optional))
            return kernel(*refs[:required], extra, *given)

        return bound


def forward(
    problem, q, k, v, bias=None, q_ids=None, kv_ids=None, *, blocks=None, interpret: Any = None
):
    """As `reference.forward`, by a kernel; `interpret` is that of `plgpu.kernel`."""
    machine = _Simulated() if interpret else _Hopper()
    block, stages = (blocks or choose_blocks(problem, q, v)).forward
    rows = _WORKERS * _ROWS
    given = _Given(q, k, v, bias, q_ids, kv_ids, rows, block)
    (b, t, n, d), (_, s, _, e) = given.q.shape, given.v.shape
    stages = min(stages, s // block)
    each, ring = _memory(q.dtype, block, stages)
    barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
    kernel = functools.partial(
        _forward_kernel, machine, problem, k.shape[1], block, stages, given.group
    )
    scratch = [
        each(d), ring(d), ring(e), None if d == e else each(e),
        plgpu.SMEM((_WORKERS, _ROWS), jnp.float32),
        plgpu.Barrier(num_barriers=_WORKERS), barrier(), barrier(),
        barrier(num_arrivals=_WORKERS), barrier(num_arrivals=_WORKERS),
        plgpu.Barrier(num_arrivals=_WORKERS),
    ]  # fmt: skip
    out, lse = _call(
        given.bind(kernel, 3),
        "flash_attention_forward",
        (n, b, t // rows),
        [((b, t, n, e), q.dtype), ((b, n, t), jnp.float32)],
        scratch,
        [given.q, given.k, given.v, *given.extra()],
        interpret,
    )
    return out[:, : q.shape[1], :, : v.shape[3]], lse[:, :, : q.shape[1]]


def backward(
    problem, q, k, v, bias, q_ids, kv_ids, out, lse, dout, dlse, *,
    bias_gradient, blocks=None, interpret: Any = None,
):  # fmt: skip
    """Gradients of q, k, v and the bias; arguments as for `xla.backward`, which makes the bias'."""
    if bias_gradient:
        return xla.backward(
            problem, q, k, v, bias, q_ids, kv_ids, out, lse, dout, dlse, bias_gradient=True
        )
    machine = _Simulated() if interpret else _Hopper()
    blocks = blocks or choose_blocks(problem, q, v)
    rows = _WORKERS * _ROWS
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    delta = padded(delta - dlse, 2, rows)
    # Queries that see nothing, and those of padding, get weights exp(-inf) = 0.
    lse = padded(jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E), 2, rows, jnp.inf)
    # Tiles of either kernel divide the blocks of the other. Parts of dk and dv are of one width.
    largest = _whole(max(q.shape[3], v.shape[3]))
    whole = largest <= _PART
    size = 64 if whole else largest
    given = _Given(q, k, v, bias, q_ids, kv_ids, rows, rows, size)
    do = padded(padded(dout, 3, size), 1, rows)
    arguments = [given.q, given.k, given.v, do, lse, delta]
    (b, t, n, d), (_, s, heads, e) = given.q.shape, given.v.shape
    sums = lambda *shape: plgpu.SMEM(shape, jnp.float32)

    block, stages = blocks.dq
    barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
    each, ring = _memory(q.dtype, block, stages)
    kernel = functools.partial(_dq_kernel, machine, problem, k.shape[1], block, stages, given.group)
    scratch = [
        each(d), each(e), sums(_WORKERS, _ROWS), sums(_WORKERS, _ROWS), ring(d), ring(e),
        plgpu.Barrier(num_barriers=_WORKERS, num_arrivals=4), barrier(), barrier(),
        barrier(num_arrivals=_WORKERS), barrier(num_arrivals=_WORKERS),
    ]  # fmt: skip
    (dq,) = _call(
        given.bind(kernel, 6), "flash_attention_dq", (n, b, t // rows),
        [((b, t, n, d), q.dtype)], scratch, [*arguments, *given.extra()], interpret,
    )  # fmt: skip

    block, stages = blocks.dkv
    barrier = functools.partial(plgpu.Barrier, num_barriers=stages)
    each, ring = _memory(q.dtype, block, stages)
    dks, dvs = [], []
    for start in range(0, max(d, e), _PART):
        of_k, of_v = ((start, min(start + _PART, x)) for x in (d, e))
        kernel = functools.partial(
            _dkv_kernel,
            machine,
            problem,
            k.shape[1],
            q.shape[1],
            block,
            stages,
            given.group,
            (of_k, of_v),
        )
        width = lambda part: part[1] - part[0]
        scratch = [
            each(d), each(e), None if whole else each(width(of_k)), ring(d), ring(e),
            sums(stages, block), sums(stages, block),
            plgpu.Barrier(num_barriers=_WORKERS, num_arrivals=2), barrier(num_arrivals=4),
            barrier(num_arrivals=_WORKERS),
        ]  # fmt: skip
        dk, dv = _call(
            given.bind(kernel, 6), "flash_attention_dkv", (n, b, s // rows),
            [((b, s, n, width(of_k)), q.dtype), ((b, s, n, width(of_v)), q.dtype)],
            scratch, [*arguments, *given.extra(transposed=True)], interpret,
        )  # fmt: skip
        dks.append(dk)
        dvs.append(dv)

    def of_heads(parts, like):
        x = jnp.concatenate(parts, axis=3)[:, : like.shape[1], :, : like.shape[3]]
        x = x.reshape(*x.shape[:2], heads, given.group, -1).astype(jnp.float32)
        return jnp.sum(x, axis=3).astype(like.dtype)

    return dq[:, : q.shape[1], :, : q.shape[3]], of_heads(dks, k), of_heads(dvs, v), None
