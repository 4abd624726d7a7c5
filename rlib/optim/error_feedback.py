"""Error feedback for compressed gradients: EControl, and EC, EF21 and EF21-SGDM from one core.

Gao, Islamov and Stich, "EControl: Fast Distributed Optimization with Compression and Error
Control", arXiv 2311.05645. Every worker i keeps an error e and an estimate h of its gradient:

    D = C(eta e + g - h)                     the only message
    e <- e + g - h - D                       no eta here, and the old h
    h <- h + D,   mean h <- mean h + mean D  the update is the new mean h

| | eta | h | g |
|---|---|---|---|
| EControl | about delta | moves | gradient |
| EF21 (Richtarik et al. 2021, arXiv 2106.05203) | 0 | moves | gradient |
| EF21-SGDM (Fatkhullin et al. 2023, arXiv 2305.15155) | 0 | moves | its moving average |
| EC or EF14 (Seide et al. 2014) | 1 | stays 0 | gradient |

Deviations

| | paper | official code | here |
|---|---|---|---|
| eta | c delta with c = 1/400 in theory, tuned in practice | none published | delta of the codec |
| first estimate | h_0 = g_0, sent uncompressed | none published | that; or "compressed", "zeros" |
| C of | the whole vector | none published | `scope="global"`, or each tensor |
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int

from rlib.collectives import gathered_mean, require_local
from rlib.compression import Codec
from rlib.parallel import PerWorker

Tree = Any
Init = Literal["grad", "compressed", "zeros"]
Scope = Literal["global", "leaf"]


class ErrorFeedbackState(NamedTuple):
    """State of the transformations of this module.

    Fields:
        count: steps done.
        error: e, the worker's sum of gradients minus what it sent.
        estimate: h, the worker's estimate of its gradient.
        mean_estimate: the mean of h over workers, the same on all.
        average: moving average of the worker's gradients (EF21-SGDM); empty otherwise.
    """

    count: Int[Array, ""]  # type: ignore[assignment]
    error: PerWorker
    estimate: PerWorker
    mean_estimate: Tree
    average: PerWorker


def _feedback(
    codec: Codec,
    who: str,
    *,
    eta: float | Literal["delta"],
    moves: bool,
    momentum: float | None,
    axis_name: str | None,
    init: Init,
    scope: Scope,
    seed: int,
) -> optax.GradientTransformationExtraArgs:
    if init not in ("grad", "compressed", "zeros"):
        raise ValueError(f'{who}: init={init!r}: choose "grad", "compressed" or "zeros"')
    if eta != "delta" and not isinstance(eta, int | float):
        raise ValueError(f'{who}: eta={eta!r}: give a number or "delta"')

    def zeros(params: Tree) -> Tree:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)

    def init_fn(params: Tree) -> ErrorFeedbackState:
        return ErrorFeedbackState(
            count=jnp.zeros((), jnp.int32),
            error=PerWorker(zeros(params)),
            estimate=PerWorker(zeros(params)),
            mean_estimate=zeros(params),
            average=PerWorker(zeros(params) if momentum is not None else ()),
        )

    def gain(tree: Tree) -> float:
        if eta != "delta":
            return float(eta)
        leaves = jax.tree.leaves(tree)
        shapes = (
            [(sum(x.size for x in leaves),)] if scope == "global" else [x.shape for x in leaves]
        )
        deltas = [codec.contraction(shape) for shape in shapes]
        if None in deltas:
            raise ValueError(f"{who}: {codec} is no contraction, so eta must be given")
        return min(delta for delta in deltas if delta is not None)

    def key_of(count: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), count)
        return key if axis_name is None else jax.random.fold_in(key, lax.axis_index(axis_name))

    def exchange(message: Tree, count: Array) -> tuple[Tree, Tree]:
        return gathered_mean(codec, key_of(count), message, axis_name, scope=scope)

    def first(grads: Tree, state: ErrorFeedbackState) -> ErrorFeedbackState:
        """h_0 of the first gradient."""
        if not moves or init == "zeros":
            return state
        if init == "compressed":
            mean, own = exchange(grads, jnp.int32(-1))
        else:
            mean, own = grads if axis_name is None else lax.pmean(grads, axis_name), grads
        return state._replace(estimate=PerWorker(own), mean_estimate=mean)

    def update_fn(
        updates: Tree,
        state: ErrorFeedbackState,
        params: Tree = None,
        *,
        stage: str | None = None,
        **_: Any,
    ) -> tuple[Tree, ErrorFeedbackState]:
        if axis_name is not None:
            require_local(updates, axis_name, who)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        if stage == "first":
            state = first(grads, state)
        elif stage is None:
            state = lax.cond(state.count == 0, first, lambda _, s: s, grads, state)
        elif stage != "rest":
            raise ValueError(f'{who}: stage={stage!r}: choose "first" or "rest"')
        average: Tree = ()
        if momentum is not None:
            fresh = state.count == 0
            average = jax.tree.map(
                lambda a, g: jnp.where(fresh, g, (1 - momentum) * a + momentum * g),
                state.average.value,
                grads,
            )
            grads = average
        strength = gain(grads)
        error, estimate = state.error.value, state.estimate.value
        offered = jax.tree.map(lambda e, g, h: strength * e + g - h, error, grads, estimate)
        mean, own = exchange(offered, state.count)
        error = jax.tree.map(lambda e, g, h, d: e + g - h - d, error, grads, estimate, own)
        new_mean = jax.tree.map(jnp.add, state.mean_estimate, mean)
        if moves:
            estimate = jax.tree.map(jnp.add, estimate, own)
        scaled = jax.tree.map(lambda g, m: m.astype(g.dtype), updates, new_mean)
        return scaled, ErrorFeedbackState(
            count=state.count + 1,
            error=PerWorker(error),
            estimate=PerWorker(estimate),
            mean_estimate=new_mean if moves else state.mean_estimate,
            average=PerWorker(average),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_econtrol(
    codec: Codec,
    eta: float | Literal["delta"] = "delta",
    *,
    axis_name: str | None = None,
    init: Init = "grad",
    scope: Scope = "global",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Replace local gradients by EControl's mean estimate; chain a learning rate or momentum after.

    With a constant learning rate lr and plain SGD after it, x_t - lr mean e_t is exactly where SGD
    on the uncompressed gradients seen would stand.

    Args:
        codec: C, a contraction.
        eta: gain of the error; "delta" takes the codec's contraction constant, of all of a
            device's shards as one vector or of its worst tensor, by `scope`. Above 2 to 3 times
            delta it diverges; at 0 it is EF21.
        axis_name: axis of the workers; None for one worker.
        init: first estimate: "grad", the first gradient, sent uncompressed (the step that does so
            is `stage="first"`, later ones "rest"; without `stage` one program holds both),
            "compressed", C of it, or "zeros". A first step that `skip_nonfinite` skipped must be
            done again: go on to "rest" when `count` is not 0.
        scope: C of the whole gradient as one vector, or of each tensor: two algorithms.
        seed: for codecs that draw.

    Raises:
        ValueError: another `init` or `eta`; while tracing: no `eta` for a codec that is no
            contraction, an axis that is not bound, gradients that are averaged already.

    >>> from rlib.compression import TopK
    >>> tx = scale_by_econtrol(TopK(k=1), eta=0.5, init="zeros")
    >>> update, state = tx.update(jnp.array([4.0, 2.0]), tx.init(jnp.zeros(2)))
    >>> tx.update(jnp.array([4.0, 2.0]), state)[0]  # 3: half the error, 1, with the gradient's 2
    Array([4., 3.], dtype=float32)
    """
    return _feedback(
        codec,
        "scale_by_econtrol",
        eta=eta,
        moves=True,
        momentum=None,
        axis_name=axis_name,
        init=init,
        scope=scope,
        seed=seed,
    )


def scale_by_ef21(
    codec: Codec,
    momentum: float | None = None,
    *,
    axis_name: str | None = None,
    init: Init = "grad",
    scope: Scope = "global",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """EF21; with `momentum` a it is EF21-SGDM, on v = (1 - a) v + a g. Arguments as EControl's.

    Raises:
        ValueError: as EControl's.

    >>> from rlib.compression import TopK
    >>> tx = scale_by_ef21(TopK(k=1), init="zeros")
    >>> update, state = tx.update(jnp.array([4.0, 2.0]), tx.init(jnp.zeros(2)))
    >>> update, tx.update(jnp.array([4.0, 2.0]), state)[0]
    (Array([4., 0.], dtype=float32), Array([4., 2.], dtype=float32))
    """
    return _feedback(
        codec,
        "scale_by_ef21",
        eta=0.0,
        moves=True,
        momentum=momentum,
        axis_name=axis_name,
        init=init,
        scope=scope,
        seed=seed,
    )


def scale_by_error_compensation(
    codec: Codec,
    *,
    axis_name: str | None = None,
    scope: Scope = "global",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """EC (EF14): D = C(e + g), e <- e + g - D, the update is mean D. Arguments as EControl's.

    Raises:
        ValueError: as EControl's.

    >>> from rlib.compression import TopK
    >>> tx = scale_by_error_compensation(TopK(k=1))
    >>> update, state = tx.update(jnp.array([4.0, 3.0]), tx.init(jnp.zeros(2)))
    >>> update, tx.update(jnp.array([4.0, 3.0]), state)[0]
    (Array([4., 0.], dtype=float32), Array([0., 6.], dtype=float32))
    """
    return _feedback(
        codec,
        "scale_by_error_compensation",
        eta=1.0,
        moves=False,
        momentum=None,
        axis_name=axis_name,
        init="zeros",
        scope=scope,
        seed=seed,
    )


def econtrol(
    learning_rate: optax.ScalarOrSchedule,
    codec: Codec,
    eta: float | Literal["delta"] = "delta",
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """SGD on EControl's estimate; arguments as `scale_by_econtrol`.

    Example:
        >>> from rlib.compression import TopK
        >>> tx = econtrol(0.1, TopK(k=1), eta=0.5, init="zeros")
        >>> x, state = jnp.zeros(3), tx.init(jnp.zeros(3))
        >>> for _ in range(4):
        ...     updates, state = tx.update(jnp.array([4.0, 2.0, 1.0]), state)
        ...     x = x + updates
        >>> x
        Array([-1.6, -0.8, -0.4], dtype=float32)
    """
    return optax.chain(
        scale_by_econtrol(codec, eta, **kwargs), optax.scale_by_learning_rate(learning_rate)
    )
