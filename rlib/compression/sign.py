"""One bit a coordinate: the scaled sign."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, UInt8

from rlib.compression.bits import count_true, pack_bits, unpack_bits
from rlib.compression.codec import Codec, Like, Shape, flatten, restore


class SignPayload(NamedTuple):
    """What a scaled sign sends.

    Fields:
        bits: packed signs, True for u >= 0; masked-out coordinates keep their place.
        scale: the one magnitude s >= 0.
    """

    bits: UInt8[Array, "..."]
    scale: Float[Array, ""]


@dataclass(frozen=True)
class ScaledSign(Codec):
    """C(u) = s sgn(u), with sgn(u) = +1 where u >= 0 (so at 0 and -0.0) and -1 elsewhere.

    `scale="l2"`: s = ||u||_2 / sqrt(d), so ||C(u)|| = ||u||. The compressor of 1-bit Adam (arXiv
    2102.02888, section 3); not a contraction: ||u - C(u)||^2 = 2||u||^2 - 2||u|| ||u||_1 / sqrt(d)
    exceeds ||u||^2 on spiky vectors. `scale="l1"`: s = mean|u|, whose error
    ||u||^2 - ||u||_1^2 / d is at most (1 - 1/d) ||u||^2, with equality for a one-hot vector.

    `encode(key, x, mask)` and `decode(payload, like, mask)` take the same boolean mask of x's
    shape: where it is False a coordinate counts neither in the norm nor in d, and decodes to 0.
    Nothing left to count gives s = 0. Squares are summed in float32, so magnitudes below 1e-19
    count as 0 in the l2 scale, and those above 1e19 overflow.

    Raises:
        ValueError: another scale.

    >>> codec, u = ScaledSign(), jnp.array([1.0, -2.0, 2.0, 0.0])
    >>> codec.decode(codec.encode(None, u), u)
    Array([ 1.5, -1.5,  1.5,  1.5], dtype=float32)
    """

    scale: Literal["l2", "l1"] = "l2"

    def __post_init__(self):
        if self.scale not in ("l2", "l1"):
            raise ValueError(f'ScaledSign(scale={self.scale!r}): it must be "l2" or "l1"')

    def encode(
        self,
        key: Key[Array, ""] | None,
        x: Float[Array, "*shape"],
        mask: Bool[Array, "*shape"] | None = None,
    ) -> SignPayload:
        u = flatten(x)
        kept, count = u, jnp.float32(u.size)
        if mask is not None:
            kept = jnp.where(_matching(mask, x), u, 0)
            count = count_true(mask).astype(jnp.float32)
        count = jnp.maximum(count, 1)
        if self.scale == "l2":
            s = jnp.sqrt(jnp.sum(kept * kept) / count)
        else:
            s = jnp.sum(jnp.abs(kept)) / count
        return SignPayload(pack_bits(u >= 0), s)

    def decode(
        self, payload: SignPayload, like: Like, mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        positive = unpack_bits(payload.bits, math.prod(like.shape))
        u = jnp.where(positive, payload.scale, -payload.scale)
        return restore(u if mask is None else jnp.where(_matching(mask, like), u, 0), like)

    def contraction(self, shape: Shape) -> float | None:
        return 1 / max(math.prod(shape), 1) if self.scale == "l1" else None


def _matching(mask: Bool[Array, "..."], like: Like) -> Bool[Array, " d"]:
    if mask.shape != like.shape:
        raise ValueError(f"the mask has shape {mask.shape}, and the array {like.shape}")
    return mask.reshape(-1)
