"""Truth values and small integers as packed bytes."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt8

# TPUs tile uint8 by (8k, 128): bytes as rows of 128 lanes, with the eight bits of a byte on an
# axis before them, need no padding, where a trailing axis of eight is padded to 128.
_LANES = 128
_ROW = 8 * _LANES  # bits in a row of bytes


def pack_bits(bits: Bool[Array, "..."]) -> UInt8[Array, " bytes"] | UInt8[Array, "rows 128"]:
    """Pack n truth values, read in C order, into bytes.

    - n <= 1024: uint8[ceil(n / 8)], in the order of `np.packbits`.
    - n > 1024: uint8[rows, 128] with rows = ceil(n / 1024), at most 127 bytes more, which hold
      False. The order is that of `np.packbits` on CPUs. Elsewhere the values, False appended up
      to 1024 rows, are read as eight planes of (rows, 128), and plane j holds the bits of value
      2**(7 - j) of every byte. Unpack a message on the platform that packed it: the bytes do not
      say their order.

    >>> pack_bits(jnp.array([True, False, True]))
    Array([160], dtype=uint8)
    >>> pack_bits(jnp.ones((5, 1000), bool)).shape
    (5, 128)
    """
    flat = jnp.asarray(bits).reshape(-1)
    if flat.size <= _ROW:
        return jnp.packbits(flat)
    return lax.platform_dependent(flat, cpu=_pack_in_order, default=_pack_planes)


def _pack_in_order(flat: Bool[Array, " n"]) -> UInt8[Array, "rows 128"]:
    # A CPU unpacks this order as fast as it copies, and planes three times slower.
    packed = jnp.packbits(flat)
    return jnp.pad(packed, (0, -packed.size % _LANES)).reshape(-1, _LANES)


def _pack_planes(flat: Bool[Array, " n"]) -> UInt8[Array, "rows 128"]:
    planes = jnp.pad(flat, (0, -flat.size % _ROW)).reshape(8, -1, _LANES)
    return jnp.packbits(planes, axis=0)[0]


def unpack_bits(packed: UInt8[Array, "..."], n: int) -> Bool[Array, " {n}"]:
    """The n truth values of `pack_bits`.

    >>> unpack_bits(pack_bits(jnp.array([True, False, True])), 3)
    Array([ True, False,  True], dtype=bool)

    Raises:
        ValueError: the bytes have not the shape that `pack_bits` gives n values.
    """
    if packed.shape != packed_shape(n):
        wanted = list(packed_shape(n))
        raise ValueError(f"{n} bits travel as uint8{wanted}, not uint8{list(packed.shape)}")
    if n <= _ROW:
        return _unpack_in_order(packed, n)
    in_order = lambda packed: _unpack_in_order(packed, n)
    return lax.platform_dependent(packed, cpu=in_order, default=lambda b: _unpack_planes(b)[:n])


def count_true(bits: Bool[Array, "..."]) -> Int[Array, ""]:
    """How many are true.

    >>> count_true(jnp.array([True, False, True]))
    Array(2, dtype=int32)
    """
    # By bytes: XLA adds up truth values one after the other on a CPU, nine times slower.
    return jnp.sum(lax.population_count(pack_bits(bits)), dtype=jnp.int32)


def packed_shape(n: int) -> tuple[int, ...]:
    """Shape of the bytes of n truth values.

    >>> packed_shape(10), packed_shape(5000)
    ((2,), (5, 128))
    """
    return (-(-n // 8),) if n <= _ROW else (-(-n // _ROW), _LANES)


def _unpack_in_order(packed: UInt8[Array, "..."], n: int) -> Bool[Array, " {n}"]:
    # The barrier keeps XLA from packing a byte anew for each of its bits; what was only padded is
    # cut off before it, so that the padding is not done.
    packed = lax.optimization_barrier(packed.reshape(-1)[: -(-n // 8)])
    return jnp.unpackbits(packed)[:n].astype(bool)


def _unpack_planes(packed: UInt8[Array, "rows 128"]) -> Bool[Array, " bits"]:
    return _planes(packed, 8).reshape(-1)


def pack_codes(codes: UInt8[Array, " n"], width: int) -> UInt8[Array, "..."]:
    """Pack integers below 2**width, width <= 8, plane by plane: `pack_bits` of n * width bits.

    With width 8 the codes are bytes already and travel as they are.

    >>> pack_codes(jnp.array([3, 0, 1, 2], jnp.uint8), 2)  # high bits 1001, low bits 1010
    Array([154], dtype=uint8)
    """
    if width == 8:
        return codes
    return pack_bits(_planes(codes, width))


def unpack_codes(packed: UInt8[Array, "..."], width: int, n: int) -> UInt8[Array, " {n}"]:
    """The n integers of `pack_codes`.

    >>> unpack_codes(jnp.array([154], jnp.uint8), 2, 4)
    Array([3, 0, 1, 2], dtype=uint8)
    """
    if width == 8:
        return packed
    planes = unpack_bits(packed, n * width).reshape(width, n).astype(jnp.uint8)
    return jnp.sum(planes << _shifts(width)[:, None], axis=0, dtype=jnp.uint8)


def _planes(codes: UInt8[Array, "..."], width: int) -> Bool[Array, "{width} ..."]:
    # A loop, so that the codes are computed once: XLA would fuse what makes them into each plane,
    # and draw random numbers once a bit (CPU, d = 1e7: four-bit quantization took eight times as
    # long). Not measured on GPUs and TPUs.
    return jax.lax.map(lambda shift: (codes >> shift) & 1 != 0, _shifts(width))


def _shifts(width: int) -> UInt8[Array, " width"]:
    return jnp.arange(width - 1, -1, -1, dtype=jnp.uint8)
