"""Metrics of a run: one JSON line a record, and TensorBoard events beside."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from rlib.experiment.store import write_atomic


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard's `events`.

    A record has "unit" (of work), "step", "time" (seconds since 1970) and the metrics.
    """

    def __init__(self, workdir: epath.Path):
        self._workdir, self._path = workdir, workdir / "metrics.jsonl"
        self._file: Any = None
        self._events: Any = None
        text = self._path.read_text() if self._path.exists() else ""
        if text and not text.endswith("\n"):  # a killed process left half a line
            text = text[: text.rfind("\n") + 1]
            write_atomic(self._path, text.encode())
        self._last: dict[str, int] = {}
        for record in map(json.loads, text.splitlines()):
            self._last[record["unit"]] = max(record["step"], self._last.get(record["unit"], 0))

    def _open(self) -> None:
        from tensorboardX import SummaryWriter

        self._file = self._path.open("a")
        self._events = SummaryWriter(str(self._workdir / "events"), flush_secs=30)

    def write(self, unit: str, step: int, metrics: Mapping[str, float]) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        record = {"unit": unit, "step": step, "time": round(time.time(), 3)}
        record |= {name: finite.get(name) for name in metrics}  # JSON knows no NaN: null
        if self._file is None:
            self._open()
        self._file.write(json.dumps(record) + "\n")
        for name, value in finite.items():
            self._events.add_scalar(f"{unit}/{name}", value, step)
        self._last[unit] = step

    def rewind(self, unit: str, step: int) -> None:
        """Forget what a killed run recorded of a unit after the step where it now goes on."""
        if self._last.get(unit, 0) <= step:
            return
        self.close()
        kept = [
            line + "\n"
            for line in self._path.read_text().splitlines()
            if (record := json.loads(line))["unit"] != unit or record["step"] <= step
        ]
        write_atomic(self._path, "".join(kept).encode())
        self._last[unit] = step

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        file, events, self._file, self._events = self._file, self._events, None, None
        if file is not None:
            events.close()
            file.close()
