"""Trainings measured by real processes over real TCP, on the slow links of `hosts`.

An experiment says which trainings to run; every host's process builds them for itself.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rlib.experiment.environment import CHECKOUT
from rlib.experiment.figures import COLOURS, legend, panels, styled
from rlib.experiment.hosts import slow_hosts
from rlib.experiment.report import Claim, Row, judge
from rlib.experiment.run import Run
from rlib.parallel import TrainStep, shard_batch

#: training -> "step" (names, one a step), "seconds", "bytes" and "loss" (repetitions, steps)
Measured = dict[str, dict[str, np.ndarray]]


class Training(NamedTuple):
    """A training that `measured` runs on every host.

    Fields:
        phases: (name of the step, step, how often), in order; they share the first one's state.
        params, frozen: where it starts.
        batches: () -> iterator of whole batches, the same in every process.
    """

    phases: Sequence[tuple[str, TrainStep, int]]
    params: Any
    frozen: Any
    batches: Callable[[], Iterator[Any]]


def measured(run: Run, build: str, options: ConfigDict) -> dict[float, Measured]:
    """Run trainings on hosts with slow links, for each rate of `options.megabits`.

    Args:
        build: "module:function"; the function takes `options` and gives a Training by name. Called
            in every process, after `jax.distributed.initialize`.
        options: megabits a second of each host's link, in each direction, several; hosts; repeats,
            how often every training runs, in turn, each time from its start; timeout in seconds,
            for one link; and what `build` needs.

    Returns:
        By megabits; seconds of steps compiled beforehand, and bytes that host 0's interface sent,
        protocols included.

    Raises:
        UsageError: slow links cannot be made here.
        RuntimeError: a process failed or took too long; with the ends of what all wrote.
    """
    return {
        megabits: run.cached(f"network/{megabits:g}", partial(_measure, build, options, megabits))
        for megabits in options.megabits
    }


def costs(options: ConfigDict) -> dict[str, float]:
    """Units of `measured` and their rough seconds."""
    return {f"network/{m:g}": 60 + options.repeats * 1e4 / m for m in options.megabits}


def _measure(build: str, options: ConfigDict, megabits: float) -> Measured:
    flags = os.environ.get("XLA_FLAGS", "").split()
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # A host has one device, also where the caller has several.
        "XLA_FLAGS": " ".join(f for f in flags if "host_platform_device_count" not in f),
        "PYTHONPATH": str(CHECKOUT),
    }
    with slow_hosts(options.hosts, megabits) as hosts, TemporaryDirectory() as folder:
        code = f"import sys; from {__name__} import _work; _work(*sys.argv[1:])"
        job = [code, build, f"{hosts[0].address}:12356", options.to_json()]
        logs = [Path(folder, f"{kind}{rank}") for kind in "oe" for rank in range(len(hosts))]
        with contextlib.ExitStack() as stack:
            outs = [stack.enter_context(log.open("w")) for log in logs]
            processes = [
                subprocess.Popen(
                    host.command(sys.executable, "-c", *job, str(rank)),
                    stdout=outs[rank],
                    stderr=outs[len(hosts) + rank],
                    env=environment,
                )
                for rank, host in enumerate(hosts)
            ]
            try:
                _wait(processes, options.timeout)
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
        texts = [log.read_text() for log in logs]
    output, errors = texts[0], texts[len(hosts) :]
    if any(process.returncode for process in processes):
        ends = "\n".join(f"host {rank}: {text[-1500:]}" for rank, text in enumerate(errors))
        raise RuntimeError(f"processes on slow links failed, or took too long:\n{ends}")
    found = json.loads(output.splitlines()[-1])
    return {name: {k: np.asarray(v) for k, v in by.items()} for name, by in found.items()}


def _wait(processes: list[subprocess.Popen], timeout: float) -> None:
    """Until all have ended, one has failed, or `timeout` seconds are over."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        states = [process.poll() for process in processes]
        if None not in states or any(states):
            return
        time.sleep(0.1)


def _work(build: str, coordinator: str, options_text: str, rank: str) -> None:
    """One process of `_measure`; process 0 prints what it measured as JSON."""
    options = ConfigDict(json.loads(options_text))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, options.hosts, int(rank))
    module, function = build.split(":")
    trainings = getattr(import_module(module), function)(options)
    for training in trainings.values():
        _timed(training, [1] * len(training.phases))
    found: dict[str, list[dict[str, list[float]]]] = {name: [] for name in trainings}
    for _ in range(options.repeats):
        for name, training in trainings.items():
            found[name].append(_timed(training, [count for *_, count in training.phases]))
    if rank == "0":
        made = {
            name: {key: [r[key] for r in repeats] for key in ("seconds", "bytes", "loss")}
            | {"step": [step for step, _, n in trainings[name].phases for _ in range(n)]}
            for name, repeats in found.items()
        }
        print(json.dumps(made), flush=True)


def _timed(training: Training, counts: Sequence[int]) -> dict[str, list[float]]:
    state = training.phases[0][1].init(training.params, training.frozen)
    batches = training.batches()
    found: dict[str, list[float]] = {"seconds": [], "bytes": [], "loss": []}
    for (_, train, _), count in zip(training.phases, counts, strict=True):
        for _ in range(count):
            batch = shard_batch(train.mesh, next(batches))
            jax.block_until_ready((state, batch))
            before, begun = _sent_bytes(), time.perf_counter()
            state, metrics = train.step(state, batch)
            jax.block_until_ready(state)
            found["seconds"].append(time.perf_counter() - begun)
            found["bytes"].append(_sent_bytes() - before)
            found["loss"].append(float(metrics["loss"]))
    return found


def _sent_bytes() -> int:
    """Bytes that left the host of this process by its interface since the host was made."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def per_step(found: Measured, step: str, key: str) -> np.ndarray:
    """Values of `key` over all steps of that name, in any training."""
    return np.concatenate([by[key][:, by["step"] == step].ravel() for by in found.values()])


def network_rows(links: dict[float, Measured]) -> list[Row]:
    """Seconds and megabytes by step and link, seconds and last loss by training and link."""
    rows = []
    for megabits, found in links.items():

        def add(name: str, title: str, values: np.ndarray, link: str = f"{megabits:g} Mbit/s"):
            rows.append(Row(name, link, title, [float(v) for v in values]))

        for step in _step_names(found):
            add(step, "Seconds a step", per_step(found, step, "seconds"))
            add(step, "Megabytes a host sent in a step", per_step(found, step, "bytes") / 1e6)
        for name, by in found.items():
            add(name, "Seconds of a training", by["seconds"].sum(axis=1))
            add(name, "Training loss at its last step", by["loss"][:, -1])
    return rows


def step_claim(
    sentence: str, found: Measured, key: str, much: str, little: str, *, at_least: float
) -> Claim:
    """Judge the mean "seconds" or "bytes" of steps `much` over those of each step `little`."""
    ratios = per_step(found, much, key).mean() / per_step(found, little, key)
    return judge(sentence, [float(r) for r in ratios], at_least=at_least)


def training_claim(
    sentence: str, found: Measured, slow: str, fast: str, *, at_least: float
) -> Claim:
    """Judge the duration of training `slow` over that of `fast`, repetition by repetition."""
    ratios = found[slow]["seconds"].sum(axis=1) / found[fast]["seconds"].sum(axis=1)
    return judge(sentence, [float(r) for r in ratios], at_least=at_least)


@styled
def draw_network(run: Run, links: dict[float, Measured]) -> None:
    """Figure slow_network: seconds a step by link; loss by seconds on each link."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if not links:
        return
    rates, first = sorted(links), next(iter(links.values()))
    steps = _step_names(first)
    figure, axes = panels(1, 1 + len(rates), size=(3.2, 2.9))
    arrays: dict[str, Any] = {}
    for colour, step in zip(_colours(steps), steps, strict=True):
        seconds = np.stack([per_step(links[rate], step, "seconds") for rate in rates])
        axes[0, 0].errorbar(
            rates, seconds.mean(axis=1), seconds.std(axis=1),
            color=colour, marker="o", markersize=3, label=step,
        )  # fmt: skip
        arrays[f"seconds {step}"] = seconds
    axes[0, 0].set(xscale="log", yscale="log", xlabel="Mbit/s", ylabel="seconds a step")
    axes[0, 0].set_title("one step")
    axes[0, 0].set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes[0, 0].tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].yaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].legend()
    for ax, rate in zip(axes[0, 1:], rates, strict=True):
        for colour, (name, by) in zip(_colours(first), links[rate].items(), strict=True):
            ends = np.cumsum(by["seconds"], axis=1)
            ax.plot(ends.mean(axis=0), by["loss"].mean(axis=0), color=colour, label=name)
            arrays |= {f"seconds {name} {rate:g}": ends, f"loss {name} {rate:g}": by["loss"]}
        ax.set(title=f"training at {rate:g} Mbit/s", xlabel="seconds", ylabel="training loss")
    legend(figure, axes[0, 1])
    run.figure("slow_network", figure, **arrays)


def _step_names(found: Measured) -> list[str]:
    return list(dict.fromkeys(str(name) for by in found.values() for name in by["step"]))


def _colours(names: Sequence[str] | Measured) -> list[str]:
    """Black and grey for the uncompressed, which come first."""
    return ["black", "#999999", *COLOURS][: len(names)]
