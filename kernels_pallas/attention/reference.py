"""Attention in the plainest code: all scores at once, gradients by JAX; an oracle."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention.problem import Problem, additive, softcapped


def why_not(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Why this implementation cannot serve these arrays; it always can."""


def why_not_on(platform: str, kind: str) -> None:
    """Why this implementation cannot run on a device; it always can."""


def forward(problem, q, k, v, bias=None, q_ids=None, kv_ids=None):
    """softmax(cap(scale q k^T) + bias) v over the keys that are seen.

    Args:
        problem: scale, mask and cap.
        q: [B, T, N, D].
        k, v: [B, S, K, D] and [B, S, K, E]; query head n reads head n // (N / K).
        bias: [B or 1, N or 1, T or 1, S or 1], or None.
        q_ids, kv_ids: [B, T] and [B, S] segments, or None.

    Returns:
        [B, T, N, E] in the dtype of q, and the logarithms of the sums [B, N, T], in float32 at
        least. A query that sees no key has output 0 and -inf.
    """
    (b, t, n, d), (s, heads, e) = q.shape, v.shape[1:]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(b, t, heads, n // heads, d)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=wide)
    scores = softcapped(scores * problem.scale, problem.softcap).reshape(b, n, t, s)
    if bias is not None:
        scores = scores + additive(bias, wide)
    seen = jnp.broadcast_to(problem.band.sees(jnp.arange(t)[:, None], jnp.arange(s)), (t, s))
    if q_ids is not None:
        seen = seen & (q_ids[:, None, :, None] == kv_ids[:, None, None, :])
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, initial=-jnp.inf))
    some = top != -jnp.inf
    top = jnp.where(some, top, 0)
    weights = jnp.exp(scores - top[..., None])
    total = jnp.where(some, jnp.sum(weights, axis=-1), 1)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    weights = (weights / total[..., None]).astype(v.dtype).reshape(b, heads, n // heads, t, s)
    out = jnp.einsum("bkgts,bske->btkge", weights, v, preferred_element_type=wide)
    return out.reshape(b, t, n, e).astype(q.dtype), lse


def backward(problem, q, k, v, bias, q_ids, kv_ids, out, lse, dout, dlse, *, bias_gradient):
    """Gradients of q, k, v and the bias, None if it is not wanted.

    Args:
        problem ... kv_ids: those of `forward`.
        out, lse: what `forward` gave.
        dout, dlse: their gradients.
    """

    def compute(q, k, v, bias):
        return forward(problem, q, k, v, bias, q_ids, kv_ids)

    _, pull = jax.vjp(compute, q, k, v, bias)
    dq, dk, dv, dbias = pull((dout, dlse))
    return dq, dk, dv, dbias if bias_gradient else None
