"""What a codec is, what its payload costs, and codecs over pytrees."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

Tree = Any
#: Anything with a shape and a dtype: an array, or a `jax.ShapeDtypeStruct`.
Like = Any
Shape = tuple[int, ...]


class Codec(Protocol):
    """Lossy coding of one array: `decode(encode(key, x), x)` is C(x), and the payload travels.

    A codec is a small frozen dataclass, so hashable, and its methods are pure: they work under
    `jit`, `vmap`, `scan` and `shard_map`. Arrays of any shape are read in C order; arithmetic and
    scales are float32 whatever the array's dtype.
    """

    def encode(self, key: Key[Array, ""] | None, x: Float[Array, "..."]) -> Tree:
        """The arrays that travel. `key` may be None for a codec that draws nothing.

        Raises:
            TypeError: x is not of a real floating dtype.
            ValueError: the codec draws and has no key, or does not fit the array's size.
        """

    def decode(self, payload: Tree, like: Like) -> Float[Array, "..."]:
        """C(x), with the shape and dtype of `like`."""

    def contraction(self, shape: Shape) -> float | None:
        """The delta of E||C(u) - u||^2 <= (1 - delta) ||u||^2 for all u; None where none is."""
        return None

    def variance(self, shape: Shape) -> float | None:
        """The omega of E C(u) = u, E||C(u) - u||^2 <= omega ||u||^2; None for a biased codec.

        Then C / (1 + omega) is a contraction with delta = 1 / (1 + omega).
        """
        return None


class Dense(NamedTuple):
    """The payload of an array that travels as it is.

    Fields:
        values: the array, shape and dtype unchanged.
    """

    values: Float[Array, "..."]


@dataclass(frozen=True)
class Identity(Codec):
    """Nothing is lost: the array itself travels.

    >>> Identity().decode(Identity().encode(None, jnp.ones(2)), jnp.ones(2))
    Array([1., 1.], dtype=float32)
    """

    def encode(self, key: Key[Array, ""] | None, x: Float[Array, "..."]) -> Dense:
        return Dense(floating(x))

    def decode(self, payload: Dense, like: Like) -> Float[Array, "..."]:
        return restore(payload.values, like)

    def contraction(self, shape: Shape) -> float:
        return 1.0

    def variance(self, shape: Shape) -> float:
        return 0.0


def payload_bytes(payload: Tree) -> int:
    """Bytes of all arrays of a payload, or of any pytree; also of `jax.eval_shape`'s answer.

    So what a codec costs is known without running it:

    >>> x = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    >>> payload_bytes(jax.eval_shape(Identity().encode, None, x))
    4000000
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(payload))


def encode_tree(
    codec: Codec, key: Key[Array, ""] | None, tree: Tree, *, scope: str = "leaf"
) -> list[Tree]:
    """Encode a pytree of arrays: a list of payloads, each leaf with a key of its own.

    Args:
        scope: "leaf" codes each leaf alone (a scale, or a Top-K, per leaf); "global" concatenates
            the leaves first, into one payload. These are different algorithms.

    Raises:
        TypeError, ValueError: as the codec's `encode`; another scope.

    Example:
        >>> tree = {"a": jnp.ones(3), "b": jnp.zeros(2)}
        >>> payloads = encode_tree(Identity(), None, tree)
        >>> decode_tree(Identity(), payloads, tree)["b"]
        Array([0., 0.], dtype=float32)
    """
    leaves = jax.tree.leaves(tree)
    if _is_global(scope) and leaves:
        dtype = _common_dtype(leaves)
        leaves = [joined([flatten(leaf, dtype) for leaf in leaves])]
    keys = [None] * len(leaves) if key is None else list(jax.random.split(key, len(leaves)))
    return [codec.encode(k, leaf) for k, leaf in zip(keys, leaves, strict=True)]


def decode_tree(codec: Codec, payloads: list[Tree], like: Tree, *, scope: str = "leaf") -> Tree:
    """The pytree of `encode_tree` with the same scope; `like` gives structure, shapes, dtypes.

    Raises:
        ValueError: another scope.

    >>> tree = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([4.0])}
    >>> payloads = encode_tree(Identity(), None, tree, scope="global")
    >>> len(payloads), float(decode_tree(Identity(), payloads, tree, scope="global")["b"][0])
    (1, 4.0)
    """
    leaves, structure = jax.tree.flatten(like)
    if _is_global(scope) and leaves:
        ends = [sum(leaf.size for leaf in leaves[: i + 1]) for i in range(len(leaves))]
        whole = jax.ShapeDtypeStruct((ends[-1],), _common_dtype(leaves))
        parts = jnp.split(codec.decode(payloads[0], whole), ends[:-1])
        decoded = [restore(part, leaf) for part, leaf in zip(parts, leaves, strict=True)]
    else:
        decoded = [codec.decode(p, leaf) for p, leaf in zip(payloads, leaves, strict=True)]
    return jax.tree.unflatten(structure, decoded)


def _common_dtype(leaves: list[Like]) -> np.dtype:
    return jnp.result_type(*(leaf.dtype for leaf in leaves))


def _is_global(scope: str) -> bool:
    if scope not in ("leaf", "global"):
        raise ValueError(f'scope is {scope!r}; it must be "leaf" or "global"')
    return scope == "global"


def floating(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x, or an error that says what it is."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"codecs take arrays of a real floating dtype, and this one is {x.dtype}")
    return x


def flatten(x: Float[Array, "..."], dtype: Any = jnp.float32) -> Float[Array, " d"]:
    """x as a vector in C order, float32 unless told (None keeps x's dtype)."""
    x = floating(x).reshape(-1)
    return x if dtype is None else x.astype(dtype)


def restore(flat: Array, like: Like) -> Float[Array, "..."]:
    """The array of a vector, with the shape and dtype of `like`."""
    return flat.reshape(like.shape).astype(like.dtype)


def joined(parts: list[Array]) -> Array:
    """Vectors of one dtype as one.

    Part by part: a CPU fuses what makes the parts into the loop of `jnp.concatenate`, or of the pad
    that writing into zeros becomes, and took a second for two million coordinates.
    """
    parts = [part for part in parts if part.size] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    whole = jnp.broadcast_to(parts[0][0], (sum(part.size for part in parts),))
    start = 0
    for part in parts:
        whole = jax.lax.dynamic_update_slice(whole, part, (start,))
        start += part.size
    return whole


def need_key(codec: Codec, key: Key[Array, ""] | None) -> Key[Array, ""]:
    """The key, or an error that names the codec."""
    if key is None:
        raise ValueError(f"{codec} draws at random: encode(key, x) needs a key, and it is None")
    return key
