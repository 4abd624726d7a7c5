"""Inputs moved against a network, within a distance in the largest coordinate: FGSM and PGD.

| | source | what it does |
|---|---|---|
| `fgsm` | Goodfellow et al. 2014, arXiv 1412.6572 | one step along the sign of the gradient |
| `pgd` | Madry et al. 2017, arXiv 1706.06083 | many, each clipped to the allowed distance |
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

Loss = Callable[[Float[Array, "..."]], Float[Array, ""]]


def fgsm(
    loss: Loss,
    x: Float[Array, "..."],
    epsilon: float | Array,
    *,
    low: float | None = None,
    high: float | None = None,
) -> Float[Array, "..."]:
    """x + epsilon sign(gradient of the loss at x).

    Args:
        loss: inputs -> a number, the sum over examples of each one's own loss, so that every
            example is attacked for itself.
        x: inputs.
        epsilon: distance, in the unit of x, >= 0; or one for each feature, as an array that
            broadcasts against x. Where the gradient is 0, x stays.
        low, high: range of valid inputs, for example of pixels.

    Raises:
        ValueError: a distance below 0, or not finite.

    >>> fgsm(lambda x: jnp.sum(x**2), jnp.array([1.0, -2.0, 0.0]), 0.5)
    Array([ 1.5, -2.5,  0. ], dtype=float32)
    """
    (epsilon,) = _distances("fgsm", x, epsilon=epsilon)
    return _clipped(x + epsilon * jnp.sign(jax.grad(loss)(x)), low, high)


def pgd(
    loss: Loss,
    x: Float[Array, "..."],
    epsilon: float | Array,
    *,
    step: float | Array,
    steps: int,
    key: Key[Array, ""] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Float[Array, "..."]:
    """`steps` steps of length `step` along the gradient's sign, each clipped to epsilon around x.

    Reaches the distance only if steps * step >= epsilon (or from a random start).

    Args:
        loss, x, epsilon, low, high: as for `fgsm`.
        step: length, as epsilon.
        key: start at a uniform point within the distance; None starts at x.

    Raises:
        ValueError: a distance below 0, or not finite; `steps` below 1.

    >>> pgd(lambda x: jnp.sum(x**2), jnp.array([1.0, -2.0]), 0.3, step=0.125, steps=9)
    Array([ 1.3, -2.3], dtype=float32)
    """
    epsilon, step = _distances("pgd", x, epsilon=epsilon, step=step)
    if steps < 1:
        raise ValueError(f"pgd: steps={steps}: at least 1")
    x = start = jnp.asarray(x)
    if key is not None:
        start = x + epsilon * jax.random.uniform(key, x.shape, x.dtype, -1, 1)

    def ascend(_, moved):
        moved = moved + step * jnp.sign(jax.grad(loss)(moved))
        return _clipped(jnp.clip(moved, x - epsilon, x + epsilon), low, high)

    return lax.fori_loop(0, steps, ascend, _clipped(start, low, high))


def _clipped(x: Array, low: float | None, high: float | None) -> Array:
    return x if low is None and high is None else jnp.clip(x, low, high)


def _distances(who: str, x: Array, **distances: float | Array) -> list[Array]:
    """In the dtype of x, lest half-precision inputs come back as others."""
    for name, value in distances.items():
        known = not isinstance(value, jax.core.Tracer)
        if known and not (np.isfinite(value) & (np.asarray(value) >= 0)).all():
            raise ValueError(f"{who}: {name}={value}: a distance is finite and not negative")
    return [jnp.asarray(value, jnp.result_type(x)) for value in distances.values()]
