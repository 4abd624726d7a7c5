"""What an attention is asked to compute, and which tiles of its scores a mask leaves.

Query i sees key j if `offset - left <= j - i <= offset + right`: causal masks and sliding windows
are such bands. Tiles outside the band are never visited, and only tiles across one of its edges
are masked element by element. The same arithmetic serves Python integers, NumPy and traced values.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Band(NamedTuple):
    """Which keys a query sees.

    Fields:
        left, right: how far before and after its own place, None for any distance.
        offset: the key at the place of query 0.
    """

    left: int | None = None
    right: int | None = None
    offset: int = 0

    @property
    def transposed(self) -> "Band":
        """The queries that a key is seen by, as a band of keys."""
        return Band(self.right, self.left, -self.offset)

    def sees(self, rows: Any, columns: Any) -> Any:
        """Whether queries see keys; arrays of positions that broadcast. True if all do."""
        seen: Any = True
        distance = columns - rows - self.offset
        if self.left is not None:
            seen = distance >= -self.left
        if self.right is not None:
            seen = (distance <= self.right) & seen
        return seen


def tile_range(band: Band, first: Any, last: Any, block: int, size: int, xp: Any = jnp) -> Any:
    """Tiles of `block` keys, of `size` keys in all, that queries `first` to `last` meet.

    Returns:
        (begin, full, edge, end): tiles begin .. end - 1 hold a key that some of the queries see;
        of full .. edge - 1 every query sees every key; full = edge if there is none.
    """
    tiles, whole = -(-size // block), size // block
    begin, full, edge, end = 0, 0, whole, tiles
    if band.left is not None:
        start = first + band.offset - band.left
        begin = xp.where(start < size, xp.clip(start // block, 0, tiles), tiles)
        full = xp.clip(-(-(last + band.offset - band.left) // block), begin, tiles)
    if band.right is not None:
        end = xp.clip((last + band.offset + band.right) // block + 1, begin, tiles)
        edge = xp.minimum((first + band.offset + band.right + 1) // block, whole)
    if band.left is not None or band.right is not None:
        full = xp.minimum(full, end)
        edge = xp.clip(edge, full, end)
    return begin, full, edge, end


LOG2E = math.log2(math.e)
#: Score of a key that is not seen, in kernels: its weight vanishes beside that of any seen one, and
#: where there is none, differences of scores stay finite.
HIDDEN = -1e30
#: A bias of this or less hides a key, as -inf does: masks are often written as large numbers.
HIDES = -1e29


class Problem(NamedTuple):
    """All that is known while tracing of one attention beside the arrays' shapes.

    Fields:
        scale: of the scores.
        band: which keys a query sees.
        softcap: c of c tanh(s / c), or None.
    """

    scale: float
    band: Band
    softcap: float | None = None


def tile_counts(
    queries: int, keys: int, block_q: int, block_kv: int, band: Band
) -> tuple[int, int]:
    """Tiles of the scores that are visited, and those of them that are masked by element.

    >>> tile_counts(4096, 4096, 128, 128, Band(right=0))  # causal, of 1024 tiles
    (528, 32)
    """
    first = np.arange(0, queries, block_q)
    last = np.minimum(first + block_q, queries) - 1
    bounds = tile_range(band, first, last, block_kv, keys, np)
    begin, full, edge, end, _ = np.broadcast_arrays(*bounds, first)
    return int((end - begin).sum()), int((end - begin - (edge - full)).sum())


def softcapped(scores: jax.Array, softcap: float | None) -> jax.Array:
    """c tanh(s / c); the scores themselves for None."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def additive(bias: jax.Array, dtype: Any) -> jax.Array:
    """What a bias adds to scores: -inf where it hides a key."""
    return jnp.where(bias <= HIDES, -jnp.inf, bias.astype(dtype))


def varying_like(tree: Any, *like: Any) -> Any:
    """Let types say that values vary over the mesh axes that any of `like` varies over.

    Loops inside `shard_map` refuse a carry whose type changes.
    """
    axes = frozenset().union(*map(_varying, jax.tree.leaves(like)))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def shape_like(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """Of a kernel's output that varies over the mesh axes that `like` varies over."""
    kind = jax.typeof(like)
    varying: dict[str, Any] = (
        {"vma": kind.vma} if hasattr(kind, "vma") else {"manual_axis_type": kind.mat}
    )
    return jax.ShapeDtypeStruct(shape, dtype, **varying)


def padded(x: jax.Array, axis: int, block: int, fill: float = 0) -> jax.Array:
    """The axis made a multiple of `block` long."""
    widths = [(0, -x.shape[a] % block if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill) if widths[axis][1] else x


def _varying(x: Any) -> frozenset[str]:
    kind = jax.typeof(x)
    return frozenset(kind.vma if hasattr(kind, "vma") else kind.mat.varying)
