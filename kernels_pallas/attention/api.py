"""`flash_attention`: exact attention in memory that grows with the length, on CPUs, GPUs and TPUs.

FlashAttention-2 (arXiv 2307.08691): scores are made and used tile by tile and never stored; the
gradient makes them again from the queries' logarithms of sums, kept beside the arguments.

| paper | official code | here |
|---|---|---|
| Algorithm 1, line 10: times exp(m_old - m_new)^-1 | without the inverse | without |
| L of a query that sees no key: none | +inf | -inf, neutral when parts are merged |
| masks of unequal lengths | bottom right, since 2.1 | that, or top left |
| dQ by atomic additions | those, or `deterministic` | one order of every sum |
| no bias | ALiBi slopes, no gradient | any additive bias, with gradient |
| no gradient of L | none | differentiable: parts can be trained |
| dropout | from a counter | none |

Layouts are those of `jax.nn.dot_product_attention`, which aligns masks of unequal lengths top left.
"""

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas.attention import mosaic_gpu, mosaic_tpu, reference, xla
from kernels_pallas.attention.problem import Band, Problem, varying_like

#: In the order of choice; each says why it cannot serve a problem.
IMPLEMENTATIONS: Mapping[str, ModuleType] = {
    "mosaic_gpu": mosaic_gpu,
    "mosaic_tpu": mosaic_tpu,
    "xla": xla,
    "reference": reference,
}
_ALIGNMENTS = ("bottom_right", "top_left")
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_OPTIONS = {
    "scale": None, "causal": False, "causal_align": _ALIGNMENTS[0], "window": None, "softcap": None,
}  # fmt: skip
Axes = str | tuple[str, ...] | None


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    causal: bool = False,
    causal_align: str = "bottom_right",
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(cap(scale q k^T) + bias, over the keys that are seen) v.

    Works under `jit`, `grad`, `vmap`, `checkpoint` and `shard_map`. Arrays whose types say that
    their batch or heads are split over a mesh (explicit axes) are attended where they are; for axes
    that the compiler manages see `sharded_flash_attention`. There is no forward mode, and second
    gradients are of what has no mask only (`implementation="reference"` has all).

    Args:
        q: queries [B, T, N, D], or [T, N, D].
        k, v: [B, S, K, D] and [B, S, K, E], or without B; query head n reads head n // (N / K).
        bias: added to the scores; broadcasts to [B, N, T, S]. -inf, or -1e29 and less, hides a key.
            On a TPU its gradient takes memory as the scores do.
        segment_ids: integers of 32 bits [B, T], or two arrays [B, T] and [B, S]; a query sees the
            keys of its own segment.
        scale: of the scores, 1 / sqrt(D) if None.
        causal: a query sees no later key.
        causal_align: which key is at the place of a query where T != S: the last query's is the
            last key ("bottom_right"), or the first one's the first ("top_left").
        window: (left, right): how far before and after its place a query sees, None for any
            distance; a number is both.
        softcap: scores s become softcap tanh(s / softcap).
        implementation: a name in `IMPLEMENTATIONS`; None for the first that can serve here.
        return_lse: also give log sum exp of the scores of each query, which is differentiable.

    Returns:
        [B, T, N, E] in the dtype of q; with `return_lse` also [B, N, T] in float32 (float64 of
        float64). A query that sees no key has output 0, -inf, and gradients 0.

    Raises:
        ValueError: shapes, dtypes or options that do not fit; names the argument.
        NotImplementedError: the implementation asked for cannot serve, and why.

    >>> q = k = jnp.zeros((1, 3, 1, 1))
    >>> v = jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
    >>> flash_attention(q, k, v, causal=True).ravel()
    Array([1., 2., 4.], dtype=float32)
    """
    q, k, v = map(jnp.asarray, (q, k, v))
    if q.ndim == 3:
        more = lambda ids: jax.tree.map(lambda x: jnp.asarray(x)[None], ids)
        result = flash_attention(
            q[None], k[None], v[None], bias=bias, segment_ids=more(segment_ids), scale=scale,
            causal=causal, causal_align=causal_align, window=window, softcap=softcap,
            implementation=implementation, return_lse=return_lse,
        )  # fmt: skip
        return jax.tree.map(lambda x: x[0], result)
    return _flash_attention(
        q, k, v, bias, segment_ids, implementation, return_lse, split=None,
        scale=scale, causal=causal, causal_align=causal_align, window=window, softcap=softcap,
    )  # fmt: skip


def sharded_flash_attention(
    *, batch: Axes = None, heads: Axes = None, mesh: jax.sharding.Mesh | None = None
) -> Callable[..., Any]:
    """`flash_attention` of arrays whose batch and heads the compiler splits over mesh axes.

    A loop over tiles is opaque to the compiler's propagation of shardings, so that each device
    would compute everything. Here each one attends to its own batch and heads, and nothing is sent,
    if the arrays are split as said: keys and values by heads too if their number divides, else
    whole, and each device takes those that its queries read.

    Args:
        batch, heads: names of mesh axes, or tuples of them. What the mesh lacks, what is manual
            already (inside `shard_map`), and what the batch or the heads do not divide by, is left
            out: the compiler does what it can.
        mesh: the one of the context (`jax.set_mesh`), which it must be if there is one, or None for
            that; without any, nothing is split. Inside `shard_map` always that of the context.

    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    >>> attend = sharded_flash_attention(batch="data", mesh=mesh)
    >>> q = jnp.ones((2, 3, 1, 4))
    >>> jax.jit(attend)(q, q, q).shape
    (2, 3, 1, 4)
    """

    def attend(
        q, k, v, *, bias=None, segment_ids=None, implementation=None, return_lse=False, **options
    ):  # fmt: skip
        q, k, v = map(jnp.asarray, (q, k, v))
        context = jax.sharding.get_abstract_mesh()
        own = context if mesh is None or context.manual_axes else mesh
        if q.ndim == 3:
            given = {"bias": bias, "segment_ids": segment_ids, "implementation": implementation}
            return flash_attention(q, k, v, **given, return_lse=return_lse, **options)
        split = Split(own, (), ())
        split = Split(own, split.that_fit(batch, q.shape[0]), split.that_fit(heads, q.shape[2]))
        return _flash_attention(
            q, k, v, bias, segment_ids, implementation, return_lse, split=split,
            **_OPTIONS | options,
        )  # fmt: skip

    return attend


def implementations(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> dict[str, str]:
    """Why `flash_attention` would or would not use each implementation for these arguments.

    Args:
        q, k, v: arrays, or their `jax.eval_shape`.
        options: those of `flash_attention`.

    Returns:
        By name, in the order of choice: "chosen", "can serve", or why it cannot.

    >>> q = jax.ShapeDtypeStruct((1, 8, 1, 4), jnp.float32)
    >>> implementations(q, q, q)["reference"]
    'can serve'
    """
    found: dict[str, str] = {}
    names = ("bias", "segment_ids")
    arrays = {name: options.pop(name) for name in names if options.get(name) is not None}
    asked = options.pop("implementation", None)
    options = {name: x for name, x in options.items() if name not in (*names, "return_lse")}

    def look(q, k, v, arrays):
        if q.ndim == 3:
            q, k, v = q[None], k[None], v[None]
        _checked(q, k, v, arrays.get("bias"), arrays.get("segment_ids"))
        problem = _problem(q, k, **_OPTIONS | options)
        reasons = {name: _reason(name, None, problem, q, k, v) for name in IMPLEMENTATIONS}
        first = next(name for name, reason in reasons.items() if reason is None)
        for name, reason in reasons.items():
            chosen = name == (asked or first) and reason is None
            found[name] = "chosen" if chosen else reason or "can serve"

    jax.eval_shape(look, q, k, v, arrays)
    return found


# The differentiable function


def _flash_attention(q, k, v, bias, ids, implementation, return_lse, *, split, **options):
    bias, ids = _checked(q, k, v, bias, ids)
    problem = _problem(q, k, **options)
    given = (q, k, v, bias, *(ids or (None, None)))
    split, given = _with_explicit(split, given)
    name = _chosen(implementation, split, problem, q, k, v)
    if split is not None and not (split.batch or split.heads):
        split = None
    if name == "reference" and split is None:
        out, lse = reference.forward(problem, *given)
    else:
        out, lse = _attention((problem, name, split), *varying_like(given, given))
    return (out, lse) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, *given):
    return _forward(how, *given)


# Compiled, so that calls outside of `jit` find their programs again.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _forward(how, *given):
    problem, name, split = how
    attend = functools.partial(IMPLEMENTATIONS[name].forward, problem)
    return (attend if split is None else split.forward(attend))(*given)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _backward(how, bias_gradient, *given):
    problem, name, split = how
    pull = functools.partial(IMPLEMENTATIONS[name].backward, problem, bias_gradient=bias_gradient)
    return (pull if split is None else split.backward(pull))(*given)


def _attention_fwd(how, *given):
    values = jax.tree.map(lambda x: x.value, given)
    out, lse = _attention(how, *values)
    bias = given[3]
    # A flag in the structure of the tree, as residuals are arrays.
    wants_bias = () if bias is not None and bias.perturbed else None
    return (out, lse), (values, out, lse, wants_bias)


def _attention_bwd(how, residuals, gradients):
    values, out, lse, wants_bias = residuals
    zeros = jax.custom_derivatives.SymbolicZero
    dout, dlse = (
        varying_like(jnp.zeros_like(x), x) if isinstance(g, zeros) else g
        for g, x in zip(gradients, (out, lse), strict=True)
    )
    # What depends on a query that sees nothing depends on no argument.
    dlse = jnp.where(lse == -jnp.inf, 0, dlse)
    dq, dk, dv, dbias = _backward(how, wants_bias is not None, *values, out, lse, dout, dlse)
    if dbias is None and values[3] is not None:
        dbias = jnp.zeros_like(values[3])
    return dq, dk, dv, dbias, None, None


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


# Over a mesh


def _names(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


class Split(NamedTuple):
    """Mesh axes that the batch and the heads are split over; each device attends to its own.

    Each rule of the derivative is a `shard_map` of its own: nothing has to be derived through one.
    """

    mesh: Any
    batch: tuple[str, ...]
    heads: tuple[str, ...]

    def parts(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[a] for a in axes)

    def that_fit(self, axes: Axes, size: int) -> tuple[str, ...]:
        """Those of the axes that the compiler manages and that a size divides by."""
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        fit = tuple(a for a in _names(axes) if kinds.get(a) == AxisType.Auto)
        return fit if size % self.parts(fit) == 0 else ()

    def _keys_split(self, kv: int) -> bool:
        return kv % self.parts(self.heads) == 0

    def _specs(self, given) -> tuple[P | None, ...]:
        """Of q, k, v, bias and segments."""
        _, k, _, bias, q_ids, _ = given
        b, h = self.batch or None, self.heads or None
        keys = P(b, None, h if self._keys_split(k.shape[2]) else None)
        of_bias = None
        if bias is not None:
            of_bias = P(b if bias.shape[0] > 1 else None, h if bias.shape[1] > 1 else None)
        ids = None if q_ids is None else P(b)
        return P(b, None, h), keys, keys, of_bias, ids, ids

    def _rows(self) -> tuple[P, P]:
        """Of outputs and of logarithms of sums."""
        b, h = self.batch or None, self.heads or None
        return P(b, None, h), P(b, h)

    def place(self, given):
        """Bring arrays of explicit types to this split."""
        put = lambda x, spec: jax.sharding.reshard(x, jax.NamedSharding(self.mesh, spec))
        specs = self._specs(given)
        return tuple(None if x is None else put(x, s) for x, s in zip(given, specs, strict=True))

    def _over(self, function, in_specs, out_specs):
        # Where a scan is derived, JAX carries constants of a body out of it, and those of a
        # shard_map inside another one do not lower; out of a checkpointed function it does not.
        return jax.shard_map(
            jax.checkpoint(function, prevent_cse=False),
            mesh=self.mesh,
            axis_names=frozenset((*self.batch, *self.heads)),
            in_specs=in_specs,
            out_specs=out_specs,
        )

    def _cut(self, q, n, kv):
        """Of keys that are whole on each device, the heads that its queries read."""
        if self._keys_split(kv):
            return lambda k: k
        heads = q.shape[2]
        first = jax.lax.axis_index(self.heads) * heads
        if self.parts(self.heads) % kv == 0:
            return lambda k: jax.lax.dynamic_slice_in_dim(k, first // (n // kv), 1, axis=2)
        return lambda k: jnp.take(k, (first + jnp.arange(heads)) // (n // kv), axis=2)

    def forward(self, attend):
        def over(*given):
            n, kv = given[0].shape[2], given[1].shape[2]

            def local(q, *rest):
                k, v, *rest = varying_like(rest, q)
                cut = self._cut(q, n, kv)
                return attend(q, cut(k), cut(v), *rest)

            return self._over(local, self._specs(given), self._rows())(*given)

        return over

    def backward(self, pull):
        def over(*given):
            q, k, _, bias = given[:4]
            n, kv = q.shape[2], k.shape[2]
            specs = self._specs(given[:6])
            wanted = pull.keywords["bias_gradient"]

            def local(q, *rest):
                k, v, *rest = varying_like(rest, q)
                cut, undo = jax.vjp(lambda *x: tuple(map(self._cut(q, n, kv), x)), k, v)
                dq, dk, dv, dbias = pull(q, *cut, *rest)
                dk, dv = undo((dk, dv))
                if not self._keys_split(kv):
                    dk, dv = jax.lax.psum((dk, dv), self.heads)
                if wanted:
                    alone = (self.batch if bias.shape[0] == 1 else ()) + (
                        self.heads if bias.shape[1] == 1 else ()
                    )
                    dbias = jax.lax.psum(dbias, alone) if alone else dbias
                return dq, dk, dv, dbias

            of_out, of_lse = self._rows()
            out_specs = (*specs[:3], specs[3] if wanted else None)
            return self._over(local, (*specs, of_out, of_lse, of_out, of_lse), out_specs)(*given)

        return over


def _with_explicit(split: Split | None, given) -> tuple[Split | None, Any]:
    """The split that is asked for with what arrays' types say of explicit axes, and the arrays."""
    q, k, v, bias = given[:4]
    axes: dict[int, tuple[str, ...]] = {0: (), 2: ()}
    found = None
    for name, x, places in (
        ("q", q, (0, 2)),
        ("k", k, (0, 2)),
        ("v", v, (0, 2)),
        ("bias", bias, (0, 1)),
    ):
        if x is None:
            continue
        kind = jax.typeof(x).sharding
        explicit = () if kind.mesh.empty else kind.mesh.explicit_axes
        spec = [tuple(a for a in _names(names) if a in explicit) for names in kind.spec]
        if not any(spec):
            continue
        found = kind.mesh
        if any(part for axis, part in enumerate(spec) if axis not in places):
            raise ValueError(
                f"{name} is split as {jax.P(*kind.spec)}: its batch and heads may be, not its "
                "length or head size; jax.sharding.reshard it"
            )
        for axis, size, place in ((0, q.shape[0], places[0]), (2, q.shape[2], places[1])):
            part = spec[place] if place < len(spec) else ()
            part = tuple(a for a in part if a not in (*axes[0], *axes[2]))
            fits = size % math.prod(found.shape[a] for a in part) == 0
            axes[axis] = axes[axis] or (part if fits else ())
    if found is None:
        return split, given
    explicit = Split(found, axes[0], axes[2])
    given = explicit.place(given)
    if split is None:
        return explicit, given
    more = lambda new, old: (*new, *(a for a in old if a not in (*axes[0], *axes[2])))
    return Split(split.mesh, more(axes[0], split.batch), more(axes[2], split.heads)), given


# Arguments


def _checked(q, k, v, bias, segment_ids):
    """The bias with four axes, and a pair of segments, or an error that names the argument."""
    if isinstance(segment_ids, tuple | list) and any(x is None for x in segment_ids):
        raise ValueError("segment_ids holds None: integers for queries and for keys are needed")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} {x.shape}: [batch, length, heads, size] is needed")
        if str(x.dtype) not in _DTYPES:
            raise ValueError(f"{name} is {x.dtype}; one of {', '.join(_DTYPES)} is needed")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, q is {q.dtype}; they must be the same")
    (b, t, n, d), (_, s, heads, _) = q.shape, k.shape
    if k.shape[0] != b or v.shape[0] != b:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: their batches differ")
    if k.shape[3] != d:
        raise ValueError(f"k {k.shape}: heads of size {d} are needed, as q {q.shape} has")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(f"v {v.shape}: length and heads of k {k.shape} are needed")
    if not (d and v.shape[3] and n and heads):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: no heads, or of size 0")
    if n % heads:
        raise ValueError(f"q has {n} heads, which do not divide by the {heads} of k and v")
    if bias is not None:
        bias = jnp.asarray(bias)
        full = (b, n, t, s)
        shape = (1,) * (4 - bias.ndim) + bias.shape
        if len(shape) > 4 or any(x not in (1, y) for x, y in zip(shape, full, strict=True)):
            raise ValueError(f"bias {bias.shape} does not broadcast to [B, N, T, S] = {full}")
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise ValueError(f"bias is {bias.dtype}; a floating dtype is needed (-inf hides a key)")
        bias = bias.reshape(shape)
    if segment_ids is None:
        return bias, None
    pair = isinstance(segment_ids, tuple | list)
    if pair and len(segment_ids) != 2:
        raise ValueError(f"segment_ids: {len(segment_ids)} arrays; one, or those of q and of k")
    ids = tuple(map(jnp.asarray, segment_ids if pair else (segment_ids,) * 2))
    for x, name, size in zip(ids, ("q", "k"), (t, s), strict=True):
        if x.shape != (b, size):
            raise ValueError(f"segment_ids of {name} {x.shape}: {(b, size)} is needed")
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"segment_ids of {name} are {x.dtype}; integers are needed")
    return bias, ids


def _problem(q, k, scale, causal, causal_align, window, softcap) -> Problem:
    number = lambda x: isinstance(x, numbers.Real) and not isinstance(x, bool)
    if scale is not None and not (number(scale) and math.isfinite(scale)):
        raise ValueError(f"scale={scale}: a finite number that is known while tracing is needed")
    if softcap is not None and not (number(softcap) and 0 < softcap < math.inf):
        raise ValueError(f"softcap={softcap}: a positive number or None is needed")
    if causal_align not in _ALIGNMENTS:
        raise ValueError(f"causal_align={causal_align!r}: one of {', '.join(_ALIGNMENTS)}")
    if not isinstance(causal, bool | np.bool):
        raise ValueError(f"causal={causal}: True or False is needed, while tracing")
    sides = window if isinstance(window, tuple | list) else (window, window)
    whole = lambda x: (
        x is None or (isinstance(x, numbers.Integral) and not isinstance(x, bool) and int(x) >= 0)
    )
    if len(sides) != 2 or not all(map(whole, sides)):
        raise ValueError(
            f"window={window}: how far (left, right) a query sees, each a whole number from 0 on, "
            "or None for any distance"
        )
    # Beyond all keys is any distance, and fits 32 bits.
    left, right = (
        None if x is None or x >= sum(k.shape[1:2] + q.shape[1:2]) else int(x) for x in sides
    )
    right = 0 if causal else right
    offset = k.shape[1] - q.shape[1] if causal_align == "bottom_right" else 0
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    return Problem(scale, Band(left, right, offset), None if softcap is None else float(softcap))


def _target(split: Split | None) -> tuple[str, str]:
    """Platform and kind of the device that is traced for: the mesh's, or ours."""
    mesh = jax.sharding.get_abstract_mesh() if split is None else split.mesh
    device = getattr(mesh, "abstract_mesh", mesh).abstract_device
    if device is not None:
        return device.platform, device.device_kind
    config: Any = jax.config
    own = config.jax_default_device or jax.devices()[0]
    own = jax.devices(own)[0] if isinstance(own, str) else own
    return own.platform, own.device_kind


def _chosen(name: str | None, split: Split | None, problem: Problem, q, k, v) -> str:
    if name is None:
        reasons = ((n, _reason(n, split, problem, q, k, v)) for n in IMPLEMENTATIONS)
        return next(n for n, reason in reasons if reason is None)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r}: one of {', '.join(IMPLEMENTATIONS)}, or None")
    reason = IMPLEMENTATIONS[name].why_not(problem, q, k, v)
    if reason is not None:
        raise NotImplementedError(f"implementation={name!r}: {reason}")
    return name


def _reason(name: str, split: Split | None, problem: Problem, q, k, v) -> str | None:
    """Why an implementation cannot serve on the device that is traced for."""
    module = IMPLEMENTATIONS[name]
    return module.why_not_on(*_target(split)) or module.why_not(problem, q, k, v)
