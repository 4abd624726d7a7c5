"""`python -m experiments.NAME`: flags, devices, signals, errors and the report."""

import inspect
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from rlib.data import DataUnavailable
from rlib.experiment import config as configs
from rlib.experiment.environment import CHECKOUT
from rlib.experiment.errors import Stopped, UsageError
from rlib.experiment.report import Report
from rlib.experiment.run import Run
from rlib.experiment.store import write_trouble

_HELP = """
usage: python -m experiments.{name} [--config=FILE:PRESET] [--config.KEY=VALUE ...] [FLAG ...]

presets of configs/{name}.py: {presets}

flags:
{flags}
examples:
  python -m experiments.{name} --config=configs/{name}.py:smoke
  python -m experiments.{name} --config.{key}={value} --seeds=3
  python -m experiments.{name} --workdir=runs/{name}/mine      (again, to continue it)
  python -m experiments.{name} --distributed --coordinator=HOST:PORT --processes=2 --process=0
"""


def _define_flags(name: str) -> flags.FlagValues:
    values = flags.FlagValues()

    def string(flag: str, default: str | None, text: str) -> None:
        flags.DEFINE_string(flag, default, text, flag_values=values)

    def number(flag: str, text: str) -> None:
        flags.DEFINE_integer(flag, None, text, lower_bound=0, flag_values=values)

    def switch(flag: str, text: str) -> None:
        flags.DEFINE_boolean(flag, False, text, flag_values=values)

    string(
        "config",
        f"configs/{name}.py:default",
        "FILE:PRESET, from here or from the checkout; --config.KEY=VALUE changes one value.",
    )
    string("workdir", None, f"Where results go; continued if it exists (runs/{name}/TIME).")
    flags.DEFINE_list("only", [], "Methods to run, with commas; else all.", flag_values=values)
    number("seeds", "Number of seeds of every part, instead of the config's.")
    switch("distributed", "Join the run's other processes; all by itself on a TPU pod.")
    string("coordinator", None, "HOST:PORT of process 0.")
    number("processes", "Number of processes.")
    number("process", "Number of this process, from 0.")
    switch("help", "Show this help.")
    return values


def start(main: FunctionType, *, memory_keys: Sequence[str] = (), cpu_devices: int = 1) -> None:
    """Run an experiment from the command line; the last line of its module.

    Exit status: 0 done, 1 failed, 2 a mistake in the command, 130 / 143 stopped by Ctrl-C /
    SIGTERM (the same command with `--workdir` continues).

    Args:
        main: `main(config, run) -> Report`.
        memory_keys: configuration keys to lower when memory runs out, best first.
        cpu_devices: into how many a CPU is split where the mesh takes all there are (-1). More
            than 1 for programs of many small operations, which leave cores idle.

    >>> def main(config, run=None): ...
    >>> if __name__ == "__main__":  # the end of experiments/NAME.py
    ...     start(main)
    """
    spec = sys.modules["__main__"].__spec__
    name = spec.name.rsplit(".", 1)[-1] if spec is not None else Path(sys.argv[0]).stem
    folder = CHECKOUT / "experiments"
    here = Path(inspect.getsourcefile(main) or "").resolve()
    if spec is not None and spec.name.startswith("experiments.") and folder not in here.parents:
        sys.exit(_shadowed(name, here, folder))
    status = run_guarded(main, name, sys.argv[1:], memory_keys, cpu_devices)
    sys.stdout.flush()
    if status and jax.distributed.is_initialized():
        os._exit(status)  # the others would wait for us in a barrier
    sys.exit(status)


def _shadowed(name: str, here: Path, folder: Path) -> int:
    line = f"{name}: {here.parent} shadows {folder}; run from another folder, such as {CHECKOUT}"
    print(line, file=sys.stderr)
    return 2


def run_guarded(
    main: FunctionType,
    name: str,
    argv: list[str],
    memory_keys: Sequence[str],
    cpu_devices: int = 1,
) -> int:
    """Run, and turn every way to fail into one line and an exit status."""
    errors = Console(stderr=True, soft_wrap=True)
    resume = workdir = ""

    def fail(line: str) -> int:
        errors.print(f"{name}: {line}", markup=False, highlight=False)
        return 1

    run: Run | None = None
    try:
        values, overrides = _parse(name, argv)
        if values["help"]:
            print(_help(main, name))
            return 0
        config, preset, path = configs.load(values["config"], overrides, CHECKOUT)
        console = Console(soft_wrap=True)
        if not console.is_terminal:
            console.width = 120
        _start_devices(config, values, cpu_devices)
        workdir = values["workdir"] or f"runs/{name}/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        resume = _command(name, values, overrides, workdir)
        run = Run(
            workdir,
            experiment=name,
            preset=preset,
            config=config,
            seeds=values["seeds"],
            only=values["only"],
            overrides=overrides,
            console=console,
        )
        if path != CHECKOUT / "configs" / f"{name}.py":
            run.say(f"using {path}")
        _announce(main, run, config, workdir)
        report = run.finished()
        if report is not None:
            run.say(f"{workdir} holds this run, finished; its report again:")
        else:
            run.listen()
            report = run.finish(main(config, run))
        if jax.process_index() == 0:
            report.show(console)
            run.say(f"{_closing(report)} Everything is in {workdir} (start with report.md).")
        return 0
    except UsageError as error:
        fail(str(error))
        return 2
    except DataUnavailable as error:
        return fail(str(error))
    except (Stopped, KeyboardInterrupt) as error:
        signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
        fail(f"stopped; what is done is saved. Continue with: {resume}")
        return 128 + int(signum)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            keys = " or ".join(f"--config.{key}" for key in memory_keys) or "the sizes"
            return fail(f"out of memory: lower {keys}. What is done is saved: {resume}")
        traceback.print_exc()
        return fail(f"failed; what is done is saved. Continue with: {resume}")
    except OSError as error:
        trouble = write_trouble(error, workdir)
        if trouble is None:
            traceback.print_exc()
            trouble = f"failed; what is done is saved. Continue with: {resume}"
        return fail(trouble)
    except Exception:
        traceback.print_exc()
        return fail(
            f"failed; what is done is saved. Continue with: {resume}" if resume else "failed"
        )
    finally:
        if run is not None:
            run.close()


def _parse(name: str, argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The flags, and the --config.KEY=VALUE arguments apart."""
    is_override = [arg.lstrip("-").removeprefix("no").startswith("config.") for arg in argv]
    overrides = [arg for arg, yes in zip(argv, is_override, strict=True) if yes]
    values = _define_flags(name)
    try:
        rest = values([name, *(a for a, yes in zip(argv, is_override, strict=True) if not yes)])
    except flags.Error as error:
        raise UsageError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise UsageError(f"unexpected argument {rest[1]!r}; see --help")
    return {flag: values[flag].value for flag in values}, overrides


def _command(name: str, values: dict[str, Any], overrides: list[str], workdir: str) -> str:
    """The command line that continues this run."""
    words = ["python", "-m", f"experiments.{name}", f"--config={values['config']}", *overrides]
    words += [f"--only={','.join(values['only'])}"] if values["only"] else []
    for flag in ("seeds", "coordinator", "processes", "process"):
        words += [f"--{flag}={values[flag]}"] if values[flag] is not None else []
    words += ["--distributed"] if values["distributed"] else []
    return shlex.join([*words, f"--workdir={workdir}"])


def _help(main: FunctionType, name: str) -> str:
    module = configs.load_module(CHECKOUT / "configs" / f"{name}.py")
    known = configs.flat(module.get_config("default"))
    key, value = next((k, v) for k, v in known.items() if isinstance(v, int) and k != "seeds")
    values = _define_flags(name)
    lines = "".join(f"  --{flag:13s} {values[flag].help}\n" for flag in values)
    doc = inspect.cleandoc(main.__globals__["__doc__"])
    presets = ", ".join(module.PRESETS)
    return doc + "\n" + _HELP.format(name=name, presets=presets, flags=lines, key=key, value=value)


def _start_devices(config: ConfigDict, values: dict[str, Any], cpu_devices: int) -> None:
    """Join the other processes; on a CPU, start as many devices as the mesh names."""
    needed = 1
    for size in config.mesh.values():
        needed *= cpu_devices if size == -1 else size
    processes = values["processes"] or 1
    if needed > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", max(1, needed // processes))
    coordinator, processes, process = (values[k] for k in ("coordinator", "processes", "process"))
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not (all(given) and values["distributed"]):
        raise UsageError("--distributed, --coordinator, --processes and --process go together")
    if not values["distributed"]:
        return
    if all(given) and process >= processes:
        raise UsageError(f"--process={process}: processes count from 0 to {processes - 1}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process, initialization_timeout=60)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"--distributed: {reason}") from error


def _announce(main: FunctionType, run: Run, config: ConfigDict, workdir: str) -> None:
    run.say(inspect.cleandoc(main.__globals__["__doc__"]).splitlines()[0])
    run.say(f"preset {run.preset}: expect {config.expected}")
    run.say(f"work directory {workdir}, devices {jax.device_count()} x {jax.devices()[0].platform}")


def _closing(report: Report) -> str:
    verdicts = [claim.verdict for claim in report.claims]
    counts = [f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)]
    return f"Claims: {', '.join(counts) or 'none tested'}."
