"""I/O of attention (arXiv 2402.07443): FlashAttention moves the fewest words only if M >= d^2.

Square tiling, FlashAttention in both loop orders and three unfused passes are executed in float64
on a cache of M words that counts what moves and refuses what does not fit, beside the lower bound
max(N d, min(N^2 d / sqrt(M), N^2 d^2 / M)). Closed forms, which have to agree with what was
executed, show long sequences: slopes, distance to the bound, and where the winner changes. Last,
times on this machine with tiles from the model.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from ml_collections import ConfigDict

from kernels_pallas.attention import transfers, xla
from kernels_pallas.attention.problem import Band, Problem
from kernels_pallas.timing import in_turns
from rlib.experiment import (
    COLOURS,
    Claim,
    Claims,
    Report,
    Row,
    Run,
    UsageError,
    legend,
    panels,
    start,
    styled,
    unknown,
)

TITLES = {
    "square": "square tiling",
    "fa2": "FlashAttention, queries outside",
    "fa1": "FlashAttention, keys outside",
    "unfused": "three unfused passes",
}
PAIR = ("square", "fa2")
ERROR = "Executed: largest error against softmax attention in float64"
DENSEST = "Executed: most scores finished within M transfers, over M^2 / d^2 + 2 M"
CHANGES = "How often the winner changes as M grows up to d^2"
CROSSING = "M over d^2 at which FlashAttention begins to move less"
TIMES = "Time over that of materialised attention, on this machine"
Values = dict[str, Any]


def main(config: ConfigDict, run: Run | None = None) -> Report:
    """Execute and count every method, and judge the claims."""
    run = run or Run()
    for method in config.methods:
        if method not in TITLES:
            raise unknown("method", method, TITLES)
    methods, seeds = run.select(config.methods), run.seeds(config)
    ran = config.executed
    cells = [(k, n, d, s) for k in methods for n in ran.n for d in ran.d for s in seeds]
    name = lambda cell: "executed/{}/n{}/d{}/seed{}".format(*cell)
    both = set(PAIR) <= set(methods)
    widths = config.crossing if both else ()
    timed = [(n, k) for n in config.time.n for k in PAIR if k in methods]
    costs = {name(cell): float(cell[1] ** 2) for cell in cells}
    costs |= {f"crossing/d{d}": d * d / 20 for d in widths}
    run.plan(costs | {f"time/n{n}/{k}": n * n / 100 for n, k in timed})
    executed = {cell: run.cached(name(cell), lambda c=cell: _execute(ran.m, *c)) for cell in cells}
    changes = {
        d: run.cached(f"crossing/d{d}", lambda d=d: _changes(config.counted.n, d)) for d in widths
    }
    times = {
        (n, k): run.cached(f"time/n{n}/{k}", lambda n=n, k=k: _time(config.time, n, k))
        for n, k in timed
    }
    _draw_words(run, config, methods, executed)
    _draw_ratios(run, config, methods)
    rows = [
        *_executed_rows(methods, executed),
        *_counted_rows(config, methods),
        *_crossing_rows(changes),
        *_time_rows(times),
    ]
    return Report(rows, _claims(config, methods, executed, changes), _notes(config))


# What is measured


def _plan(kind: str, n: int, d: int, m: int) -> transfers.Plan | None:
    """None where the cache is too small."""
    try:
        return transfers.plan_attention(kind, n, d, m)
    except ValueError:
        return None


def _words(kind: str, n: int, d: int, m: Iterable[int]) -> np.ndarray:
    """Words moved, by size of the cache; infinite where it is too small."""
    plans = (_plan(kind, n, d, int(each)) for each in m)
    return np.array([transfers.count_transfers(p, n, d).total if p else math.inf for p in plans])


def _bound(n: int, d: int, m: Iterable[int]) -> np.ndarray:
    return np.array([transfers.io_lower_bound(n, d, int(each)) for each in m])


def _execute(sizes: Iterable[int], kind: str, n: int, d: int, seed: int) -> Values:
    """What a method moved, by size of the cache."""
    q, k, v = np.random.default_rng(seed).normal(size=(3, n, d))
    q /= math.sqrt(d)
    weights = np.exp(q @ k.T)
    wanted = weights / weights.sum(axis=1, keepdims=True) @ v
    found: list[Values] = []
    for m in sizes:
        plan = _plan(kind, n, d, m)
        if plan is None:
            continue
        made = transfers.simulate(plan, q, k, v, m)
        difference = np.subtract(made.transfers, transfers.count_transfers(plan, n, d))
        found.append(
            {
                "m": m,
                "words": made.transfers.total,
                "difference": int(np.abs(difference).max()),
                "error": float(np.abs(made.out - wanted).max()),
                "dense": made.densest / (m * m / d / d + 2 * m),
            }
        )
    if not found:
        raise UsageError(f"executed.m: no cache is large enough for {kind} of width {d}")
    return {key: np.array([each[key] for each in found]) for key in found[0]}


def _changes(n: int, d: int) -> Values:
    """Every M at which the winner is another than at M - 1, up to d^2; M = 4 is square tiling's."""
    flash = [transfers.choose_attention(n, d, m).kind == "fa2" for m in range(4, d * d + 1)]
    return {"m": 5 + np.flatnonzero(np.diff(flash))}


def _grid(low: float, high: float, octave: int) -> np.ndarray:
    """Whole numbers from low to high, so many an octave."""
    exponents = np.arange(math.log2(low) * octave, math.log2(high) * octave + 1e-6) / octave
    return np.unique(np.round(2**exponents).astype(int))


def _small(config: ConfigDict, d: int) -> np.ndarray:
    """Caches far below d^2."""
    return _grid(64, max(d * d / 16, 128), config.counted.octave)


def _large(config: ConfigDict, d: int) -> np.ndarray:
    """Caches far above d^2 and far below N d."""
    low = 4 * d * d
    return _grid(low, max(config.counted.n * d / 16, 2 * low), config.counted.octave)


def _slope(config: ConfigDict, kind: str, d: int, m: np.ndarray) -> float:
    """Of log words in log M; NaN where a cache is too small."""
    words = _words(kind, config.counted.n, d, m)
    if not np.isfinite(words).all():
        return math.nan
    return float(np.polyfit(np.log(m), np.log(words), 1)[0])


def _ratio(numerator: str, denominator: str, n: int, d: int, m: Iterable[int]) -> np.ndarray:
    """Words of one method over those of another."""
    sizes = list(m)
    return _words(numerator, n, d, sizes) / _words(denominator, n, d, sizes)


def _largest_side(m: int) -> int:
    """The largest B with 3 B^2 + B <= m."""
    return (math.isqrt(12 * m + 1) - 1) // 6


def _over_unfused(n: int, d: int, sizes: np.ndarray, side: Callable[[int], int]) -> float:
    """Words of square tiling with tiles of one's own over those of unfused passes, mean log2."""
    plans = [transfers.Plan("square", side(int(m)), side(int(m))) for m in sizes]
    words = np.array([transfers.count_transfers(plan, n, d).total for plan in plans])
    return float(np.log2(words / _words("unfused", n, d, sizes)).mean())


def _better(n: int, d: int, m: np.ndarray) -> np.ndarray:
    """Words of the better of the two."""
    return np.minimum(*(_words(kind, n, d, m) for kind in PAIR))


# Times


def _flash(q: jax.Array, k: jax.Array, v: jax.Array, blocks: xla.Blocks) -> jax.Array:
    """FlashAttention of one head, (n, d) each, with tiles of one's own."""
    q, k, v = (x[None, :, None] for x in (q, k, v))
    out, _ = xla.forward(Problem(1.0, Band()), q, k, v, blocks=blocks)
    return out[0, :, 0]


def _even(n: int, most: int) -> int:
    """The side of as few tiles as can be, which pads least."""
    return -(-n // -(-n // most))


def _time(options: ConfigDict, n: int, kind: str) -> Values:
    """Seconds of materialised attention and of a tiled one, in turns."""
    d = options.d
    q, k, v = jnp.asarray(np.random.default_rng(0).normal(size=(3, n, d)), jnp.float32)
    q = q / math.sqrt(d)
    attention: Callable
    if kind == "fa2":
        plan = transfers.plan_attention("fa2", n, d, options.m, inner=options.inner)
        blocks = xla.Blocks(_even(n, plan.block_q), _even(n, plan.block_kv), heads=1)
        attention = functools.partial(_flash, blocks=blocks)
    else:
        side = transfers.plan_attention("square_safe", n, d, options.m).block_q
        attention = functools.partial(transfers.square_tiling_attention, block=side)
    plain = jax.jit(lambda q, k, v: jax.nn.softmax(q @ k.T) @ v)
    calls = [functools.partial(function, q, k, v) for function in (plain, jax.jit(attention))]
    # Each after a call of its own: what the other leaves in memory would count.
    turns = in_turns(calls, options.repeats, ahead=1)
    return dict(zip(("plain", "tiled"), turns, strict=True))


# The report


def _power(m: int) -> str:
    return f"2^{m.bit_length() - 1}" if m & (m - 1) == 0 else str(m)


def _executed_rows(methods: list[str], executed: dict) -> list[Row]:
    rows = []
    cells = sorted({cell[1:3] for cell in executed})
    seeds = sorted({cell[3] for cell in executed})
    for n, d in cells:
        title = f"Executed: words moved over the lower bound, N={n}, d={d}"
        for kind in methods:
            found = [executed[kind, n, d, seed] for seed in seeds]
            for i, m in enumerate(found[0]["m"].tolist()):
                bound = transfers.io_lower_bound(n, d, m)
                values = [each["words"][i] / bound for each in found]
                rows.append(Row(kind, f"M={_power(m)}", title, values))
    for title, key in ((ERROR, "error"), (DENSEST, "dense")):
        for kind in methods:
            for n, d in cells:
                values = [executed[kind, n, d, seed][key].max() for seed in seeds]
                rows.append(Row(kind, f"N={n}, d={d}", title, values))
    return rows


def _counted_rows(config: ConfigDict, methods: list[str]) -> list[Row]:
    n, rows = config.counted.n, []
    title = f"Log-log slope of words in M, N={_power(n)}"
    for kind in methods:
        for d in config.counted.d:
            ranges = {"M << d^2": _small(config, d), "d^2 << M << N d": _large(config, d)}
            for name, m in ranges.items():
                slope = _slope(config, kind, d, m)
                if math.isfinite(slope):
                    rows.append(Row(kind, f"d={d}, {name}", title, [slope]))
    if not set(PAIR) <= set(methods):
        return rows
    title = f"FlashAttention's words over square tiling's, by memory, N={_power(n)}"
    for memory, m in config.memories.items():
        for d in config.heads:
            ratio = _ratio("fa2", "square", n, d, [m])
            if np.isfinite(ratio).all():
                rows.append(Row(f"{memory}: {m} words", f"d={d}", title, ratio))
    return rows


def _leading(d: int) -> float:
    """M over d^2 at which the leading terms of the counts agree, by bisection; 0.223 for large d.

    In units of N^2: 8 d / sqrt(M) + 1 of square tiling, 2 d (2 d + 3) / (M - 2 d) of
    FlashAttention.
    """
    low, high = 2.0 * d, float(d * d)
    for _ in range(100):
        m = (low + high) / 2
        flash_wins = 2 * d * (2 * d + 3) / (m - 2 * d) < 8 * d / math.sqrt(m) + 1
        low, high = (low, m) if flash_wins else (m, high)
    return high / (d * d)


def _crossing_rows(changes: dict[int, Values]) -> list[Row]:
    rows = []
    for d, found in changes.items():
        first, last = found["m"][0] / d**2, found["m"][-1] / d**2
        crossing = {
            "theorem, up to a constant": 1.0,
            "leading terms of the counts": _leading(d),
            "counted: the first": first,
            "counted: for good": last,
        }
        rows += [Row(name, f"d={d}", CROSSING, [value]) for name, value in crossing.items()]
        counts = {"over powers of two": _coarse(found, d), "over every M": len(found["m"])}
        rows += [Row(name, f"d={d}", CHANGES, [value]) for name, value in counts.items()]
    return rows


def _coarse(found: Values, d: int) -> int:
    """Changes of the winner from one power of two to the next."""
    powers = 2 ** np.arange(2, int(math.log2(d * d)) + 1)
    flash = np.searchsorted(found["m"], powers, side="right") % 2
    return int(np.abs(np.diff(flash)).sum())


def _time_rows(times: dict) -> list[Row]:
    return [
        Row(kind, f"N={n}", TIMES, [np.median(found["tiled"]) / np.median(found["plain"])])
        for (n, kind), found in times.items()
    ]


def _claims(
    config: ConfigDict, methods: list[str], executed: dict, changes: dict[int, Values]
) -> list[Claim]:
    claims = Claims(methods)
    add = functools.partial(claims.add, exact=True)
    n, octave = config.counted.n, config.counted.octave
    worst = lambda key: max(found[key].max() for found in executed.values())
    add(
        "What is executed moves and holds what the closed forms say (largest difference, words)",
        (),
        lambda: worst("difference"),
        at_most=0,
    )
    add(
        "and is softmax attention in float64 (log10 of the largest error)",
        (),
        lambda: np.log10(worst("error")),
        at_most=-12,
    )
    add(
        "No execution finishes more than M^2 / d^2 + 2 M scores within M transfers (largest ratio)",
        (),
        lambda: worst("dense"),
        at_most=1,
    )
    for d in config.counted.d:
        small, large = _small(config, d), _large(config, d)
        add(
            f"d={d}, M << d^2: square tiling moves words as M^-1/2 (slope + 1/2)",
            ("square",),
            lambda d=d, m=small: _slope(config, "square", d, m) + 0.5,
            within=0.05,
        )
        add(
            f"d={d}, d^2 << M << N d: FlashAttention as 1/M (slope + 1)",
            ("fa2",),
            lambda d=d, m=large: _slope(config, "fa2", d, m) + 1,
            within=0.05,
        )
        add(
            f"d={d}, M = d^2 / 8: square tiling moves less than FlashAttention (log2 of the ratio)",
            PAIR,
            lambda d=d: np.log2(_ratio("square", "fa2", n, d, [d * d // 8])),
            at_most=0,
        )
        add(
            f"d={d}, M = d^2: FlashAttention moves less than square tiling (log2 of the ratio)",
            PAIR,
            lambda d=d: np.log2(_ratio("fa2", "square", n, d, [d * d])),
            at_most=0,
        )
        add(
            f"d={d}, d^2 << M << N d: keys outside cost 1.5 times queries outside"
            " (largest difference of the ratio)",
            ("fa1", "fa2"),
            lambda d=d, m=large: np.abs(_ratio("fa1", "fa2", n, d, m) - 1.5).max(),
            at_most=0.1,
        )
    cells = [(size, d) for size in config.executed.n for d in config.executed.d]
    cells += [(n, d) for d in config.counted.d]

    def farthest() -> float:
        found = []
        for size, d in cells:
            m = _grid(64, 4 * size * d, octave)
            found.append((_better(size, d, m) / _bound(size, d, m)).max())
        return max(found)

    add(
        f"At every M the better of both moves at most {config.constant:g} times the bound",
        PAIR,
        farthest,
        at_most=config.constant,
    )
    _add_crossing(add, changes)

    for name, side in (
        ("as published (4 B^2 <= M)", lambda m: math.isqrt(m // 4)),
        ("with the largest tiles that fit (3 B^2 + B <= M)", _largest_side),
    ):
        for d in config.counted.d:
            add(
                f"d={d}, M << d^2: square tiling {name} moves less than three unfused passes"
                " (mean log2 of the ratio)",
                ("square", "unfused"),
                lambda d=d, side=side: _over_unfused(n, d, _small(config, d), side),
                at_most=0,
            )
    practical = [d for d in config.heads if d <= config.practical]
    chips = config.memories.values()
    add(
        f"Heads of up to {config.practical}, chips of today: FlashAttention moves less"
        " (largest log2 of the ratio)",
        PAIR,
        lambda: max(np.log2(_ratio("fa2", "square", n, d, chips)).max() for d in practical),
        at_most=0,
    )
    return claims


def _add_crossing(add: Callable, changes: dict[int, Values]) -> None:
    last = np.array([found["m"][-1] / d**2 for d, found in changes.items()])
    for name, factor in (("d^2", 1), ("d^2 / 4", 4)):
        add(
            f"The winner changes at {name}, within a factor of two (largest log2)",
            PAIR,
            lambda factor=factor: np.abs(np.log2(factor * last)).max(),
            at_most=1,
        )
    add(
        "The winner changes once, over powers of two (largest difference)",
        PAIR,
        lambda: max(abs(_coarse(found, d) - 1) for d, found in changes.items()),
        at_most=0,
    )
    add(
        "and over every M",
        PAIR,
        lambda: max(abs(len(found["m"]) - 1) for found in changes.values()),
        at_most=0,
    )


def _notes(config: ConfigDict) -> list[str]:
    options = config.time
    return [
        "; ".join(f"{kind}: {title}" for kind, title in TITLES.items()) + ".",
        "Words, not bytes; reads and writes; no causal mask. The bound has the constant 1.",
        "FlashAttention's inner tile is one row, its outer tile the largest that fits.",
        f"For long sequences and wide heads leading terms agree at M = {(20**0.5 - 4) ** 2:.3f}"
        " d^2: 8 d / sqrt(M) + 1 = 4 d^2 / M. Sides of tiles are whole numbers, so the winner can"
        " change to and fro nearby.",
        f"Times are ratios of medians, measured in turns, of tiles for {options.m} words with"
        f" d={options.d}; no claim rests on them.",
    ]


# Figures


def _curves(axes: Axes, methods: list[str], n: int, d: int, m: np.ndarray, by: Callable) -> Values:
    """Lines of all methods."""
    arrays: Values = {}
    for kind in methods:
        words = _words(kind, n, d, m)
        fits = np.isfinite(words)
        arrays[kind] = words
        colour = COLOURS[list(TITLES).index(kind)]
        axes.plot(by(m)[fits], words[fits], color=colour, label=TITLES[kind])
    return arrays


@styled
def _draw_words(run: Run, config: ConfigDict, methods: list[str], executed: dict) -> None:
    n, widths = max(config.executed.n), config.executed.d
    sizes = config.executed.m
    m = _grid(min(sizes), max(sizes), 16)
    figure, axes = panels(1, len(widths), size=(4.2, 3.6), sharey=True)
    arrays: Values = {"m": m}
    for panel, d in zip(axes[0], widths, strict=True):
        arrays[f"d{d}"] = _curves(panel, methods, n, d, m, lambda m: m)
        bound = _bound(n, d, m)
        panel.plot(m, bound, color="black", linestyle="--", label="lower bound, constant 1")
        for kind in methods:
            found = executed[kind, n, d, 0]
            colour = COLOURS[list(TITLES).index(kind)]
            panel.plot(found["m"], found["words"], "o", color=colour, markersize=3.5)
        panel.axvline(d * d, color="#999999", linestyle=":", linewidth=1)
        panel.set(xscale="log", yscale="log", title=f"N = {n}, d = {d}", xlabel="words of cache, M")
        panel.set_xscale("log", base=2)
        ends = {"$M^{-1/2}$": (min(sizes), d * d), "$M^{-1}$": (d * d, n * d)}
        ends["$N d$"] = (n * d, max(sizes))
        for text, (low, high) in ends.items():
            if max(low, min(sizes)) < min(high, max(sizes)):
                x = math.sqrt(max(low, min(sizes)) * min(high, max(sizes)))
                y = transfers.io_lower_bound(n, d, round(x))
                panel.annotate(
                    text,
                    (x, y),
                    (-4, -4),
                    textcoords="offset points",
                    ha="right",
                    va="top",
                    fontsize=8,
                )
        place = panel.get_xaxis_transform()
        panel.text(d * d * 1.1, 0.98, "$d^2$", transform=place, va="top", color="#666666")
    lowest = min(transfers.io_lower_bound(n, d, max(sizes)) for d in widths)
    axes[0, 0].plot([], [], "o", color="#666666", markersize=3.5, label="executed")
    axes[0, 0].set_ylabel("words moved")
    axes[0, 0].set_ylim(bottom=0.4 * lowest)
    legend(figure, axes[0, 0], columns=3)
    run.figure("words", figure, **arrays)


@styled
def _draw_ratios(run: Run, config: ConfigDict, methods: list[str]) -> None:
    n, widths = config.counted.n, config.counted.d
    figure, axes = panels(1, len(widths), size=(4.2, 3.4), sharey=True)
    arrays: Values = {}
    for panel, d in zip(axes[0], widths, strict=True):
        m = _grid(64, 4 * n * d, config.counted.octave)
        bound = _bound(n, d, m)
        arrays[f"d{d}"] = {"m": m, "bound": bound}
        for kind in methods:
            ratio = _words(kind, n, d, m) / bound
            fits = np.isfinite(ratio)
            colour = COLOURS[list(TITLES).index(kind)]
            panel.plot(m[fits] / d**2, ratio[fits], color=colour, label=TITLES[kind])
            arrays[f"d{d}"][kind] = ratio
        panel.axhline(1, color="black", linestyle="--", label="lower bound, constant 1")
        for x, text in ((1, "$d^2$"), (0.25, "$d^2/4$"), (n / d, "$N d$")):
            panel.axvline(x, color="#999999", linestyle=":", linewidth=1)
            ha = "right" if x == 0.25 else "left"
            place = panel.get_xaxis_transform()
            panel.text(x, 0.98, f" {text} ", transform=place, va="top", ha=ha, color="#666666")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set(
            title=f"N = $2^{{{math.log2(n):.3g}}}$, d = {d}", xlabel="words of cache over $d^2$"
        )
    axes[0, 0].set(ylabel="words moved over the lower bound", ylim=(0.8, 256))
    legend(figure, axes[0, 0], columns=3)
    run.figure("ratios", figure, **arrays)


if __name__ == "__main__":
    start(main)
