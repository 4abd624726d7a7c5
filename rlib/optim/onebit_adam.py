"""1-bit Adam: momentum in one bit a coordinate, once the second moment is stable.

Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
Speed", arXiv 2102.02888.

Deviations

| | paper | official code | here |
|---|---|---|---|
| bias correction | none | accepted, ignored | none |
| padding | not said | counted in scales, filled with signs | not counted, 0 |
| coordinates with v = 0 | not said | a mask that the user gives | mask v > v_floor, from v itself |
| first step after start | as others | gradient dropped, dummy exchange | as others |
| errors in a checkpoint | not said | reset | kept; another number of workers by policy |
| messages | not said | one exchange a tensor | one exchange for all tensors, a scale a tensor |
| end of warm-up | stability of v, or a share | a number of steps | either |
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Float, Int

from rlib.collectives import (
    chunk_length,
    compressed_mean,
    require_axis,
    require_local,
    rounded_mean,
    vary,
)
from rlib.compression import count_true
from rlib.optim.guards import sum_over_shards
from rlib.parallel import PerWorker

Tree = Any
Stage = Literal["warmup", "compressed"]


class OnebitAdamState(NamedTuple):
    """State of `scale_by_onebit_adam`.

    Fields:
        count: steps done.
        compressed: steps since the end of the warm-up.
        m: momentum at the end of the warm-up, the same on all workers. From then on nobody needs it
            apart from `carried`. (Tensors that are not compressed keep theirs here.)
        v: second moment; constant in the compressed stage.
        v_norms: sum over parameters of v / (1 - b2^t) after each of the last steps of the warm-up,
            oldest first; 0 before there were so many.
        carried: what a worker adds to its next (1 - b1) gradient, like the parameters: b1 times the
            compressed momentum, and what its last message left out. No meaning where v <= v_floor.
        server_error: what a worker, as the server of its chunk of each tensor, has left out; None
            without `axis_name`.
        counts: how many coordinates of a tensor travel, f32[1] each, counted in the warm-up.
    """

    count: Int[Array, ""]  # type: ignore[assignment]
    compressed: Int[Array, ""]
    m: Tree
    v: Tree
    v_norms: Float[Array, " window"]
    carried: PerWorker
    server_error: PerWorker
    counts: PerWorker


def scale_by_onebit_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    axis_name: str | None = None,
    warmup_steps: int | None = None,
    v_floor: float | None = 1e-10,
    scale: Literal["l2", "l1"] = "l2",
    compress: Tree | Callable[[Tree], Tree] | None = None,
    error_feedback: bool = True,
    window: int = 100,
    warmup_dtype: Dtype = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """m / (sqrt(v) + eps) with m exchanged in full while v settles, then in one bit a coordinate.

    Give it local gradients, inside `shard_map` or `vmap` over `axis_name` (`make_train_step` with
    `worker_axis=` does). `update(..., stage="warmup" | "compressed")` says which stage to compile;
    without `stage`, `warmup_steps` decides inside the program, which then holds both stages'
    collectives. Before it in a chain: what acts on local gradients and asks the same of all
    workers (`rlib.optim.clip_by_global_norm`, `skip_nonfinite`). After it: anything.

    Args:
        b1, b2, eps: as Adam's; eps is added outside the root, and nothing corrects the bias.
        axis_name: axis of the workers; None for one worker.
        warmup_steps: length of the warm-up where `stage` is not given.
        v_floor: in the compressed stage coordinates with v <= v_floor are left alone: one bit
            cannot say 0, and m / sqrt(v) would explode. In units of squared gradients; None leaves
            none alone, where every coordinate has gradients, and is faster on a CPU.
        scale: magnitude of the signs; "l2" is published, "l1" is a contraction.
        compress: booleans like the parameters, or a function that makes such of the gradients
            (of a device's shards: go by names, not by sizes): False keeps full Adam, with an
            uncompressed mean, for a tensor. All True if None.
        error_feedback: False forgets what messages leave out; for ablation.
        warmup_dtype: in which gradients travel where they are averaged in full: float32, or a
            dtype of two bytes.
        window: over how many steps the stability of v is measured (`second_moment_stability`).

    Whoever ends the warm-up by hand calls `check_second_moment` first: a tensor without second
    moment would stand still from then on. The stages follow each other once: a second warm-up
    starts from the momentum at the end of the first, and without errors. `v_floor` stays.

    Raises:
        ValueError: another scale, a window below 1, a `warmup_dtype` of another width; while
            tracing: `compress` of another structure, an axis that is not bound, gradients that
            are averaged already, neither stage nor `warmup_steps`.

    >>> tx = scale_by_onebit_adam(warmup_steps=1)
    >>> state = tx.init(jnp.zeros(2))
    >>> for _ in range(2):
    ...     update, state = tx.update(jnp.array([3.0, -4.0]), state)
    >>> update * jnp.sqrt(state.v)  # 0.19 times the gradient, as its root mean square and signs
    Array([ 0.67..., -0.67...], dtype=float32)
    """
    if scale not in ("l2", "l1"):
        raise ValueError(f'scale_by_onebit_adam: scale={scale!r}: choose "l2" or "l1"')
    if window < 1:
        raise ValueError(f"scale_by_onebit_adam: window={window} is below 1")
    if jnp.dtype(warmup_dtype).itemsize not in (2, 4):
        raise ValueError(f"scale_by_onebit_adam: warmup_dtype {jnp.dtype(warmup_dtype)}")

    def chosen(tree: Tree) -> list[bool]:
        flags = compress(tree) if callable(compress) else compress
        if flags is None:
            return [True] * len(jax.tree.leaves(tree))
        given, wanted = str(jax.tree.structure(flags)), str(jax.tree.structure(tree))
        if given != wanted:
            raise ValueError(
                f"scale_by_onebit_adam: compress is {given}, the gradients are {wanted}"
            )
        return [bool(flag) for flag in jax.tree.leaves(flags)]

    def init(params: Tree) -> OnebitAdamState:
        require_axis(axis_name, "scale_by_onebit_adam")
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        server = None
        if axis_name is not None:
            lengths = lambda x: chunk_length(x.size, lax.axis_size(axis_name))
            server = jax.tree.map(lambda x: jnp.zeros(lengths(x), jnp.float32), params)
        return OnebitAdamState(
            count=jnp.zeros((), jnp.int32),
            compressed=jnp.zeros((), jnp.int32),
            m=zeros(),
            v=zeros(),
            v_norms=jnp.zeros(window + 1, jnp.float32),
            carried=PerWorker(zeros()),
            server_error=PerWorker(server, "concatenate"),
            counts=PerWorker(jax.tree.map(lambda x: jnp.zeros(1, jnp.float32), params)),
        )

    def mean(tree: Tree) -> Tree:
        if axis_name is None:
            return tree
        if jnp.dtype(warmup_dtype) == jnp.float32:
            return lax.pmean(tree, axis_name)
        return rounded_mean(tree, axis_name, warmup_dtype)

    def moments(grads: Tree, m: Tree, v: Tree) -> tuple[Tree, Tree]:
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
        return m, jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, grads)

    def own(tree: Tree) -> Tree:
        """Typed as a worker's own, as the state's `PerWorker` is, though all have the same."""
        return tree if axis_name is None else vary(tree, axis_name)

    def warm(grads: Tree, state: OnebitAdamState) -> tuple[Tree, OnebitAdamState]:
        m, v = moments(mean(grads), state.m, state.v)
        correction = 1 - b2 ** (state.count + 1).astype(jnp.float32)
        norm = sum_over_shards([jnp.sum(x) for x in jax.tree.leaves(v)], axis_name) / correction
        v_norms = jnp.append(state.v_norms[1:], norm)
        kept = lambda x: x.size if v_floor is None else count_true(x > v_floor)
        counts = own(jax.tree.map(lambda x: jnp.full(1, kept(x), jnp.float32), v))
        return m, state._replace(
            compressed=jnp.zeros_like(state.compressed),
            m=m,
            v=v,
            v_norms=v_norms,
            counts=PerWorker(counts),
        )

    def compressed(grads: Tree, state: OnebitAdamState) -> tuple[Tree, OnebitAdamState]:
        structure: Any = jax.tree.structure(grads)
        flags = chosen(grads)
        trees = (grads, state.m, state.v, state.carried.value, state.counts.value)
        g, m, v, carried, counts = map(structure.flatten_up_to, trees)
        server = state.server_error.value
        first = state.compressed == 0
        served = None
        if server is not None:
            served = [jnp.where(first, 0, x) for x in structure.flatten_up_to(server)]
        momentum = list(m)
        in_bits = [i for i, flag in enumerate(flags) if flag]
        exchanged = compressed_mean(
            [(1 - b1) * g[i] for i in in_bits],
            [jnp.where(first, b1 * m[i], carried[i]) for i in in_bits],
            None if served is None else [served[i] for i in in_bits],
            axis_name,
            mask=None if v_floor is None else [v[i] > v_floor for i in in_bits],
            counts=None if v_floor is None else [jnp.maximum(counts[i][0], 1) for i in in_bits],
            scale=scale,
        )
        for place, i in enumerate(in_bits):
            mean_i = exchanged.mean[place]
            momentum[i] = mean_i if v_floor is None else jnp.where(v[i] > v_floor, mean_i, 0)
            carried[i] = own(b1 * mean_i)
            if error_feedback:
                carried[i] += exchanged.worker_error[place]
                if served is not None:
                    served[i] = exchanged.server_error[place]
        in_full = [i for i, flag in enumerate(flags) if not flag]
        full = mean([g[i] for i in in_full])
        for g_i, i in zip(full, in_full, strict=True):
            m[i], v[i] = moments(g_i, m[i], v[i])
            momentum[i] = m[i]
        return structure.unflatten(momentum), state._replace(
            compressed=state.compressed + 1,
            m=structure.unflatten(m),
            v=structure.unflatten(v),
            carried=PerWorker(structure.unflatten(carried)),
            server_error=PerWorker(
                None if served is None else structure.unflatten(served), "concatenate"
            ),
        )

    def update(
        updates: Tree,
        state: OnebitAdamState,
        params: Tree = None,
        *,
        stage: Stage | None = None,
        **_: Any,
    ) -> tuple[Tree, OnebitAdamState]:
        if axis_name is not None:
            require_local(updates, axis_name, "scale_by_onebit_adam")
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        if stage is None:
            if warmup_steps is None:
                raise ValueError("scale_by_onebit_adam: give warmup_steps, or stage to update")
            m, new = lax.cond(state.count < warmup_steps, warm, compressed, grads, state)
        elif stage in ("warmup", "compressed"):
            m, new = (warm if stage == "warmup" else compressed)(grads, state)
        else:
            raise ValueError(f'stage={stage!r}: choose "warmup" or "compressed"')
        new = new._replace(count=state.count + 1)
        scaled = jax.tree.map(
            lambda g, m, v: (m / (jnp.sqrt(v) + eps)).astype(g.dtype), updates, m, new.v
        )
        return scaled, new

    return optax.GradientTransformationExtraArgs(init, update)


def onebit_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """x <- x - lr (m / (sqrt(v) + eps) + weight_decay x); others as `scale_by_onebit_adam`.

    Example:
        >>> tx = onebit_adam(1e-2, warmup_steps=2)
        >>> params = {"w": jnp.ones(3)}
        >>> state = tx.init(params)
        >>> for _ in range(4):
        ...     updates, state = tx.update({"w": params["w"]}, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(params["w"][0] < 1)
        True
    """
    return optax.chain(
        scale_by_onebit_adam(b1, b2, eps, **kwargs),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def second_moment_stability(opt_state: Tree) -> float:
    """||v_{t - window}||_1 / ||v_t||_1 with corrected bias; 0 before the warm-up is that long.

    Near 1 the second moment is stable and the warm-up may end; the paper's rule asks for 0.96 (its
    window is 1 / (1 - b2) steps, without correction). 0 also while a tensor has no second moment:
    compressing would start from nothing. A host transfer: ask at logging steps.

    Raises:
        ValueError: a second moment is not finite.

    >>> tx = scale_by_onebit_adam(window=1)
    >>> state = tx.init(jnp.zeros(2))
    >>> for gradient in (3.0, 4.0):
    ...     _, state = tx.update(jnp.full(2, gradient), state, stage="warmup")
    >>> round(second_moment_stability(state), 3)  # 9 / (0.4998 * 9 + 0.5002 * 16)
    0.72
    """
    state = _find(opt_state)
    if any(total == 0 for total in _totals(state).values()):
        return 0.0
    norms = np.asarray(state.v_norms)
    norms = norms.reshape(-1, norms.shape[-1])[0]  # one row a worker under vmap
    return float(norms[0] / norms[-1]) if norms[-1] > 0 else 0.0


def check_second_moment(opt_state: Tree) -> None:
    """Call before compressing, where the warm-up is ended by hand. A host transfer.

    Raises:
        ValueError: a second moment is not finite, or zero throughout a tensor, which would stand
            still from then on, or no warm-up step has counted what travels.

    >>> check_second_moment(scale_by_onebit_adam().init({"w": jnp.zeros(2)}))
    Traceback (most recent call last):
    ValueError: the second moment of ['w'] is 0: the warm-up must go on
    """
    state = _find(opt_state)
    counts = [float(jnp.max(count)) for count in jax.tree.leaves(state.counts)]
    for (name, total), count in zip(_totals(state).items(), counts, strict=True):
        if total == 0:
            raise ValueError(f"the second moment of {name} is 0: the warm-up must go on")
        if count == 0:
            raise ValueError(f"no coordinate of {name} travels: do a warm-up step with this state")


def _totals(state: OnebitAdamState) -> dict[str, float]:
    totals = {
        jax.tree_util.keystr(path): float(jnp.sum(v))
        for path, v in jax.tree_util.tree_leaves_with_path(state.v)
    }
    for name, total in totals.items():
        if not np.isfinite(total):
            raise ValueError(f"the second moment of {name} sums to {total}")
    return totals


def _find(opt_state: Tree) -> OnebitAdamState:
    is_state = lambda node: isinstance(node, OnebitAdamState)
    found = [n for n in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(n)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} states of 1-bit Adam in this optimiser state, not one")
    return found[0]
