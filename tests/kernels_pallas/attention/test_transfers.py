"""Counts against hand cases, closed forms, limits and executions; what executions compute."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention.transfers import (
    KINDS,
    Cache,
    Plan,
    choose_attention,
    count_transfers,
    io_lower_bound,
    plan_attention,
    simulate,
    square_tiling_attention,
)

#: Divisible and ragged; d above and below n; caches on both sides of d^2, and above n d.
CELLS = [(16, 8, 64), (19, 7, 40), (24, 12, 100), (6, 16, 90), (13, 5, 400), (32, 4, 25)]


def drawn(n, d, seed=0, size=1.0):
    return size * np.random.default_rng(seed).normal(size=(3, n, d))


def softmax_attention(q, k, v):
    scores = q @ k.T
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v


def fits(kind, n, d, m):
    try:
        return plan_attention(kind, n, d, m)
    except ValueError:
        return None


# Counts


@pytest.mark.parametrize(
    ("n", "d", "m", "side", "reads", "writes"),
    [
        (8, 2, 16, 2, 264, 88),
        (64, 16, 64, 4, 65600, 5184),
        (64, 16, 256, 8, 32832, 5184),
        (256, 16, 64, 4, 1048832, 69888),
    ],
)
def test_square_tiling_by_hand(n, d, m, side, reads, writes):
    plan = plan_attention("square", n, d, m)
    assert plan == Plan("square", side, side)
    assert count_transfers(plan, n, d)[:2] == (reads, writes)
    assert reads == 4 * n * n * d // side + n
    assert writes == n * n + n + n * d


def test_flash_attention_by_hand():
    assert count_transfers(Plan("fa2", 64, 1), 1024, 64)[:2] == (2162688, 66560)
    assert count_transfers(Plan("fa1", 1, 64), 1024, 64)[:2] == (2260992, 1081344)


@pytest.mark.parametrize(
    ("m", "square", "flash", "rows"),
    [
        (256, 34670592, None, 0),
        (512, 25888768, 67240960, 2),
        (1024, 17893376, 22545408, 6),
        (2048, 13502464, 9831424, 14),
        (4096, 9504768, 4719616, 30),
        (8192, 7735296, 2360320, 61),
        (16384, 5310464, 1311744, 124),
        (65536, 3737600, 525312, 499),
    ],
)
def test_totals_of_1024_queries_of_width_64(m, square, flash, rows):
    n, d = 1024, 64
    tiled = plan_attention("square", n, d, m)
    assert count_transfers(tiled, n, d).total == square
    fused = fits("fa2", n, d, m)
    if flash is None:
        assert fused is None
    else:
        assert fused == Plan("fa2", rows, 1)
        assert count_transfers(fused, n, d).total == flash
    chosen = choose_attention(n, d, m)
    assert chosen == (fused if m >= 2048 else tiled)


def test_three_passes_by_hand():
    # Tiles of 2 x 2: 4 x 4 pairs of rows, 2 tiles across; then a softmax of rows of 8 in 10 words.
    plan = plan_attention("unfused", 8, 4, 12)
    assert plan == Plan("unfused", 2, 8)
    passes = [(2 * 8 * 4 * 4, 64), (64, 64), (64 * 2 + 8 * 4 * 4, 32)]
    counts = count_transfers(plan, 8, 4)
    assert counts == (sum(r for r, _ in passes), sum(w for _, w in passes), 12)
    # In fewer words a row is read twice.
    assert count_transfers(Plan("unfused", 2, 7), 8, 4) == (counts.reads + 64, counts.writes, 12)


def test_the_bound_in_its_three_regimes():
    n, d = 1024, 64
    assert io_lower_bound(n, d, 256) == n * n * d / 16
    assert io_lower_bound(n, d, d * d) == n * n  # both curves
    assert io_lower_bound(n, d, 16384) == n * n * d * d / 16384
    assert io_lower_bound(n, d, n * d) == io_lower_bound(n, d, 100 * n * d) == n * d


@pytest.mark.parametrize(("n", "d"), [(64, 16), (100, 7), (5, 32)])
def test_with_one_row_block_every_input_is_read_once(n, d):
    m = 2 * d * (n + 1) + 3 * n
    assert count_transfers(plan_attention("fa2", n, d, m), n, d)[:2] == (3 * n * d, n * d + n)
    assert count_transfers(plan_attention("fa2", n, d, m - 1), n, d).total > 4 * n * d + n


def test_one_tile_of_square_tiling_reads_five_arrays_once():
    n = 16
    counts = count_transfers(Plan("square", n, n), n, n)
    assert counts == (4 * n * n + n, 2 * n * n + n, 3 * n * n + n)


@pytest.mark.parametrize("kind", KINDS)
def test_more_cache_never_costs_more(kind):
    n, d = 24, 12
    costs = [
        count_transfers(plan, n, d).total if (plan := fits(kind, n, d, m)) else math.inf
        for m in range(1, 1200)
    ]
    finite = [cost for cost in costs if cost < math.inf]
    assert np.all(np.diff(finite) <= 0) and costs[len(costs) - len(finite) :] == finite


@pytest.mark.parametrize("d", [16, 64, 128])
def test_the_better_one_is_near_the_bound_and_each_alone_is_not(d):
    n = 2**14
    ratios = {"square": {}, "fa2": {}}
    for m in (2**i for i in range(6, 24)):
        for kind in ratios:
            if plan := fits(kind, n, d, m):
                ratios[kind][m] = count_transfers(plan, n, d).total / io_lower_bound(n, d, m)
    better = [min(r[m] for r in ratios.values() if m in r) for m in ratios["square"]]
    assert min(better) > 4 and max(better) < 10.5
    assert ratios["square"][n * d] > 2 * math.sqrt(n / d)
    assert choose_attention(n, d, d * d).kind == "fa2"


def test_the_winner_changes_once_along_powers_of_two():
    chosen = [choose_attention(1024, 64, 2**i).kind for i in range(6, 19)]
    assert chosen == ["square"] * 5 + ["fa2"] * 8  # from 2048, below d^2 = 4096


def test_the_winner_changes_where_the_leading_terms_are_equal():
    n, d = 2**18, 1024  # 8 d / sqrt(m) + 1 = 4 d^2 / m, in units of n^2
    limit = (math.sqrt(20) - 4) ** 2
    wins = lambda m: choose_attention(n, d, m).kind
    assert wins(int(0.9 * limit * d * d)) == "square"
    assert wins(int(1.1 * limit * d * d)) == "fa2"


# Executions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d", "m"), CELLS)
def test_executions_move_what_is_counted_and_give_attention(kind, n, d, m):
    plan = plan_attention(kind, n, d, m)
    q, k, v = drawn(n, d)
    out, counts, densest = simulate(plan, q, k, v, m)
    np.testing.assert_allclose(out, softmax_attention(q, k, v), rtol=1e-12, atol=1e-12)
    assert counts == count_transfers(plan, n, d)
    assert counts.live <= m
    assert 0 < densest <= m * m / d / d + 2 * m


@pytest.mark.parametrize(
    "plan", [Plan("fa2", 5, 3), Plan("fa1", 3, 5), Plan("fa2", 99, 99), Plan("square", 3, 3)]
)
def test_tiles_of_ones_own(plan):
    q, k, v = drawn(13, 6)
    counts = count_transfers(plan, 13, 6)
    made = simulate(plan, q, k, v, counts.live)
    assert made.transfers == counts
    np.testing.assert_allclose(made.out, softmax_attention(q, k, v), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=f"m={counts.live - 1}: .*of {counts.live} words"):
        simulate(plan, q, k, v, counts.live - 1)


def test_the_cache_of_square_tiling_is_filled_as_in_closed_form():
    q, k, v = drawn(32, 8)
    for kind, kept in (("square", 1), ("square_safe", 2)):
        for side in (3, 4, 8):
            counts = simulate(Plan(kind, side, side), q, k, v, 400).transfers
            assert counts.live == 3 * side**2 + kept * side


def test_flash_attention_comes_to_a_quarter_of_the_most_scores():
    n, d, m = 256, 4, 512
    q, k, v = drawn(n, d)
    dense = {kind: simulate(plan_attention(kind, n, d, m), q, k, v, m).densest for kind in KINDS}
    most = m * m / d / d + 2 * m
    assert 0.15 * most < dense["fa2"] < 0.3 * most
    assert max(dense.values()) == dense["fa2"]


def test_large_scores_need_the_maximum():
    q, k, v = drawn(12, 4)
    mild = 79 / np.abs(q @ k.T).max()
    out = simulate(Plan("square", 3, 3), mild * q, k, v, 40).out
    np.testing.assert_allclose(out, softmax_attention(mild * q, k, v), rtol=1e-12)
    steep = 1e4 / np.abs(q @ k.T).max()
    for kind in KINDS[1:]:
        plan = plan_attention(kind, 12, 4, 40)
        out = simulate(plan, steep * q, k, v, 40).out
        np.testing.assert_allclose(out, softmax_attention(steep * q, k, v), rtol=1e-9, atol=1e-12)
    with np.errstate(all="ignore"):
        assert not np.isfinite(simulate(Plan("square", 3, 3), steep * q, k, v, 40).out).all()


def test_the_busiest_stretch_counts_both_ends():
    cache, slow = Cache(4), np.zeros(2)
    for scores in (5, 7, 1):
        tile = cache.load(slow)
        cache.finish(scores)
        cache.free(tile)
    assert cache.densest() == 13  # after 2, 4 and 6 words: 4 in a row
    assert Cache(3).densest() == 0


def test_a_cache_refuses_what_does_not_fit_and_what_it_does_not_hold():
    cache, slow = Cache(5), np.arange(4.0)
    tile, other = cache.load(slow), np.zeros(1)
    assert tile is not slow and (cache.reads, cache.live) == (4, 4)
    with pytest.raises(ValueError, match="2 words more: 4 of m=5"):
        cache.new(2)
    with pytest.raises(ValueError, match=r"shape \(1,\) is not held"):
        cache.store(other, slow[:1])
    cache.free(tile)
    with pytest.raises(ValueError, match=r"shape \(4,\) is not held"):
        cache.free(tile)
    assert (cache.reads, cache.writes, cache.live, cache.peak) == (4, 0, 0, 4)


# Arrays of JAX


@pytest.mark.parametrize("stable", [True, False])
@pytest.mark.parametrize(("n", "d", "block"), [(8, 4, 4), (7, 5, 3), (3, 9, 4), (5, 4, 16)])
def test_square_tiling_is_softmax_attention(n, d, block, stable):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in drawn(n, d))
    out = square_tiling_attention(q, k, v, block=block, stable=stable)
    np.testing.assert_allclose(out, softmax_attention(q, k, v), rtol=2e-5, atol=2e-6)


@pytest.fixture(scope="module")
def batch():
    return jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 7, 5)), jnp.float32)


@pytest.mark.parametrize("stable", [True, False])
def test_its_gradients_are_those_of_softmax_attention(batch, stable):
    tiled = functools.partial(square_tiling_attention, block=3, stable=stable)
    plain = lambda q, k, v: jax.nn.softmax(q @ k.T) @ v
    loss = lambda attention: lambda qkv: jnp.sum(jnp.sin(jax.vmap(attention)(*qkv)))
    made, wanted = (jax.jit(jax.grad(loss(attention)))(batch) for attention in (tiled, plain))
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5)


def test_large_scores_in_float32_need_the_maximum_too(batch):
    q, k, v = batch[:, 0]
    q = q * (1e4 / jnp.abs(q @ k.T).max())
    out = square_tiling_attention(q, k, v, block=3)
    np.testing.assert_allclose(out, softmax_attention(*map(np.asarray, (q, k, v))), atol=1e-4)
    assert not bool(jnp.isfinite(square_tiling_attention(q, k, v, block=3, stable=False)).all())


def test_bfloat16_goes_in_and_out(batch):
    q, k, v = batch[:, 0].astype(jnp.bfloat16)
    out = square_tiling_attention(q, k, v, block=4)
    wanted = softmax_attention(*(np.asarray(x, np.float64) for x in (q, k, v)))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, rtol=1e-2, atol=1e-2)


# Bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: io_lower_bound(0, 4, 4), "n=0: a whole number of at least 1"),
        (lambda: io_lower_bound(4, 4, 2.5), r"m=2\.5: a whole number"),
        (lambda: plan_attention("square", 4, True, 9), "d=True: a whole number"),
        (lambda: plan_attention("square", 8, 2, 3), "m=3: square .* at least 4 words"),
        (lambda: plan_attention("square_safe", 8, 2, 4), "m=4: square_safe .* at least 5 words"),
        (lambda: plan_attention("fa2", 8, 16, 66), "m=66: fa2 at n=8, d=16 .* at least 67 words"),
        (lambda: plan_attention("fa1", 8, 16, 66), "m=66: fa1 at n=8, d=16 .* at least 67 words"),
        (lambda: plan_attention("fa2", 8, 2, 21, inner=4), "m=21: fa2 .* at least 26 words"),
        (lambda: plan_attention("unfused", 8, 2, 2), "m=2: unfused .* at least 3 words"),
        (lambda: plan_attention("fa3", 8, 2, 99), "kind='fa3': one of square, square_safe, fa2"),
        (lambda: choose_attention(8, 2, 3), "m=3: square"),
        (lambda: choose_attention(8, 2, 99, inner=0), "inner=0: a whole number"),
        (lambda: count_transfers(Plan("fa2", 0, 1), 8, 2), "block_q=0: a whole number"),
        (lambda: Cache(0), "m=0: a whole number"),
        (lambda: simulate(Plan("flash", 1, 1), *drawn(4, 2), 99), "kind='flash': one of"),
        (lambda: simulate(Plan("fa2", 1, 1), *drawn(4, 2)[:, 0], 99), r"one shape \(n, d\)"),
        (
            lambda: square_tiling_attention(*map(jnp.zeros, [(4, 2), (4, 2), (5, 2)]), block=2),
            r"\(5, 2\)\): one shape \(n, d\)",
        ),
        (lambda: square_tiling_attention(*drawn(4, 2), block=0), "block=0: a whole number"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
