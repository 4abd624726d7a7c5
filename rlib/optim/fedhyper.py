"""FedHyper (Wang et al., arXiv 2310.03156): learning rates moved by their hypergradient.

With W^t = W^{t-1} - alpha^{t-1} Delta^{t-1} the derivative of the loss by alpha^{t-1} is
-<grad F(W^t), Delta^{t-1}>; the round's own Delta^t stands for the gradient, so alpha grows by
<Delta^t, Delta^{t-1}>: by more where successive updates agree. Inner products are of all parameters
together, not normalised, so they scale with the square of an update: log them. In the table
`variant` stands for variant="official" against the default "paper".

| | paper | official code | here |
| --- | --- | --- | --- |
| alpha | [1/3, 3] | [0.2, 5]; with momentum [0.8, 5] | alpha_0 times [1/gamma, gamma], or a pair |
| beta | [1/10, 10] beta_0 | [0.001, 0.1] | beta_0 times [1/gamma, gamma], or a pair |
| CL adds | <g, g'> + <g, Delta> / K | nothing: times min(1.1, 1 + <dw, dw'> + ..) | `variant` |
| CL acts | at step k | from k + 1, not after the first of an epoch | at k; official: k + 1 |
| SL's rate | kept over rounds | reset in every round: without effect | `variant` |
| momentum | not central | its part times alpha - 1 | times alpha; `variant` |
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Tree = Any
Variant = Literal["paper", "official"]
#: How far a rate may go from its first value: one factor, or the lowest and the highest multiple.
#: Traced ones, which no check can see, let one compiled program serve all bounds.
Bounds = float | tuple[float, float]


class FedHyperState(NamedTuple):
    """State of `scale_by_fedhyper_g` and `fedhyper_sl`.

    Fields:
        previous: Delta^{t-1}, with momentum L^{t-1}; zeros at first.
        rate: alpha^t, or the clients' rate of the next round.
        inner: <Delta^t, Delta^{t-1}>, for the log.
        clipped: updates at which a bound held.
        count: updates.
    """

    previous: Tree
    rate: Float[Array, ""]
    inner: Float[Array, ""]
    clipped: Int[Array, ""]
    count: Int[Array, ""]  # type: ignore[assignment]


def scale_by_fedhyper_g(
    alpha: float = 1.0,
    gamma: Bounds = 3.0,
    momentum: float = 0.0,
    *,
    normalize: Literal["none", "cosine"] = "none",
    variant: Variant = "paper",
) -> optax.GradientTransformation:
    """FedHyper-G: a server's rate. Updates are means of x^t - x_K; they come out times alpha^t.

    alpha^0 is `alpha`; alpha^t = clip(alpha^{t-1} + <Delta^t, L^{t-1}>), L^t = Delta^t + momentum
    L^{t-1}, and the update is alpha^t L^t. Before an optimiser such as Adam it scales what that
    one takes for the gradient.

    Args:
        alpha: the first rate.
        gamma: bounds; 1 keeps the rate.
        normalize: "cosine" divides inner products by both norms (ours, not the paper's).
        variant: "official" multiplies momentum's part by alpha - 1.

    Raises:
        ValueError: a rate that is not positive, bounds that do not hold 1, another option.

    >>> tx = scale_by_fedhyper_g()
    >>> state = tx.init(jnp.zeros(()))
    >>> for delta in (0.66, 0.53625):
    ...     update, state = tx.update(jnp.array(delta), state)
    >>> round(float(state.rate), 4), round(float(update), 4)
    (1.3539, 0.726)
    """
    low, high = _bounds(alpha, gamma, variant)
    if normalize not in ("none", "cosine"):
        raise ValueError(f'normalize={normalize!r}; it must be "none" or "cosine"')

    def update(delta: Tree, state: FedHyperState, params: Tree = None):
        wide = _wide(delta)
        inner = optax.tree.vdot(wide, state.previous)
        if normalize == "cosine":
            norms = optax.tree.norm(wide) * optax.tree.norm(state.previous)
            inner = inner / jnp.maximum(norms, 1e-12)
        direction = jax.tree.map(lambda d, p: d + momentum * p, wide, state.previous)
        new = _moved(direction, inner, state, low, high)
        scaled = jax.tree.map(lambda x: new.rate * x, direction)
        if variant == "official":
            scaled = jax.tree.map(lambda s, p: s - momentum * p, scaled, state.previous)
        return jax.tree.map(lambda s, d: s.astype(d.dtype), scaled, delta), new

    return optax.GradientTransformation(lambda params: _first(params, alpha), update)


def fedhyper_g(
    alpha: float = 1.0,
    gamma: Bounds = 3.0,
    momentum: float = 0.0,
    *,
    normalize: Literal["none", "cosine"] = "none",
    variant: Variant = "paper",
) -> optax.GradientTransformation:
    """`scale_by_fedhyper_g` as an optimiser of the server: its updates are subtracted.

    >>> tx = fedhyper_g(alpha=2.0)
    >>> float(tx.update(jnp.array(0.5), tx.init(jnp.zeros(())))[0])
    -1.0
    """
    scaled = scale_by_fedhyper_g(alpha, gamma, momentum, normalize=normalize, variant=variant)
    return optax.chain(scaled, optax.scale(-1.0))


def fedhyper_sl(
    beta: float, gamma: Bounds = 10.0, *, variant: Variant = "paper"
) -> optax.GradientTransformation:
    """FedHyper-SL: the server decides its clients' rate. Updates pass; `state.rate` is the rate.

    The rate of the next round is clip(beta^t + <Delta^t, Delta^{t-1}>).

    Args:
        beta: the first rate.
        gamma: bounds; 1 keeps the rate.
        variant: "official" resets the rate in every round.

    Raises:
        ValueError: as `scale_by_fedhyper_g`.

    >>> tx = fedhyper_sl(beta=0.05)
    >>> state = tx.init(jnp.zeros(()))
    >>> for delta in (0.66, 0.53625):
    ...     _, state = tx.update(jnp.array(delta), state)
    >>> round(float(state.rate), 6)
    0.403925
    """
    low, high = _bounds(beta, gamma, variant)

    def update(delta: Tree, state: FedHyperState, params: Tree = None):
        wide = _wide(delta)
        new = _moved(wide, optax.tree.vdot(wide, state.previous), state, low, high)
        if variant == "official":
            new = new._replace(rate=state.rate)
        return delta, new

    return optax.GradientTransformation(lambda params: _first(params, beta), update)


class FedHyperClientState(NamedTuple):
    """State of `scale_by_fedhyper_cl`, begun anew in every round.

    Fields:
        rate: beta^k; with variant "official" that of the next step.
        previous: g^{k-1}; with variant "official" the last step.
        count: steps.
    """

    rate: Float[Array, ""]
    previous: Tree
    count: Int[Array, ""]  # type: ignore[assignment]


def scale_by_fedhyper_cl(
    beta: float, gamma: Bounds = 10.0, *, global_coef: float, variant: Variant = "paper"
) -> optax.GradientTransformationExtraArgs:
    """FedHyper-CL: a client's rate, moved within the round; gradients come out times beta^k.

    beta^0 is `beta`; beta^k = clip(beta^{k-1} + <g^k, g^{k-1}> + global_coef <g^k, Delta>), where
    Delta is the last mean of x^t - x_K, which `update` takes as `previous_delta=`.

    Args:
        beta: the first rate of every round.
        gamma: bounds; 1 keeps the rate.
        global_coef: weight of agreement with the last round; the paper's 1 / K (its equation 20),
            in the official code 0.1 over the number of sampled clients.
        variant: "official" multiplies the rate of the next step by min(1.1, 1 + both products),
            of steps in place of gradients.

    Raises:
        ValueError: as `scale_by_fedhyper_g`; an update without `previous_delta`.

    >>> tx = scale_by_fedhyper_cl(0.05, global_coef=1 / 3)
    >>> w, state = jnp.array(0.3), tx.init(jnp.zeros(()))
    >>> for _ in range(3):
    ...     scaled, state = tx.update(2 * w, state, previous_delta=jnp.array(0.1))
    ...     w = w - scaled
    >>> round(float(state.rate), 5), round(float(w), 6)
    (0.45887, 0.004797)
    """
    low, high = _bounds(beta, gamma, variant)

    def init(params: Tree) -> FedHyperClientState:
        return FedHyperClientState(jnp.float32(beta), _zeros(params), jnp.zeros((), jnp.int32))

    def update(g: Tree, state: FedHyperClientState, params=None, *, previous_delta=None, **extra):
        if previous_delta is None:
            raise ValueError("fedhyper_cl: update(..., previous_delta=) needs the last mean update")
        if variant == "official":
            steps = jax.tree.map(lambda x: state.rate.astype(x.dtype) * x, g)
            agreed = optax.tree.vdot(steps, state.previous)
            agreed += global_coef * optax.tree.vdot(steps, previous_delta)
            factor = jnp.where(state.count == 0, 1.0, jnp.minimum(1.1, 1 + agreed))
            rate = jnp.clip(state.rate * factor, low, high).astype(state.rate.dtype)
            return steps, FedHyperClientState(rate, _wide(steps), state.count + 1)
        agreed = optax.tree.vdot(g, state.previous)
        agreed += global_coef * optax.tree.vdot(g, previous_delta)
        moved = jnp.clip(state.rate + agreed, low, high)
        rate = jnp.where(state.count == 0, state.rate, moved).astype(state.rate.dtype)
        scaled = jax.tree.map(lambda x: rate.astype(x.dtype) * x, g)
        return scaled, FedHyperClientState(rate, _wide(g), state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(direction: Tree, inner, state: FedHyperState, low, high) -> FedHyperState:
    # Where the product overflowed to a difference of infinities, the rate stays.
    moved = state.rate + jnp.where(jnp.isnan(inner), 0.0, inner)
    first = state.count == 0
    rate = jnp.where(first, state.rate, jnp.clip(moved, low, high))
    clipped = ~first & ((moved < low) | (moved > high))
    return FedHyperState(
        previous=direction,
        rate=rate.astype(state.rate.dtype),
        inner=inner.astype(jnp.float32),
        clipped=state.clipped + clipped.astype(jnp.int32),
        count=state.count + 1,
    )


def _first(params: Tree, rate: Any) -> FedHyperState:
    zero = jnp.zeros((), jnp.int32)
    return FedHyperState(_zeros(params), jnp.float32(rate), jnp.float32(0), zero, zero)


def _wide(tree: Tree) -> Tree:
    """In float32 at least: inner products would round with what is kept."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)), tree)


def _zeros(params: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, _wide(jax.tree.map(jnp.asarray, params)))


def _bounds(rate: Any, gamma: Bounds, variant: str) -> tuple[Any, Any]:
    low, high = gamma if isinstance(gamma, tuple) else (1 / gamma, gamma)
    if variant not in ("paper", "official"):
        raise ValueError(f'variant={variant!r}; it must be "paper" or "official"')
    traced = any(isinstance(end, jax.core.Tracer) for end in (low, high))
    if not traced and not 0 < low <= 1 <= high:
        raise ValueError(f"gamma={gamma}: a factor of at least 1, or a pair around 1")
    if isinstance(rate, int | float) and not rate > 0:
        raise ValueError(f"a rate of {rate} must be positive")
    return rate * low, rate * high
