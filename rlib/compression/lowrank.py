"""A matrix as a product of two thin ones."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from rlib.compression.codec import Codec, Dense, Like, Shape, flatten, floating, restore


class LowRankPayload(NamedTuple):
    """The two factors; C(M) = P Q^T.

    Fields:
        p: orthonormal columns.
        q: M^T P.
    """

    p: Float[Array, "rows rank"]
    q: Float[Array, "columns rank"]


@dataclass(frozen=True)
class LowRank(Codec):
    """C(M) = P P^T M with P of `rank` columns by subspace iteration (PowerSGD, arXiv 1905.13727).

    Each of the `power_iterations` is P = orthonormalised(M Q), Q = M^T P; the first Q is Gaussian,
    drawn from the key, or always the same when the key is None. An array of more than two axes is
    the matrix (first axis, rest). An array of fewer, and one whose factors would hold no fewer
    numbers than itself, travels uncompressed, as a `Dense`. Factors are float32.

    With a fresh key, delta = rank / columns: P P^T M is at least as near to M as M V V^T, V an
    orthonormal basis of Q's span and uniform. With the fixed start there is no delta: all of M may
    lie in the kernel of Q^T; error feedback then never sends it.

    Raises:
        ValueError: `rank` or `power_iterations` below 1.

    >>> codec, u = LowRank(rank=1), jnp.outer(jnp.arange(1.0, 4.0), jnp.ones(4))
    >>> jnp.allclose(codec.decode(codec.encode(None, u), u), u, atol=1e-5)
    Array(True, dtype=bool)
    """

    rank: int = 1
    power_iterations: int = 1

    def __post_init__(self):
        if self.rank < 1 or self.power_iterations < 1:
            raise ValueError(f"{self}: rank and power_iterations must be at least 1")

    def encode(self, key: Key[Array, ""] | None, x: Float[Array, "..."]) -> Dense | LowRankPayload:
        if not self._compresses(x.shape):
            return Dense(floating(x))
        m = flatten(x).reshape(x.shape[0], -1)
        start = jax.random.key(0) if key is None else key
        q = jax.random.normal(start, (m.shape[1], self.rank))
        for _ in range(self.power_iterations):
            p, _ = jnp.linalg.qr(jnp.matmul(m, q, precision="highest"))
            q = jnp.matmul(m.T, p, precision="highest")
        return LowRankPayload(p, q)

    def decode(self, payload: Dense | LowRankPayload, like: Like) -> Float[Array, "..."]:
        if isinstance(payload, Dense):
            return restore(payload.values, like)
        return restore(jnp.matmul(payload.p, payload.q.T, precision="highest"), like)

    def contraction(self, shape: Shape) -> float:
        """delta over keys; it does not hold for `key=None`."""
        return self.rank * shape[0] / math.prod(shape) if self._compresses(shape) else 1.0

    def _compresses(self, shape: Shape) -> bool:
        if len(shape) < 2:
            return False
        size = math.prod(shape)
        return size > 0 and self.rank * (shape[0] + size // shape[0]) < size
