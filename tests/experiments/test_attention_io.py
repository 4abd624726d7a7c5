"""The smoke preset, interrupted and resumed; where the winner changes; ranges; what is timed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import attention_io
from kernels_pallas.attention import transfers, xla
from rlib.experiment import Run, UsageError
from rlib.experiment.config import load
from rlib.experiment.environment import CHECKOUT


def config_of(preset):
    config, *_ = load(f"configs/attention_io.py:{preset}", [], CHECKOUT)
    return config


def test_every_method_and_claim_is_there(smoke):
    config = config_of("smoke")
    for metric in (attention_io.ERROR, attention_io.DENSEST):
        assert {r["method"] for r in smoke["rows"] if r["metric"] == metric} == set(config.methods)
    text = " ".join(claim["claim"] for claim in smoke["claims"])
    for part in ("closed forms", "float64", "scores", "M^-1/2", "1/M", "d^2 / 8", "M = d^2:"):
        assert part in text
    for part in (
        "1.5 times",
        "the bound",
        "at d^2,",
        "at d^2 / 4",
        "once",
        "as published",
        "Heads",
    ):
        assert part in text
    assert len(smoke["claims"]) == 16
    assert [claim["verdict"] for claim in smoke["claims"][:3]] == ["held"] * 3
    assert smoke["figures"] == ["figures/words.png", "figures/ratios.png"]


def test_one_method_alone_is_executed_and_drawn():
    config = config_of("smoke").unlock()
    config.time.n, config.executed.n = (), (8,)
    report = attention_io.main(config, Run(only=["fa1"]))
    assert {row.method for row in report.rows} == {"fa1"}
    assert [claim.verdict for claim in report.claims] == ["held"] * 3


def test_the_winner_changes_where_choices_differ():
    n, d = 2**12, 16
    found = attention_io._changes(n, d)
    chosen = {m: transfers.choose_attention(n, d, m).kind for m in range(4, d * d + 1)}
    assert found["m"].tolist() == [m for m in range(5, d * d + 1) if chosen[m] != chosen[m - 1]]
    # To and fro between two powers of two, and once for good: two powers differ.
    assert attention_io._coarse({"m": np.array([70, 75, 80])}, 16) == 1
    assert attention_io._coarse({"m": np.array([70, 75])}, 16) == 0
    assert attention_io._coarse({"m": np.array([40, 70, 130])}, 16) == 3


def test_leading_terms_agree_where_they_should():
    for d in (16, 64, 2**20):
        m = attention_io._leading(d) * d * d
        flash, square = 2 * d * (2 * d + 3) / (m - 2 * d), 8 * d / np.sqrt(m) + 1
        np.testing.assert_allclose(flash, square)
    np.testing.assert_allclose(m / d / d, (np.sqrt(20) - 4) ** 2, rtol=1e-4)


def test_the_largest_tiles_fit_and_no_larger_ones():
    for m in range(4, 400):
        side = attention_io._largest_side(m)
        assert 3 * side**2 + side <= m < 3 * (side + 1) ** 2 + side + 1


def test_ranges_lie_in_their_regimes():
    config = config_of("default")
    n = config.counted.n
    for d in config.counted.d:
        small, large = attention_io._small(config, d), attention_io._large(config, d)
        assert small[0] == 64 and small[-1] <= d * d / 16
        assert large[0] == 4 * d * d and large[-1] <= n * d / 16
        assert min(len(small), len(large)) > config.counted.octave


def test_what_is_timed_is_attention():
    q, k, v = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12, 4)), jnp.float32)
    for rows, columns in ((4, 3), (5, 7)):
        blocks = xla.Blocks(rows, columns, heads=1)
        out = jax.jit(functools.partial(attention_io._flash, blocks=blocks))(q, k, v)
        np.testing.assert_allclose(out, jax.nn.softmax(q @ k.T) @ v, rtol=1e-5, atol=1e-6)
    assert [attention_io._even(12, most) for most in (1, 5, 7, 11, 99)] == [1, 4, 6, 6, 12]


def test_unknown_methods_and_small_caches_are_refused():
    config = config_of("smoke").unlock()
    with pytest.raises(UsageError, match="no cache is large enough for fa2 of width 64"):
        attention_io._execute((16, 64), "fa2", 8, 64, 0)
    config.methods = ("square", "fa3")
    with pytest.raises(UsageError, match="fa3"):
        attention_io.main(config)


@pytest.mark.parametrize("preset", ["smoke", "default", "full"])
def test_presets_load(preset):
    config = config_of(preset)
    assert config.practical in config.heads or preset == "smoke"
    for d in config.executed.d:
        assert min(config.executed.m) <= d * d < max(config.executed.m)
