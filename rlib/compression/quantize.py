"""A few bits a coordinate, rounded at random so that the mean is right."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from rlib.compression.bits import pack_bits, pack_codes, unpack_bits, unpack_codes
from rlib.compression.codec import Codec, Like, Shape, flatten, need_key, restore


class QuantizedPayload(NamedTuple):
    """What stochastic quantization sends.

    Fields:
        codes: level + s of every coordinate, packed.
        norm: ||u||_2.
    """

    codes: UInt8[Array, "..."]
    norm: Float[Array, ""]


@dataclass(frozen=True)
class StochasticQuantization(Codec):
    """C(u) = ||u||_2 / s * level, level in {-s, ..., s}, s = 2^(bits - 1) - 1. Unbiased.

    s u / ||u|| is rounded up or down at random so that its mean stays (QSGD, arXiv 1610.02132,
    section 3.1), and the level is sent in `bits` bits, 2 to 8, sign included.
    omega = min(d / s^2, sqrt(d) / s) (Lemma 3.1). The norm is float32, with the range that
    `ScaledSign` states.

    Raises:
        ValueError: `bits` not from 2 to 8.

    >>> codec, u = StochasticQuantization(bits=4), jnp.array([0.0, -5.0])
    >>> codec.decode(codec.encode(jax.random.key(0), u), u)
    Array([ 0., -5.], dtype=float32)
    """

    bits: int = 4

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"{self}: bits must be from 2 to 8")

    @property
    def levels(self) -> int:
        """s: levels above zero."""
        return 2 ** (self.bits - 1) - 1

    def encode(self, key: Key[Array, ""] | None, x: Float[Array, "..."]) -> QuantizedPayload:
        u, s = flatten(x), self.levels
        norm = jnp.sqrt(jnp.sum(u * u))
        y = jnp.clip(jnp.where(norm > 0, u / norm * s, 0), -s, s)
        low = jnp.floor(y)
        up = jax.random.uniform(need_key(self, key), u.shape) < y - low
        return QuantizedPayload(pack_codes((low + up + s).astype(jnp.uint8), self.bits), norm)

    def decode(self, payload: QuantizedPayload, like: Like) -> Float[Array, "..."]:
        codes = unpack_codes(payload.codes, self.bits, math.prod(like.shape))
        level = codes.astype(jnp.float32) - self.levels
        return restore(level * (payload.norm / self.levels), like)

    def variance(self, shape: Shape) -> float:
        d, s = math.prod(shape), self.levels
        return min(d / s**2, math.sqrt(d) / s)


class NaturalPayload(NamedTuple):
    """What natural compression sends.

    Fields:
        exponents: biased float32 exponents; 0 stands for the value 0, 255 for infinity.
        signs: packed, True for negative.
    """

    exponents: UInt8[Array, " d"]
    signs: UInt8[Array, "..."]


@dataclass(frozen=True)
class NaturalCompression(Codec):
    """Every coordinate becomes one of the two powers of two around it, at random. Unbiased.

    Nine bits a coordinate: a sign and a float32 exponent; omega = 1/8 (arXiv 1905.10988,
    Theorem 1). Subnormal numbers become 0 or 2^-126, in the mean themselves where the machine
    does not flush them to 0. 2^127 and above may become infinite, and NaN becomes infinite.

    >>> codec, u = NaturalCompression(), jnp.array([0.25, -8.0, 0.0])
    >>> codec.decode(codec.encode(jax.random.key(0), u), u)
    Array([ 0.25, -8.  ,  0.  ], dtype=float32)
    """

    def encode(self, key: Key[Array, ""] | None, x: Float[Array, "..."]) -> NaturalPayload:
        word = jax.lax.bitcast_convert_type(flatten(x), jnp.uint32)
        magnitude = word & 0x7FFFFFFF
        # 23 random bits carry into the exponent with probability mantissa / 2^23, as it should be.
        random = jax.random.bits(need_key(self, key), word.shape, jnp.uint32) >> 9
        exponents = jnp.minimum((magnitude + random) >> 23, 255).astype(jnp.uint8)
        return NaturalPayload(exponents, pack_bits(word >> 31 != 0))

    def decode(self, payload: NaturalPayload, like: Like) -> Float[Array, "..."]:
        sign = unpack_bits(payload.signs, math.prod(like.shape)).astype(jnp.uint32) << 31
        word = sign | (payload.exponents.astype(jnp.uint32) << 23)
        return restore(jax.lax.bitcast_convert_type(word, jnp.float32), like)

    def variance(self, shape: Shape) -> float:
        return 1 / 8
