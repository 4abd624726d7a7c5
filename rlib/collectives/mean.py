"""Means over workers that send compressed messages."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from rlib.collectives.axes import all_gather, require_axis, vary, varying_axes
from rlib.compression import (
    Codec,
    count_true,
    decode_tree,
    encode_tree,
    pack_bits,
    packed_shape,
    unpack_bits,
)

Tree = Any
_LANES = 128


def gathered_mean(
    codec: Codec,
    key: Key[Array, ""] | None,
    tree: Tree,
    axis_name: str | None,
    *,
    scope: Literal["leaf", "global"] = "leaf",
) -> tuple[Tree, Tree]:
    """Mean of C(x^i), where every worker sends its payload to all others.

    Args:
        codec: C.
        key: the worker's own randomness, or None.
        tree: the worker's x^i.
        axis_name: axis of the workers; None for one worker, which sends nothing.
        scope: C of each tensor, or of all as one vector. Under tensor sharding a device codes its
            own shards, and "global" makes one vector of those that are split over the same axes.

    Returns:
        The mean, the same on all workers, and C(x^i) of this worker.

    Raises:
        ValueError: the axis is not bound here.

    >>> from rlib.compression import TopK
    >>> mean = lambda x: gathered_mean(TopK(k=1), None, x, "workers")[0]
    >>> jax.vmap(mean, axis_name="workers")(jnp.array([[4.0, 1.0], [1.0, 2.0]]))[0]
    Array([2., 1.], dtype=float32)
    """
    require_axis(axis_name, "gathered_mean")
    structure: Any = jax.tree.structure(tree)
    leaves = jax.tree.leaves(tree)
    means, owns = list(leaves), list(leaves)
    for members in _groups(leaves, axis_name):
        part = [leaves[i] for i in members]
        mean, own = _gathered(codec, key, part, axis_name, scope)
        for place, i in enumerate(members):
            means[i], owns[i] = mean[place], own[place]
    return structure.unflatten(means), structure.unflatten(owns)


def _gathered(codec: Codec, key, part: list[Array], axis_name: str | None, scope):
    payloads = encode_tree(codec, key, part, scope=scope)
    decode = lambda payloads: decode_tree(codec, payloads, part, scope=scope)
    own = decode(payloads)
    if axis_name is None:
        return own, own
    gathered = jax.tree.map(lambda x: all_gather(x, axis_name), payloads)

    def add(total: list[Array], payloads: Tree) -> tuple[list[Array], None]:
        return [
            t + x.astype(jnp.float32) for t, x in zip(total, decode(payloads), strict=True)
        ], None

    first = decode(jax.tree.map(lambda x: x[0], gathered))
    start = [x.astype(jnp.float32) for x in first]
    total, _ = lax.scan(add, start, jax.tree.map(lambda x: x[1:], gathered))
    n = lax.axis_size(axis_name)
    return [(t / n).astype(x.dtype) for t, x in zip(total, part, strict=True)], own


def _groups(leaves: list[Array], axis_name: str | None) -> list[list[int]]:
    """Positions of the tensors that are split over the same other mesh axes.

    One message for a split tensor and one that has a copy on every shard would let the copies
    drift apart; types would refuse it.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault(varying_axes(leaf) - {axis_name}, []).append(index)
    return list(groups.values())


def rounded_mean(tree: Tree, axis_name: str, dtype: Any) -> Tree:
    """Mean over workers of messages rounded to a dtype of two bytes, summed in float32.

    What a reduction in that dtype would send, without its rounding of partial sums, and on every
    back end: a CPU would sum bfloat16 as float32.

    Args:
        tree: the worker's arrays.
        axis_name: axis of the workers.
        dtype: bfloat16 or float16.

    Raises:
        ValueError: a dtype of another width, or the axis is not bound here.

    >>> mean = lambda x: rounded_mean(x, "workers", jnp.bfloat16)
    >>> jax.vmap(mean, axis_name="workers")(jnp.array([[1.0], [4.0]]))[0]
    Array([2.5], dtype=float32)
    """
    require_axis(axis_name, "rounded_mean")
    if jnp.dtype(dtype).itemsize != 2:
        raise ValueError(f"rounded_mean: {jnp.dtype(dtype)} has not two bytes")

    def mean(x: Array) -> Array:
        n = lax.axis_size(axis_name)
        length = chunk_length(x.size, n)
        rows = jnp.pad(x.reshape(-1), (0, n * length - x.size)).reshape(n, length)
        bits = lax.bitcast_convert_type(rows.astype(dtype), jnp.uint16)
        bits = lax.all_to_all(vary(bits, axis_name), axis_name, 0, 0, tiled=True)
        total = jnp.mean(lax.bitcast_convert_type(bits, dtype).astype(jnp.float32), axis=0)
        bits = all_gather(lax.bitcast_convert_type(total.astype(dtype), jnp.uint16), axis_name)
        whole = lax.bitcast_convert_type(bits, dtype).reshape(-1)[: x.size]
        return whole.reshape(x.shape).astype(x.dtype)

    return jax.tree.map(mean, tree)


class ChunkedMean(NamedTuple):
    """Result of `compressed_mean`.

    Fields:
        mean: the compressed mean, the same on all workers.
        worker_error: what this worker's message left out; like the input.
        server_error: what this worker, as the server of its chunk, left out; f32[ceil(d / n)], or
            None for one worker.
    """

    mean: Tree
    worker_error: Tree
    server_error: Tree


def chunk_length(size: int, workers: int) -> int:
    """L: worker j serves coordinates [j L, (j + 1) L) of a tensor, cut at its end.

    >>> chunk_length(10, 4)  # of 3, 3, 3 and 1 coordinates
    3
    """
    return -(-size // workers)


def compressed_mean(
    tree: Tree,
    worker_error: Tree,
    server_error: Tree,
    axis_name: str | None,
    *,
    mask: Tree | None = None,
    counts: Tree | None = None,
    scale: Literal["l2", "l1"] = "l2",
) -> ChunkedMean:
    """Mean over workers in one bit a coordinate, both ways, with error feedback on both sides.

    Phase one: every worker sends the signs of u = x + worker_error, cut into n chunks, chunk j to
    worker j, and one scale a tensor. Phase two: worker j averages what it got, adds its
    server_error, and sends signs and one scale of its chunk to all. A worker sends d / 8 bytes,
    then d / (8 n); all tensors travel in one all-to-all and one all-gather (of each kind: tensors
    that are split over other mesh axes travel apart from those that are not, so that copies of the
    latter stay equal).

    Args:
        tree: float32 arrays.
        worker_error: like `tree`.
        server_error: f32[chunk_length(size, n)] for each; None for one worker.
        axis_name: axis of the workers; None for one worker, which sends nothing.
        mask: booleans like `tree`, the same on all workers. Where False, `tree` and `worker_error`
            are not read, nothing counts, and what comes back means nothing: to clear it would take
            another pass over the mask.
        counts: how many coordinates each mask keeps, at least 1, where that is known already.
        scale: magnitude of the signs, "l2": ||u||_2 / sqrt(d), or "l1": mean abs(u).

    Raises:
        ValueError: another scale, an axis without server_error, counts without a mask, or the axis
            is not bound here.

    >>> one = lambda x: compressed_mean(x, jnp.zeros(2), jnp.zeros(1), "workers").mean
    >>> jax.vmap(one, axis_name="workers")(jnp.array([[3.0, -3.0], [5.0, -5.0]]))[0]
    Array([ 4., -4.], dtype=float32)
    """
    require_axis(axis_name, "compressed_mean")
    if scale not in ("l2", "l1"):
        raise ValueError(f'compressed_mean: scale={scale!r}: choose "l2" or "l1"')
    if axis_name is not None and server_error is None:
        raise ValueError("compressed_mean: server_error=None is for one worker without axis_name")
    if counts is not None and mask is None:
        raise ValueError("compressed_mean: counts without a mask, of which they are")
    structure: Any = jax.tree.structure(tree)
    leaves = jax.tree.leaves(tree)
    errors, servers, masks, known = (
        [None] * len(leaves) if each is None else structure.flatten_up_to(each)
        for each in (worker_error, server_error, mask, counts)
    )
    done: list[ChunkedMean | None] = [None] * len(leaves)
    for members in _groups(leaves, axis_name):
        parts = [
            _Tensor(leaves[i], errors[i], servers[i], masks[i], known[i], scale) for i in members
        ]
        exchanged = _exchange(parts, axis_name)
        for i, result in zip(members, exchanged, strict=True):
            done[i] = result
    results = [result for result in done if result is not None]
    mean, left, served = zip(*results, strict=True) if results else ((), (), ())
    return ChunkedMean(
        structure.unflatten(mean),
        structure.unflatten(left),
        None if server_error is None else structure.unflatten(served),
    )


def _magnitude(u: Array, scale: str, count: Array | float) -> Array:
    return jnp.sqrt(jnp.sum(u * u) / count) if scale == "l2" else jnp.sum(jnp.abs(u)) / count


def _count(mask: Bool[Array, "..."]) -> Float[Array, ""]:
    return jnp.maximum(count_true(mask), 1).astype(jnp.float32)


def _kept(x: Array, mask: Array | None) -> Array:
    return x if mask is None else jnp.where(mask, x, 0)


class _Tensor:
    """One tensor's side of the exchange."""

    def __init__(self, x, error, server_error, mask: Array | None, count, scale: str):
        self.shape, self.size, self.scale_rule = x.shape, x.size, scale
        self.server_error, self.mask = server_error, mask
        u = _kept(x + error, mask)
        if count is None:
            count = x.size if mask is None else _count(mask)
        self.scale = _magnitude(u, scale, count)
        self.positive = u >= 0
        self.worker_error = u - jnp.where(self.positive, self.scale, -self.scale)

    def chunks(self, x: Array, workers: int) -> Array:
        length = chunk_length(self.size, workers)
        return jnp.pad(x.reshape(-1), (0, workers * length - self.size)).reshape(workers, length)

    def serve(self, signs: Bool[Array, "n l"], scales: Float[Array, " n"], rank: Array) -> Array:
        """Average this worker's chunk; keeps the new server error, returns signs and scale."""
        workers, length = signs.shape
        mean = jnp.mean(jnp.where(signs, scales[:, None], -scales[:, None]), axis=0)
        c = mean + self.server_error
        inside = rank * length + jnp.arange(length) < self.size
        if self.mask is not None:
            inside &= self.chunks(self.mask, workers)[rank]
        self.served_scale = _magnitude(_kept(c, inside), self.scale_rule, _count(inside))
        positive = c >= 0
        served = jnp.where(positive, self.served_scale, -self.served_scale)
        self.server_error = jnp.where(inside, c - served, 0)
        return positive

    def result(self, signs: Bool[Array, "n l"], scales: Float[Array, " n"]) -> ChunkedMean:
        mean = jnp.where(signs, scales[:, None], -scales[:, None]).reshape(-1)[: self.size]
        return ChunkedMean(mean.reshape(self.shape), self.worker_error, self.server_error)


def _exchange(tensors: list[_Tensor], axis_name: str | None) -> list[ChunkedMean]:
    if axis_name is None:  # C(C(u)) = C(u): the server changes nothing and keeps no error
        unpacked = [unpack_bits(pack_bits(t.positive), t.size) for t in tensors]
        return [
            t.result(bits[None], t.scale[None]) for t, bits in zip(tensors, unpacked, strict=True)
        ]
    workers = lax.axis_size(axis_name)
    lengths = [chunk_length(t.size, workers) for t in tensors]
    signs = _pack([t.chunks(t.positive, workers) for t in tensors])
    scales = jnp.stack([t.scale for t in tensors])
    rank = lax.axis_index(axis_name)
    signs = lax.all_to_all(vary(signs, axis_name), axis_name, 0, 0, tiled=True)
    scales = all_gather(scales, axis_name)
    served = [
        t.serve(bits, scales[:, i], rank)
        for i, (t, bits) in enumerate(zip(tensors, _unpack(signs, lengths), strict=True))
    ]
    signs = all_gather(_pack([bits[None] for bits in served])[0], axis_name)
    scales = all_gather(jnp.stack([t.served_scale for t in tensors]), axis_name)
    unpacked = _unpack(signs, lengths)
    return [
        t.result(bits, scales[:, i])
        for i, (t, bits) in enumerate(zip(tensors, unpacked, strict=True))
    ]


def _pack(rows: list[Bool[Array, "n l"]]) -> Array:
    """Bits of each row, each tensor's in bytes of its own, as uint8[n, rows, 128]."""
    packed = [jax.vmap(pack_bits)(bits).reshape(bits.shape[0], -1) for bits in rows]
    flat = jnp.concatenate(packed, axis=1)
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % _LANES)))
    return flat.reshape(flat.shape[0], -1, _LANES)


def _unpack(packed: Array, lengths: list[int]) -> list[Bool[Array, "n l"]]:
    flat = packed.reshape(packed.shape[0], -1)
    shapes = [packed_shape(n) for n in lengths]
    ends = [0]
    for shape in shapes:
        ends.append(ends[-1] + math.prod(shape))
    return [
        jax.vmap(lambda b, n=n, shape=shape: unpack_bits(b.reshape(shape), n))(flat[:, a:b])
        for n, shape, a, b in zip(lengths, shapes, ends[:-1], ends[1:], strict=True)
    ]
