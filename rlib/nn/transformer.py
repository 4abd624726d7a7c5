"""A decoder-only Transformer: pre-norm, RMSNorm, rotary positions, grouped queries, SwiGLU.

A layer is, with residual stream x (B, T, D), N query heads, K key and value heads of size H,

    h = RMSNorm(x);  q, k, v = h Wq, h Wk, h Wv;  x <- x + attention(rot(q), rot(k), v) Wo
    h = RMSNorm(x);  x <- x + (silu(h Wg) * (h Wu)) Wd

and the logits are RMSNorm(x) E^T, with E the embedding (tied) or a matrix of its own.

| part | source, arXiv |
|---|---|
| decoder, causal attention | Vaswani et al. 2017, 1706.03762 |
| RMSNorm | Zhang and Sennrich 2019, 1910.07467 |
| rotary positions, in halves instead of pairs | Su et al. 2021, 2104.09864, eq. 34 |
| grouped queries | Ainslie et al. 2023, 2305.13245 |
| SwiGLU | Shazeer 2020, 2002.05202 |
| initialisation of output kernels / sqrt(2 layers) | Radford et al. 2019, GPT-2 |

Layers are stacked along a leading axis, "layers", and scanned: one layer is traced and compiled.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from kernels_pallas import sharded_flash_attention
from rlib.nn.partitioning import logical_axes
from rlib.parallel import LOGICAL_AXIS_RULES

#: (q [B, T, N, H], k [B, T, K, H], v [B, T, K, H]) -> [B, T, N, H], causal
AttentionFn = Callable[[Array, Array, Array], Array]


def causal_attention(
    q: Float[Array, "b t n h"], k: Float[Array, "b t kv h"], v: Float[Array, "b t kv h"]
) -> Float[Array, "b t n h"]:
    """softmax(q k^T / sqrt(H)) v over positions that are not later, by FlashAttention.

    Under a mesh (that of `parallel.make_train_step`, or of `jax.set_mesh`) the batch and the heads
    are split as `parallel.LOGICAL_AXIS_RULES` say.

    >>> v = jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
    >>> causal_attention(0 * v, 0 * v, v).ravel()  # means of what has come
    Array([1., 2., 4.], dtype=float32)
    """
    rules = LOGICAL_AXIS_RULES
    attend = sharded_flash_attention(batch=rules["batch"], heads=rules["heads"])
    return attend(q, k, v, causal=True)


def rotary_table(
    positions: Int[Array, " t"], size: int, base: float = 10_000.0
) -> tuple[Float[Array, "t 1 size/2"], Float[Array, "t 1 size/2"]]:
    """cos and sin of position * base^(-2 i / size), i = 0 .. size / 2 - 1, in float32.

    >>> cos, sin = rotary_table(jnp.arange(3), 4)
    >>> cos.shape, [round(float(s), 4) for s in sin[1, 0]]  # of 1 and 1/100
    ((3, 1, 2), [0.8415, 0.01])
    """
    frequencies = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotary(
    x: Float[Array, "*b t n h"], table: tuple[Float[Array, "t 1 h/2"], Float[Array, "t 1 h/2"]]
) -> Float[Array, "*b t n h"]:
    """Turns each pair (x_i, x_(i + H/2)) by the angle of its position and frequency.

    Scalar products of turned queries and keys depend on the difference of their positions only.
    Computed in float32, returned in the dtype of `x`.

    >>> table = rotary_table(jnp.arange(3), 4)
    >>> rotary(jnp.ones((3, 1, 4)), table)[0, 0]  # position 0 is not turned
    Array([1., 1., 1., 1.], dtype=float32)
    """
    cos, sin = table
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def next_token_loss(
    logits: Float[Array, "*b t v"],
    tokens: Int[Array, "*b t"],
    weights: Float[Array, "*b"] | None = None,
) -> Float[Array, ""]:
    """-log p(tokens[i + 1] | logits[i]) in nats, averaged over T - 1 positions and the batch.

    `weights` multiply the sequences' losses; the sum is divided by the number of sequences, not by
    their weights, so that weights for sampling leave the mean gradient as it is.

    Raises:
        ValueError: sequences of one token.

    >>> round(float(next_token_loss(jnp.zeros((2, 8, 256)), jnp.zeros((2, 8), jnp.uint8))), 4)
    5.5452
    """
    if tokens.shape[-1] < 2:
        raise ValueError(f"tokens {tokens.shape}: there is no next token in sequences of one")
    targets = tokens[..., 1:].astype(jnp.int32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits[..., :-1, :], targets)
    return jnp.mean(nats if weights is None else nats * weights[..., None])


class TransformerLayer(nnx.Module):
    """One layer; `Transformer` tells what the arguments mean. Compute dtype is that of x."""

    def __init__(
        self,
        embed: int,
        heads: int,
        kv_heads: int,
        mlp: int,
        *,
        rngs: nnx.Rngs,
        out_scale: float = 1.0,
        param_dtype: Dtype = jnp.float32,
    ):
        size = embed // heads

        def kernel(shape: tuple[int, ...], fan_in: int, *axes: str | None, scale: float = 1.0):
            draw = jax.nn.initializers.normal(scale / math.sqrt(fan_in))
            return nnx.Param(draw(rngs.params(), shape, param_dtype), **logical_axes(*axes))

        self.attention_norm = _rms_norm(embed, rngs, param_dtype)
        self.query = kernel((embed, heads, size), embed, "embed", "heads", None)
        self.key = kernel((embed, kv_heads, size), embed, "embed", "kv_heads", None)
        self.value = kernel((embed, kv_heads, size), embed, "embed", "kv_heads", None)
        self.out = kernel((heads, size, embed), embed, "heads", None, "embed", scale=out_scale)
        self.mlp_norm = _rms_norm(embed, rngs, param_dtype)
        self.gate = kernel((embed, mlp), embed, "embed", "mlp")
        self.up = kernel((embed, mlp), embed, "embed", "mlp")
        self.down = kernel((mlp, embed), mlp, "mlp", "embed", scale=out_scale)

    def __call__(
        self, x: Float[Array, "b t d"], table: tuple[Array, Array], attention_fn: AttentionFn
    ) -> Float[Array, "b t d"]:
        h = _normalised(self.attention_norm, x)
        q, k, v = (
            jnp.einsum("btd,dnh->btnh", h, kernel[...].astype(h.dtype))
            for kernel in (self.query, self.key, self.value)
        )
        mixed = attention_fn(rotary(q, table), rotary(k, table), v)
        x = x + jnp.einsum("btnh,nhd->btd", mixed, self.out[...].astype(h.dtype))

        h = _normalised(self.mlp_norm, x)
        gate, up, down = (p[...].astype(h.dtype) for p in (self.gate, self.up, self.down))
        return x + (jax.nn.silu(h @ gate) * (h @ up)) @ down


class Transformer(nnx.Module):
    """Tokens (B, T) to float32 logits (B, T, V); logits at i depend on tokens 0 .. i.

    Args:
        vocab: V, 256 for bytes.
        layers: their number.
        embed: D, width of the residual stream.
        heads: N query heads of size D / N, which must be even.
        kv_heads: K, a divisor of N; heads N / K g .. N / K (g + 1) - 1 share key and value head g.
            N if None.
        mlp: width of SwiGLU; 8 D / 3, rounded up to a multiple of 64, if None.
        tied: the logits' matrix is the embedding.
        rngs: the stream "params".
        dtype: of the computation, `param_dtype` if None. Parameters, logits, and the statistics of
            norms and softmax stay in float32.
        remat: compute a layer's inside again for its gradient: memory for B T D numbers a layer.
        attention_fn: (q, k, v) -> out in the layout of `jax.nn.dot_product_attention`, positions
            already in q and k. It must be causal itself. Kernels are injected here.
        rotary_base: of the rotary frequencies.

    Raises:
        ValueError: D does not divide into N even heads, or N not into K groups.

    Example:
        >>> sizes = dict(layers=2, embed=32, heads=4, kv_heads=2)
        >>> logits = lambda tokens: Transformer(256, **sizes, rngs=nnx.Rngs(0))(tokens)
        >>> jax.eval_shape(logits, jnp.zeros((3, 10), jnp.uint8)).shape
        (3, 10, 256)
    """

    def __init__(
        self,
        vocab: int,
        *,
        layers: int,
        embed: int,
        heads: int,
        kv_heads: int | None = None,
        mlp: int | None = None,
        tied: bool = True,
        rngs: nnx.Rngs,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        remat: bool = False,
        attention_fn: AttentionFn = causal_attention,
        rotary_base: float = 10_000.0,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        mlp = -(-8 * embed // (3 * 64)) * 64 if mlp is None else mlp
        if embed % (2 * heads):
            raise ValueError(f"embed={embed} does not divide into {heads} heads of an even size")
        if heads % kv_heads:
            raise ValueError(f"heads={heads} do not divide into groups for kv_heads={kv_heads}")

        @jax.vmap
        def stack(key: Array) -> TransformerLayer:
            return TransformerLayer(
                embed,
                heads,
                kv_heads,
                mlp,
                rngs=nnx.Rngs(key),
                out_scale=1 / math.sqrt(2 * layers),
                param_dtype=param_dtype,
            )

        self.layers = stack(jax.random.split(rngs.params(), layers))
        for _, parameter in nnx.to_flat_state(nnx.state(self.layers)):
            names = parameter.get_metadata()["out_sharding"]
            parameter.set_metadata(out_sharding=("layers", *names))

        draw = jax.nn.initializers.normal(0.02)
        self.embedding = nnx.Param(
            draw(rngs.params(), (vocab, embed), param_dtype), **logical_axes("vocab", "embed")
        )
        self.norm = _rms_norm(embed, rngs, param_dtype)
        self.unembedding: Any = nnx.data(None)
        if not tied:
            self.unembedding = nnx.Param(
                draw(rngs.params(), (vocab, embed), param_dtype), **logical_axes("vocab", "embed")
            )
        self.head_size, self.rotary_base = embed // heads, rotary_base
        self.dtype = param_dtype if dtype is None else dtype
        self.remat, self.attention_fn = remat, attention_fn

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t v"]:
        table = rotary_table(jnp.arange(tokens.shape[1]), self.head_size, self.rotary_base)

        def layer_step(x: Array, layer: TransformerLayer) -> tuple[Array, None]:
            return layer(x, table, self.attention_fn), None

        if self.remat:
            layer_step = jax.checkpoint(layer_step, prevent_cse=False)
        x = self.embedding[...][tokens.astype(jnp.int32)].astype(self.dtype)
        x, _ = jax.lax.scan(layer_step, x, self.layers)

        x = _normalised(self.norm, x)
        matrix = self.embedding if self.unembedding is None else self.unembedding
        return jnp.einsum(
            "btd,vd->btv", x, matrix[...].astype(x.dtype), preferred_element_type=jnp.float32
        )


def _rms_norm(embed: int, rngs: nnx.Rngs, param_dtype: Dtype) -> nnx.RMSNorm:
    names = logical_axes("embed")
    return nnx.RMSNorm(embed, param_dtype=param_dtype, rngs=rngs, scale_metadata=names)


def _normalised(norm: nnx.RMSNorm, x: Array) -> Array:
    """x * rsqrt(mean(x^2) + 1e-6) * scale: float32 inside, then back to the stream's dtype."""
    return norm(x).astype(x.dtype)
