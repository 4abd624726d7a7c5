"""One run of an experiment: its work directory, cache, checkpoints, logs, seeds and figures."""

import contextlib
import dataclasses
import hashlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from numpy.typing import ArrayLike
from rich.console import Console

from rlib.experiment import environment, figures
from rlib.experiment.config import as_stored
from rlib.experiment.errors import Stopped, UsageError, unknown
from rlib.experiment.log import MetricsLog
from rlib.experiment.progress import ProgressView
from rlib.experiment.report import Report
from rlib.experiment.store import Values, WorkDir, decode, encode, write_atomic
from rlib.experiment.tuning import Setting, choose
from rlib.parallel import TrainState, make_mesh
from rlib.training import History, Phase, fit, join_histories


def named_key(seed: int, *names: str) -> jax.Array:
    """A random key that depends on a seed and names, not on the order in which keys are asked for.

    >>> bool(named_key(0, "a") == named_key(0, "a")), bool(named_key(0, "a") == named_key(0, "b"))
    (True, False)
    """
    digest = hashlib.sha256("/".join(names).encode()).digest()
    return jax.random.fold_in(jax.random.key(seed), int.from_bytes(digest[:4], "little"))


class Run:
    """What an experiment's `main` gets, from the command line or with no arguments.

    `Run()` writes no files and shows nothing: for notebooks and tests. Several processes call the
    same methods in the same order; only process 0 touches files.

    Args:
        workdir: folder to write to and continue from, or None.
        experiment, preset, config: what the work directory belongs to.
        seeds: overrides the configuration's number of seeds, of every part.
        only: restricts `select`; empty for all.
        overrides: "--config.KEY=VALUE" arguments that made the configuration, for the report.
        console: where progress and warnings go, or None.

    >>> run = Run(only=["b"])
    >>> run.select(["a", "b"])
    ['b']
    >>> float(run.cached("fit/b/seed0", lambda: {"loss": 0.25})["loss"])
    0.25
    """

    checkpoint_seconds = 30.0

    def __init__(
        self,
        workdir: str | None = None,
        *,
        experiment: str = "",
        preset: str = "",
        config: ConfigDict | None = None,
        seeds: int | None = None,
        only: Sequence[str] = (),
        overrides: Sequence[str] = (),
        console: Console | None = None,
    ):
        self.experiment, self.preset = experiment, preset
        self._seeds, self._only, self._console = seeds, tuple(only), console
        self._overrides = [o for o in overrides if not o.startswith("--config.mesh.")]
        self._first = jax.process_index() == 0
        self._workdir: WorkDir | None = None
        self._log: MetricsLog | None = None
        self._figures: list[str] = []
        self._stop: int | None = None
        self._handlers: dict[int, Any] = {}
        self._counts: set[int] = set()
        self._progress = ProgressView(console if self._first else None)
        self._begun = time.monotonic()
        if workdir is not None and self._first:
            stored = as_stored(config) if config is not None else {}
            identity = {"experiment": experiment, "preset": preset, "config": stored}
            self._workdir = WorkDir(workdir, identity)
            self._log = MetricsLog(self._workdir.path)

    # What to compute

    def mesh(self, config: ConfigDict) -> Mesh:
        """The mesh of a configuration's `mesh` entry."""
        try:
            return make_mesh(dict(config.mesh))
        except ValueError as error:
            raise UsageError(str(error)) from error

    def seeds(self, config: ConfigDict) -> range:
        """The seeds to average over: `--seeds`, else the `seeds` of a configuration or part."""
        count = config.seeds if self._seeds is None else self._seeds
        if count < 1:
            raise UsageError(f"seeds={count}: at least one seed is needed")
        self._counts.add(count)
        return range(count)

    def select(self, methods: Iterable[str]) -> list[str]:
        """Those of the methods that `--only` names, in their order; all without it."""
        every = list(methods)
        for name in self._only:
            if name not in every:
                raise unknown("method in --only", name, every)
        return [name for name in every if not self._only or name in self._only]

    # Units of work

    def plan(self, costs: Mapping[str, float]) -> None:
        """Announce all units of work and their relative costs; again when more is known."""
        self._progress.plan(dict(costs))

    def cached(self, unit: str, compute: Callable[[], Mapping[str, Any]]) -> Values:
        """The stored result of a unit of work, or its computation, then stored atomically.

        Args:
            unit: a name such as "fit/high/winner/seed0", unique in the run.
            compute: returns a nested dictionary of arrays, numbers and strings.
        """
        self.check()
        self._progress.begin(unit)
        data = self._broadcast(self._read_unit(unit))
        computed = not data
        if computed:
            data = encode(compute())
            if self._workdir is not None:
                write_atomic(self._workdir.unit(unit), data)
                (self._workdir.path / "checkpoints" / unit).rmtree(missing_ok=True)
                if self._log is not None:
                    self._log.flush()
        self._progress.end(unit, computed=computed)
        return decode(data)

    def choose(
        self, unit: str, settings: Sequence[Setting], losses: Callable[[], ArrayLike]
    ) -> Setting:
        """The setting of the least loss, by `choose`, whose losses are a `cached` unit of work.

        Args:
            unit: a name such as "tune/high/winner", to be planned like every other.
            settings: what is tried; a single one is taken, and nothing is computed.
            losses: gives (settings,) or (settings, draws), of which the means count, on draws from
                `TUNING_SEED` on.

        Raises:
            ValueError: as `choose`.

        >>> run, rates = Run(), [0.1, 0.3]
        >>> run.choose("tune/high/winner", rates, lambda: [[2.0, 1.0], [1.0, 1.0]])
        0.3
        """
        if len(settings) == 1:
            self._progress.end(unit, computed=False)
            return settings[0]
        found = self.cached(unit, lambda: {"losses": np.asarray(losses())})["losses"]
        return choose(settings, found.mean(axis=1) if found.ndim == 2 else found)

    def fit(
        self,
        unit: str,
        phases: Sequence[Phase],
        state: TrainState,
        data: Any,
        *,
        chunk: int = 100,
        look: Callable[[TrainState], Mapping[str, Any]] | None = None,
    ) -> tuple[TrainState, History]:
        """`training.fit` that logs at chunk boundaries and survives a kill by checkpoints.

        A checkpoint is written every `checkpoint_seconds`, and when the run is stopped. Arguments
        are `training.fit`'s; the history spans the whole training, what came before a kill
        included.
        """
        steps = sum(phase.steps for phase in phases)
        source = data if isinstance(data, Iterator) and hasattr(data, "get_state") else None
        checkpoints = self._checkpoints(unit)
        chunks: list[History] = []
        restored = checkpoints.restore(state, source) if checkpoints else None
        if restored is not None:
            state, before = restored
            chunks.append(before)
            if isinstance(data, Iterator) and source is None:
                raise ValueError(
                    f"{unit}: its checkpoint is of step {int(state.step)}, and the data iterator "
                    "has no get_state and set_state to stand there again"
                )
        if self._log is not None:
            self._log.rewind(unit, int(state.step))
        saved = time.monotonic()

        def on_chunk(state: TrainState, new: History) -> None:
            nonlocal saved, checkpoints
            chunks.append(new)
            step = int(state.step)
            if self._log is not None:
                self._log.write(unit, step, {k: float(v[-1]) for k, v in new.items()})
            self._progress.part(unit, step / steps)
            due = time.monotonic() - saved > self.checkpoint_seconds and step < steps
            stop = self._agree(self._stop or 0)
            if self._agree_on_files() and (self._agree(int(due)) or stop):
                checkpoints = checkpoints or self._checkpoints(unit, make=True)
                assert checkpoints is not None
                if self._log is not None:
                    self._log.flush()
                checkpoints.save(step, state, join_histories(chunks), source)
                saved = time.monotonic()
            if stop:
                raise Stopped(stop)

        try:
            state, _ = fit(phases, state, data, chunk=chunk, look=look, on_chunk=on_chunk)
        finally:
            if checkpoints is not None:
                checkpoints.close()
        return state, join_histories(chunks)

    # What is written

    def say(self, text: str) -> None:
        """One line to the user."""
        if self._console is not None and self._first:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def write(self, name: str, data: bytes) -> None:
        """A file of the work directory, for example a sound."""
        if self._workdir is not None:
            write_atomic(self._workdir.path / name, data)

    def figure(self, name: str, figure: Figure, **arrays: Any) -> Figure:
        """Store a figure as figures/NAME.png, and the arrays behind it as figures/NAME.npz."""
        self._figures.append(f"figures/{name}.png")
        self.write(f"figures/{name}.png", figures.png(figure))
        self.write(f"figures/{name}.npz", encode(arrays))
        return figure

    def finish(self, report: Report) -> Report:
        """Complete a report with figures, seconds and environment, and write it."""
        report = dataclasses.replace(
            report,
            experiment=self.experiment,
            preset=self.preset,
            figures=list(self._figures),
            seconds={
                "run": time.monotonic() - self._begun,
                "compile": environment.compile_seconds(),
            },
            environment={
                **environment.describe(),
                "seeds": ", ".join(str(count) for count in sorted(self._counts)),
            },
            selection=self._selection(),
        )
        self.write("report.md", report.markdown().encode())
        self.write("report.json", report.to_json().encode())
        return report

    def finished(self) -> Report | None:
        """The report of a finished run with the same selection of methods and seeds."""
        data = b""
        if self._workdir is not None:
            path = self._workdir.path / "report.json"
            data = path.read_bytes() if path.exists() else b""
        data = self._broadcast(data)
        try:
            report = Report.from_json(data.decode()) if data else None
        except (ValueError, TypeError, KeyError):
            self.say("report.json is damaged; it is made again from the cached results")
            return None
        return report if report and report.selection == self._selection() else None

    # Stopping

    def listen(self) -> None:
        """Let Ctrl-C and SIGTERM stop the run at the next safe place; a second Ctrl-C at once."""

        def stop(signum: int, _: Any) -> None:
            if self._stop is not None and signum == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = signum
            self.say("stopping at the next safe place (Ctrl-C again: at once)")

        for signum in (signal.SIGINT, signal.SIGTERM):
            self._handlers[signum] = signal.signal(signum, stop)

    def check(self) -> None:
        """Raise `Stopped` on every process if one was asked to stop."""
        stop = self._agree(self._stop or 0)
        if stop:
            raise Stopped(stop)

    def close(self) -> None:
        """Release the work directory and the signals; never raises."""
        self._progress.close()
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk was told before
                self._log.close()
        if self._workdir is not None:
            self._workdir.close()

    # Inside

    def _agree_on_files(self) -> bool:
        """Whether a process has a work directory; all must ask."""
        return bool(self._agree(int(self._workdir is not None)))

    def _selection(self) -> dict[str, Any]:
        return {"seeds": self._seeds, "only": list(self._only), "config": self._overrides}

    def _agree(self, value: int) -> int:
        """The largest of the processes' values."""
        if jax.process_count() == 1:
            return value
        return int(np.max(multihost_utils.process_allgather(np.int32(value))))

    def _broadcast(self, data: bytes) -> bytes:
        """Process 0's bytes."""
        if jax.process_count() == 1:
            return data
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        if size == 0:
            return b""
        buffer = np.frombuffer(data.ljust(size)[:size], np.uint8)
        return bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8))

    def _read_unit(self, unit: str) -> bytes:
        path = self._workdir.unit(unit) if self._workdir is not None else None
        if path is None or not path.exists():
            return b""
        data = path.read_bytes()
        try:
            decode(data)
        except ValueError as error:
            self.say(f"{path} is {error}; computed again")
            return b""
        return data

    def _checkpoints(self, unit: str, make: bool = False) -> Any:
        """The unit's checkpoints, or None where there are none and none are to be made."""
        if not self._agree_on_files():
            return None
        name = str(self._workdir.path / "checkpoints" / unit) if self._workdir is not None else ""
        name = self._broadcast(name.encode()).decode()
        path = epath.Path(name)
        if not make and not self._agree(int(path.exists())):
            return None
        from rlib.experiment.checkpoint import Checkpoints  # orbax takes a second to import

        return Checkpoints(path, self.say)
