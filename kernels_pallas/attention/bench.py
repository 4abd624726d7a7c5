"""How fast attention is, and what memory it needs: `python -m kernels_pallas.attention.bench`.

In one run and in turns, so that ratios can be trusted on a busy machine: each implementation of
`flash_attention` that serves here, beside what others offer, `jax.nn.dot_product_attention`, an
einsum with heads first, JAX's own Pallas kernels for TPUs and GPUs, and tokamax where it is
installed. What cannot run is listed with the reason. Outputs and gradients are compared.

Operations are counted as 4 B N T S D forward, 2.5 times that backward, half of it if causal.
"""

import argparse
import datetime
import functools
import importlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention.api import flash_attention, implementations
from kernels_pallas.timing import in_turns

PARTS = {"forward": 1.0, "backward": 2.5, "both": 3.5}  # operations over those of forward
BASELINE = "jax.nn"
EINSUM = "einsum, heads first"
OURS = "ours: "
#: Largest difference from ours, over the largest value: beyond, a rival computes something else.
TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 1e-2, "float64": 1e-9}
#: A measurement calls so often that it takes so many seconds.
SHORTEST = 2e-3
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Case(NamedTuple):
    """Arguments of an attention of equal numbers of queries and keys.

    >>> Case(8, heads=4, kv_heads=2).operations
    65536
    """

    length: int
    heads: int = 4
    kv_heads: int | None = None
    size: int = 64
    causal: bool = False
    dtype: str = "float32"
    batch: int = 1

    @property
    def operations(self) -> int:
        """Of the forward part."""
        whole = 4 * self.batch * self.heads * self.length**2 * self.size
        return whole // 2 if self.causal else whole

    def draw(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """q, k, v and the gradient of the output."""
        rng = np.random.default_rng(seed)
        heads = (self.heads, *2 * [self.kv_heads or self.heads], self.heads)
        shapes = [(self.batch, self.length, n, self.size) for n in heads]
        return tuple(jnp.asarray(rng.normal(size=s), self.dtype) for s in shapes)


class Record(NamedTuple):
    """What was measured of one attention.

    Fields:
        case, name: of what.
        reason: why it did not run; empty if it did.
        difference: of output and gradients from ours, largest, over the largest value of each.
        seconds: by part, one value a turn.
        temporary: by part, bytes of temporary memory of the compiled program.
    """

    case: Case
    name: str
    reason: str = ""
    difference: float = math.nan
    seconds: Mapping[str, Sequence[float]] = {}
    temporary: Mapping[str, int] = {}

    def rate(self, part: str) -> float:
        """Operations a second."""
        return PARTS[part] * self.case.operations / float(np.median(self.seconds[part]))

    @property
    def differs(self) -> bool:
        """Whether it computes something else."""
        return not self.reason and not self.difference <= TOLERANCE[self.case.dtype]


def measure(
    cases: Iterable[Case],
    repeats: int = 7,
    *,
    parts: Sequence[str] = tuple(PARTS),
    more: Mapping[str, Callable[[Case], Attention]] | None = None,
    only: Iterable[str] | None = None,
) -> list[Record]:
    """Time forward, backward, and both together, of all attentions in turns.

    Args:
        cases: what is attended to; their arrays are drawn.
        repeats: turns.
        parts: of `PARTS`.
        more: makers of further attentions, or in place of known ones; one that raises is listed.
        only: names; None for all.

    Raises:
        ValueError: a name that there is not.

    >>> found = measure([Case(8, size=4)], repeats=2, only=["ours: xla", "jax.nn"])
    >>> [(record.name, record.reason, len(record.seconds["both"])) for record in found]
    [('ours: xla', '', 2), ('jax.nn', '', 2)]
    """
    found = []
    for case in cases:
        given = case.draw()
        programs: dict[str, _Programs] = {}
        reasons: dict[str, str] = {}
        ours: list[np.ndarray] = []
        differences = {}
        makers = {**_ours(case), **RIVALS, **(more or {})}
        names = list(makers if only is None else only)
        if unknown := [name for name in names if name not in makers]:
            raise ValueError(f"only: no attention {unknown[0]!r}; there are {', '.join(makers)}")
        # The first of all is what others are compared with, even if it is not asked for.
        for name in dict.fromkeys([next(iter(makers)), *names]):
            try:
                made = _Programs(makers[name](case), given, parts)
                results = made.results()
            except Exception as error:
                reasons[name] = _line(error)
                continue
            ours = ours or results
            differences[name] = _difference(results, ours)
            if name in names:
                programs[name] = made
        keys = [(name, part) for name in programs for part in parts]
        calls = [programs[name].calls[part] for name, part in keys]
        # Each after a call of its own: programs of gigabytes slow down what follows them.
        taken = in_turns(calls, repeats, shortest=SHORTEST, ahead=1).tolist()
        seconds = dict(zip(keys, taken, strict=True))
        for name in names:
            if name in reasons:
                found.append(Record(case, name, reasons[name]))
                continue
            own = {part: seconds[name, part] for part in parts}
            temporary = programs[name].temporary
            found.append(Record(case, name, "", differences[name], own, temporary))
    return found


class _Programs:
    """An attention, compiled: forward, backward from what forward keeps, and both."""

    def __init__(self, attend: Attention, given: tuple[jax.Array, ...], parts: Sequence[str]):
        q, k, v, dout = given
        both = lambda q, k, v, dout: _with_gradients(attend, q, k, v, dout)
        self.both, self.given = jax.jit(both).lower(*given).compile(), given
        self.calls: dict[str, Callable[[], Any]] = {"both": functools.partial(self.both, *given)}
        _refuse_what_does_not_fit(self.both)
        compiled = {"both": self.both}
        if "forward" in parts:
            compiled["forward"] = jax.jit(attend).lower(q, k, v).compile()
            self.calls["forward"] = functools.partial(compiled["forward"], q, k, v)
        if "backward" in parts:
            _, pull = jax.jit(lambda *qkv: jax.vjp(attend, *qkv))(q, k, v)
            compiled["backward"] = (
                jax.jit(lambda pull, dout: pull(dout)).lower(pull, dout).compile()
            )
            self.calls["backward"] = functools.partial(compiled["backward"], pull, dout)
        self.temporary = {part: _temporary(compiled[part]) for part in parts}

    def results(self) -> list[np.ndarray]:
        """Output and gradients; all parts have run once, so that what cannot run is known."""
        jax.block_until_ready([call() for call in self.calls.values()])
        return [np.asarray(x, np.float64) for x in self.both(*self.given)]


def _with_gradients(attend: Attention, q, k, v, dout) -> tuple[jax.Array, ...]:
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(dout)


def _temporary(compiled: Any) -> int:
    return int(compiled.memory_analysis().temp_size_in_bytes)


def _refuse_what_does_not_fit(compiled: Any) -> None:
    """A CPU's process would be killed; other devices raise."""
    if jax.default_backend() == "cpu" and hasattr(os, "sysconf"):
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        if _temporary(compiled) > most:
            needed = _temporary(compiled) / 2**30
            raise MemoryError(f"needs {needed:.0f} GiB, more than half of this machine's memory")


def _difference(results: list[np.ndarray], ours: list[np.ndarray]) -> float:
    """Largest, over the largest value of each array."""
    scaled = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(results, ours, strict=True)]
    return float(max(scaled))


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]


# What is measured


def _ours(case: Case) -> dict[str, Callable[[Case], Attention]]:
    """Implementations that can serve here, the chosen one first."""
    told = implementations(*case.draw()[:3], causal=case.causal)
    usable = sorted(
        (name for name, text in told.items() if text in ("chosen", "can serve")),
        key=lambda name: told[name] != "chosen",
    )
    make = lambda name: (
        lambda case: functools.partial(flash_attention, causal=case.causal, implementation=name)
    )
    return {f"{OURS}{name}": make(name) for name in usable}


def _jax_nn(case: Case, implementation: str = "xla") -> Attention:
    if implementation == "cudnn":
        _need("gpu")
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=case.causal, implementation=implementation
    )


def _einsum(case: Case) -> Attention:
    def attend(q, k, v):
        (b, t, n, d), heads = q.shape, k.shape[2]
        q = (q / math.sqrt(d)).reshape(b, t, heads, n // heads, d).transpose(0, 2, 3, 1, 4)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        scores = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32)
        if case.causal:
            scores = jnp.where(jnp.tri(t, dtype=bool), scores, -jnp.inf)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        out = jnp.einsum("bkgts,bksd->bkgtd", weights, v)
        return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, -1)

    return attend


def _tpu_flash(case: Case) -> Attention:
    _need("tpu")
    kernel = importlib.import_module("jax.experimental.pallas.ops.tpu.flash_attention")
    scale = 1 / math.sqrt(case.size)

    def attend(q, k, v):
        first = [x.swapaxes(1, 2) for x in (q, *_repeated(case, k, v))]
        out = kernel.flash_attention(*first, causal=case.causal, sm_scale=scale)
        return out.swapaxes(1, 2)

    return attend


def _tpu_splash(case: Case) -> Attention:
    _need("tpu")
    splash = importlib.import_module("jax.experimental.pallas.ops.tpu.splash_attention")
    shape = (case.length, case.length)
    mask = splash.CausalMask(shape) if case.causal else splash.FullMask(shape)
    masks = splash.MultiHeadMask([mask] * case.heads)
    kernel = splash.make_splash_mha(masks, head_shards=1, q_seq_shards=1)

    def attend(q, k, v):
        q = q / math.sqrt(case.size)
        return jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v))).swapaxes(1, 2)

    return attend


def _gpu_triton(case: Case) -> Attention:
    _need("gpu")
    mha = importlib.import_module("jax.experimental.pallas.ops.gpu.attention").mha
    scale = 1 / math.sqrt(case.size)
    return lambda q, k, v: mha(
        q, *_repeated(case, k, v), segment_ids=None, sm_scale=scale, causal=case.causal
    )


def _gpu_mosaic(case: Case) -> Attention:
    _need("gpu")
    mgpu = importlib.import_module("jax.experimental.pallas.ops.gpu.attention_mgpu")
    backward = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
    config = mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=case.causal, **backward
    )
    return lambda q, k, v: mgpu.attention(q / math.sqrt(case.size), k, v, config)


def _tokamax(case: Case) -> Attention:
    tokamax = importlib.import_module("tokamax")
    return functools.partial(tokamax.dot_product_attention, is_causal=case.causal)


def _need(platform: str) -> None:
    if jax.default_backend() != platform:
        raise NotImplementedError(f"it runs on {platform.upper()}s; there is none here")


def _repeated(case: Case, *keys: jax.Array) -> list[jax.Array]:
    """For kernels without grouped queries."""
    group = case.heads // (case.kv_heads or case.heads)
    return [jnp.repeat(x, group, axis=2) if group > 1 else x for x in keys]


#: Makers of attentions in the layout of ours; one that cannot run raises.
RIVALS: dict[str, Callable[[Case], Attention]] = {
    BASELINE: _jax_nn,
    "jax.nn, cuDNN": functools.partial(_jax_nn, implementation="cudnn"),
    EINSUM: _einsum,
    "jax Pallas flash, TPU": _tpu_flash,
    "jax Pallas splash, TPU": _tpu_splash,
    "jax Pallas mha, Triton": _gpu_triton,
    "jax Pallas mgpu": _gpu_mosaic,
    "tokamax": _tokamax,
}


# What is told


def table(records: Iterable[Record]) -> str:
    """Medians in ms with TFLOP/s and, in brackets, times over `jax.nn`'s of the same turn.

    >>> record = Record(Case(1000), "slow", "", 0.0, {"both": [1.0]}, {"both": 2**20})
    >>> print(table([record]))
    N=1000, 4 heads of 64, full, float32
                                      both              MiB  difference
    slow                              1000.00 0.00 (-)  1    0.0e+00
    """
    lines: list[str] = []
    for case, group in itertools.groupby(records, key=lambda record: record.case):
        found = list(group)
        lines += [""] if lines else []
        lines += [_title(case), *_lines(found)]
    return "\n".join(lines)


def _title(case: Case) -> str:
    heads = f"{case.heads} heads of {case.size}"
    if case.kv_heads not in (None, case.heads):
        heads += f" over {case.kv_heads} of keys"
    batch = f"batch {case.batch}, " if case.batch > 1 else ""
    mask = "causal" if case.causal else "full"
    return f"{batch}N={case.length}, {heads}, {mask}, {case.dtype}"


def _lines(found: list[Record]) -> list[str]:
    ran = [record for record in found if not record.reason]
    base = next((record for record in ran if record.name == BASELINE), None)
    parts = list(ran[0].seconds) if ran else []
    rows = [["", *parts, "MiB", "difference"]]
    for record in ran:
        cells = [_cell(record, part, base) for part in parts]
        memory = f"{record.temporary[parts[-1]] / 2**20:.3g}"
        unequal = " DIFFERS" if record.differs else ""
        rows.append([record.name, *cells, memory, f"{record.difference:.1e}{unequal}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    widths[0] = max(widths[0], 32)
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines += [
        f"{record.name.ljust(widths[0])}  {record.reason}" for record in found if record.reason
    ]
    return [line.rstrip() for line in lines]


def _cell(record: Record, part: str, base: Record | None) -> str:
    text = f"{1e3 * np.median(record.seconds[part]):.2f} {1e-12 * record.rate(part):.2f}"
    if base is None or record is base:
        return f"{text} (-)"
    return f"{text} ({ratio(record, base, part):.2f})"


def ratio(record: Record, base: Record, part: str) -> float:
    """Median over turns of the time of one over that of the other.

    >>> slow, fast = (Record(Case(8), "", "", 0.0, {"both": [s, 2 * s]}) for s in (3.0, 1.0))
    >>> ratio(slow, fast, "both")
    3.0
    """
    return float(np.median(np.divide(record.seconds[part], base.seconds[part])))


def standing(records: Iterable[Record], part: str) -> float:
    """Rate of the first of ours over that of the fastest rival, geometric mean of all cases.

    NaN where a case has no rival that computes the same.

    >>> made = lambda name, seconds: Record(Case(8), name, "", 0.0, {"both": [seconds]})
    >>> ours, rival = made("ours: xla", 2.0), made("jax.nn", 1.0)
    >>> standing([ours, rival], "both")
    0.5
    """
    ratios = []
    for _, group in itertools.groupby(records, key=lambda record: record.case):
        ran = [r for r in group if not r.reason and not r.differs]
        ours = [r.rate(part) for r in ran if r.name.startswith(OURS)]
        rivals = [r.rate(part) for r in ran if not r.name.startswith(OURS)]
        ratios.append(ours[0] / max(rivals) if ours and rivals else math.nan)
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else math.nan


def matrix_rate(size: int, dtype: str, repeats: int = 5) -> float:
    """Operations a second of a product of two square matrices: what the machine can do.

    >>> matrix_rate(8, "float32") > 0
    True
    """
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    seconds = in_turns([lambda: product(x, x)], repeats, shortest=SHORTEST, ahead=1)
    return 2 * size**3 / float(np.median(seconds))


def as_json(records: Sequence[Record], **settings: Any) -> str:
    """All that was measured, where, when and with what.

    >>> sorted(json.loads(as_json([])))
    ['date', 'device', 'devices', 'jax', 'platform', 'records', 'settings']
    """
    device = jax.devices()[0]
    told = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "platform": device.platform,
        "devices": len(jax.devices()),
        "jax": jax.__version__,
        "settings": settings,
        "records": [{**r._asdict(), "case": r.case._asdict()} for r in records],
    }
    for record in told["records"]:
        record["difference"] = None if math.isnan(record["difference"]) else record["difference"]
    return json.dumps(told, indent=1)


def draw(records: Sequence[Record], path: Path) -> bool:
    """A PNG of times and temporary memory against length; False without matplotlib."""
    try:
        figures = importlib.import_module("matplotlib.figure")
        tickers = importlib.import_module("matplotlib.ticker")
    except ImportError:
        return False
    ran = [record for record in records if not record.reason]
    kinds = list(dict.fromkeys(record.case._replace(length=0) for record in ran))
    names = list(dict.fromkeys(record.name for record in ran))
    parts = list(ran[0].seconds) if ran else []
    shape = (max(len(kinds), 1), len(parts) + 1)
    figure = figures.Figure(figsize=(3.3 * shape[1], 2.9 * shape[0] + 0.6), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    for kind, line in zip(kinds, axes, strict=False):
        for panel, part in zip(line, [*parts, ""], strict=True):
            for i, name in enumerate(names):
                of = [r for r in ran if r.name == name and r.case._replace(length=0) == kind]
                of.sort(key=lambda record: record.case.length)
                value = lambda record, part=part: (
                    1e3 * np.median(record.seconds[part])
                    if part
                    else record.temporary[parts[-1]] / 2**20
                )
                panel.plot(
                    [record.case.length for record in of],
                    [value(record) for record in of],
                    marker="o",
                    markersize=3.5,
                    color=f"C{i}",
                    linewidth=2.2 if name.startswith(OURS) else 1.2,
                    label=name,
                )
            lengths = sorted({r.case.length for r in ran if r.case._replace(length=0) == kind})
            panel.set(
                xscale="log",
                yscale="log",
                xlabel="length",
                title=f"{part} (ms)" if part else "temporary memory (MiB)",
            )
            panel.set_xticks(lengths, [str(length) for length in lengths])
            panel.xaxis.set_minor_locator(tickers.NullLocator())
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(_title(kind).replace("N=0, ", ""), fontsize=8)
    if ran:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", fontsize=9)
    figure.savefig(path, dpi=150)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    fast = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.attention.bench",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    lengths = [1024, 4096, 16384] if fast else [512, 1024, 2048, 4096]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="of the sequences")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--tokens",
        type=int,
        default=16384 if fast else None,
        help="in all: the batch is as many over the length",
    )
    parser.add_argument(
        "--matrix",
        type=int,
        default=8192 if fast else None,
        help="size of a product of matrices to compare rates with",
    )
    parser.add_argument("--heads", type=int, default=16 if fast else 4, help="of queries")
    parser.add_argument("--kv-heads", type=int, help="of keys; as many as of queries if not given")
    parser.add_argument("--size", type=int, default=128 if fast else 64, help="of a head")
    parser.add_argument("--causal", choices=("no", "yes", "both"), default="no")
    parser.add_argument(
        "--dtype", choices=sorted(TOLERANCE), default="bfloat16" if fast else "float32"
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns; medians are shown")
    parser.add_argument("--out", type=Path, default=Path("runs/attention_bench"), help="a folder")
    given = parser.parse_args(arguments)
    kv_heads = given.kv_heads or given.heads
    if given.heads % kv_heads:
        parser.error(f"--heads {given.heads} do not divide into groups for --kv-heads {kv_heads}")
    if min(*given.lengths, given.batch, given.heads, kv_heads, given.size, given.repeats) < 1:
        parser.error("numbers are positive")
    jax.config.update("jax_enable_x64", given.dtype == "float64")
    masks = {"no": (False,), "yes": (True,), "both": (False, True)}[given.causal]
    sizes = {"heads": given.heads, "kv_heads": kv_heads, "size": given.size}
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("ms, TFLOP/s (time over that of jax.nn); MiB of temporary memory of both\n")
    records: list[Record] = []
    for causal in masks:
        for n in sorted(set(given.lengths)):
            batch = max(1, given.tokens // n) if given.tokens else given.batch
            case = Case(n, **sizes, causal=causal, dtype=given.dtype, batch=batch)
            found = measure([case], given.repeats)
            print(table(found), end="\n\n", flush=True)
            records += found
    peak = matrix_rate(given.matrix, given.dtype) if given.matrix else math.nan
    for part in PARTS:
        text = f"{part}: {standing(records, part):.2f} of the fastest rival's rate, geometric mean"
        ours = [r.rate(part) for r in records if r.name.startswith(OURS) and not r.reason]
        if given.matrix and ours:
            rate = f"{peak / 1e12:.3g} TFLOP/s"
            text += f"; at best {max(ours) / peak:.2f} of a product of matrices ({rate})"
        print(text)
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(given).items()}
    settings["matrix_rate"] = None if math.isnan(peak) else peak
    (given.out / "attention.json").write_text(as_json(records, **settings))
    drawn = draw(records, given.out / "attention.png")
    picture = " and attention.png" if drawn else "; no figure without matplotlib"
    print(f"{given.out}/attention.json{picture}")


if __name__ == "__main__":
    main()
