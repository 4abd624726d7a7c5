"""The Hopper kernels in interpret mode, which looks for races, against the loop over tiles.

Tensor cores are replaced by plain products there; copies, barriers, indices and masks are those
of the kernels. On a GPU the last test runs them as they are.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import flash_attention
from kernels_pallas.attention import mosaic_gpu, xla
from kernels_pallas.attention.problem import Band, Problem

interpret = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")


def draw(*shapes, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def compare(problem, queries, keys, heads=1, size=64, value_size=64, bias=None, segments=False):
    q, k, v, dout = draw(
        (1, queries, heads, size), (1, keys, 1, size), (1, keys, 1, value_size),
        (1, queries, heads, value_size),
    )  # fmt: skip
    (dlse,) = draw((1, heads, queries), dtype=jnp.float32)
    bias = None if bias is None else draw(bias, dtype=jnp.float32)[0]
    q_ids = kv_ids = None
    if segments:
        rng = np.random.default_rng(0)
        q_ids, kv_ids = (
            jnp.asarray(np.sort(rng.integers(0, 3, (1, n)), axis=1)) for n in (queries, keys)
        )
    given = (q, k, v, bias, q_ids, kv_ids)
    out, lse = jax.jit(functools.partial(xla.forward, problem))(*given)
    rest = (out, lse, dout, jnp.where(jnp.isfinite(lse), dlse, 0))
    backward = functools.partial(xla.backward, problem, bias_gradient=False)
    expected = (out, lse, *jax.jit(backward)(*given, *rest)[:3])
    simulated = {"interpret": interpret.InterpretGPUParams(detect_races=True)}
    found = mosaic_gpu.forward(problem, *given, **simulated)
    gradients = mosaic_gpu.backward(problem, *given, *rest, bias_gradient=False, **simulated)
    for x, y in zip((*found, *gradients[:3]), expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), atol=0.02, rtol=0.01
        )


def test_causal_over_three_blocks():
    compare(Problem(0.2, Band(right=0)), 300, 300)


def test_every_option_at_once():
    problem = Problem(0.2, Band(100, 0, 130), 1.5)
    compare(problem, 140, 270, heads=2, value_size=128, bias=(1, 1, 140, 270), segments=True)


def test_some_queries_see_nothing_and_a_bias_of_keys():
    compare(Problem(0.2, Band(right=0, offset=-100)), 130, 100, bias=(1, 1, 1, 100))


def test_a_bias_of_one_number_a_head():
    compare(Problem(0.2, Band()), 10, 70, heads=2, bias=(1, 2, 1, 1))
    compare(Problem(0.2, Band()), 1, 1, bias=(1, 1, 1, 1))


def test_wide_heads_in_parts():
    compare(Problem(0.1, Band()), 100, 130, size=192, value_size=192)


def test_it_is_chosen_on_hopper_only(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    plain = Problem(0.125, Band())
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"):
        assert mosaic_gpu.why_not_on("gpu", kind) is None
    assert "this is NVIDIA A100" in mosaic_gpu.why_not_on("gpu", "NVIDIA A100-SXM4-80GB")
    assert mosaic_gpu.why_not(plain, q, q, q) is None
    wide = jax.ShapeDtypeStruct((1, 256, 2, 320), jnp.bfloat16)
    assert "up to 256, not 320" in mosaic_gpu.why_not(plain, wide, wide, wide)
    single = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
    assert "q is float32" in mosaic_gpu.why_not(plain, single, single, single)
    monkeypatch.setattr(mosaic_gpu, "plgpu", None)
    assert "this jaxlib lacks" in mosaic_gpu.why_not_on("gpu", "NVIDIA H100 80GB HBM3")


@pytest.mark.skipif(
    jax.default_backend() != "gpu"
    or mosaic_gpu.why_not_on("gpu", jax.devices()[0].device_kind) is not None,
    reason="no Hopper GPU",
)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "softcap": 20.0}])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_on_a_gpu(size, dtype, options):
    q, k, v, dout = draw((2, 1000, 4, size), *[(2, 1000, 2, size)] * 2, (2, 1000, 4, size))
    q, k, v, dout = (x.astype(dtype) for x in (q, k, v, dout))

    def everything(name, *values):
        attend = functools.partial(flash_attention, **options, implementation=name)
        out, pull = jax.vjp(attend, *values)
        return out, *pull(dout.astype(out.dtype))

    exact = everything("xla", *(x.astype(jnp.float32) for x in (q, k, v)))
    plain, found = everything("reference", q, k, v), everything("mosaic_gpu", q, k, v)
    again = everything("mosaic_gpu", q, k, v)
    for i, (x, y, z, w) in enumerate(zip(exact, plain, found, again, strict=True)):
        error = lambda a, x=x: float(jnp.max(jnp.abs(a.astype(jnp.float32) - x)))
        assert error(z) <= (2 if i == 0 else 3) * error(y)
        np.testing.assert_array_equal(np.asarray(z), np.asarray(w))  # the same bits each time
