"""How far a run is, and how long it still takes."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(42.4), duration(200), duration(7500)
    ('42 s', '3 min 20 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class ProgressView:
    """A bar on a terminal, a line every 20 s elsewhere.

    Args:
        console: None shows nothing.
    """

    def __init__(self, console: Console | None):
        self._console = console
        self._costs: dict[str, float] = {}
        self._ended: set[str] = set()
        self._spent = 0.0
        self._since: float | None = None
        self._printed = time.monotonic()
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}  {task.description}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=None, left="")

    def plan(self, costs: dict[str, float]) -> None:
        """What there is to do, done units included; may be told again when more is known."""
        self._costs = costs
        if self._bar is not None:
            self._bar.update(self._task, total=len(costs))
            self._bar.start()

    def begin(self, unit: str) -> None:
        self._since = self._since or time.monotonic()
        self._show(unit, 0.0)

    def part(self, unit: str, fraction: float) -> None:
        """A unit is partly done."""
        self._show(unit, self._costs.get(unit, 0.0) * fraction)

    def end(self, unit: str, *, computed: bool) -> None:
        self._ended.add(unit)
        self._spent += self._costs.get(unit, 0.0) if computed else 0.0
        self._show(unit, 0.0)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _time_left(self, extra: float) -> str:
        spent = self._spent + extra
        if self._since is None or spent <= 0:
            return ""
        rate = (time.monotonic() - self._since) / spent
        left = sum(cost for unit, cost in self._costs.items() if unit not in self._ended)
        return f"{duration(max(0.0, left - extra) * rate)} left"

    def _show(self, unit: str, extra: float) -> None:
        left = self._time_left(extra)
        if self._bar is not None:
            self._bar.update(self._task, completed=len(self._ended), description=unit, left=left)
        elif self._console is not None and time.monotonic() - self._printed > 20:
            self._printed = time.monotonic()
            line = f"{len(self._ended)} of {len(self._costs)} done, {left or 'started'}: {unit}"
            self._console.print(line, markup=False, highlight=False)
