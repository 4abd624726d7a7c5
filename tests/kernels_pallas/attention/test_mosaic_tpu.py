"""The TPU kernels in interpret mode, against the loop over tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import flash_attention
from kernels_pallas.attention import mosaic_tpu, xla
from kernels_pallas.attention.problem import Band, Problem, tile_counts

BLOCKS = mosaic_tpu.Blocks(16, 8)


def draw(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def compare(problem, bias=None, segments=False, queries=37, keys=53, parts=None, monkeypatch=None):
    q, k, v, dout, dlse = draw(
        (2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 5), (2, queries, 4, 5), (2, 4, queries)
    )
    bias = None if bias is None else draw(bias)[0]
    q_ids = kv_ids = None
    if segments:
        rng = np.random.default_rng(0)
        q_ids, kv_ids = (
            jnp.asarray(np.sort(rng.integers(0, 3, (2, n)), axis=1)) for n in (queries, keys)
        )
    given = (q, k, v, bias, q_ids, kv_ids)
    out, lse = jax.jit(functools.partial(xla.forward, problem))(*given)
    dlse = jnp.where(jnp.isfinite(lse), dlse, 0)
    rest = (out, lse, dout, dlse)
    options = {"bias_gradient": bias is not None}
    expected = jax.jit(functools.partial(xla.backward, problem, **options))(*given, *rest)
    options |= {"blocks": BLOCKS, "interpret": True}
    if parts is not None:
        monkeypatch.setattr(mosaic_tpu, "_QUERY_BYTES", parts)
    forward = functools.partial(mosaic_tpu.forward, problem, blocks=BLOCKS, interpret=True)
    backward = functools.partial(mosaic_tpu.backward, problem, **options)
    found = *jax.jit(forward)(*given), *jax.jit(backward)(*given, *rest)
    for x, y in zip(found, (out, lse, *expected), strict=True):
        if y is not None:
            np.testing.assert_allclose(x, y, atol=2e-5)


def test_causal():
    compare(Problem(0.4, Band(right=0, offset=16)))


def test_more_queries_than_keys_so_that_some_see_nothing():
    compare(Problem(0.4, Band(right=0, offset=-16)), queries=53, keys=37)


def test_a_window_softcap_and_bias():
    compare(Problem(0.4, Band(7, 3), 1.5), bias=(1, 4, 37, 53))


def test_segments_and_a_bias_that_broadcasts():
    compare(Problem(0.4, Band()), bias=(2, 1, 1, 53), segments=True)


def test_queries_in_parts(monkeypatch):
    compare(Problem(0.4, Band(9, 2, 5)), bias=(1, 1, 37, 1), parts=1, monkeypatch=monkeypatch)


def test_a_tpu_as_it_is_simulated_with_its_memories():
    """Memory that was not written is NaN there, and reads beyond an array raise."""
    q, k, v = draw((1, 150, 2, 64), (1, 150, 1, 64), (1, 150, 1, 64))
    attend = functools.partial(flash_attention, causal=True, window=(100, None))
    strict = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
    loss = lambda name: lambda *xs: jnp.sum(jnp.sin(attend(*xs, implementation=name)))
    with pltpu.force_tpu_interpret_mode(strict):
        found = jax.jit(jax.value_and_grad(loss("mosaic_tpu"), (0, 1, 2)))(q, k, v)
        found = jax.tree.map(np.asarray, found)
    expected = jax.jit(jax.value_and_grad(loss("xla"), (0, 1, 2)))(q, k, v)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("by", ["rows", "columns"])
def test_the_grid_holds_the_tiles_that_the_mask_leaves(by):
    band, blocks = Band(right=0), mosaic_tpu.Blocks(64, 64)
    seen = mosaic_tpu.visits(band, 1024, 1024, blocks, by=by)
    visited, masked = tile_counts(1024, 1024, 64, 64, band)
    assert len(seen.rows) == visited == 136
    assert np.sum(seen.flags & mosaic_tpu._MASKED != 0) == masked == 16
    major = seen.rows if by == "rows" else seen.columns
    assert (np.diff(major) >= 0).all()
    for flag in (mosaic_tpu._FIRST, mosaic_tpu._LAST):
        assert np.array_equal(major[seen.flags & flag != 0], np.arange(16))
    every = mosaic_tpu.visits(band, 1024, 1024, blocks, by=by, every=True)
    assert len(every.rows) == 256
    empty = mosaic_tpu.visits(Band(right=0, offset=-128), 256, 128, blocks, by=by)
    assert set(empty.rows if by == "rows" else empty.columns) == set(
        range(4 if by == "rows" else 2)
    )
