"""Metrics of a run: one JSON line a record, and TensorBoard events beside."""

import json
import time
from collections.abc import Mapping

from etils import epath

from rlib.experiment.store import write_atomic


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard's `events`.

    A record has "unit" (of work), "step", "time" (seconds since 1970) and the metrics.
    """

    def __init__(self, workdir: epath.Path):
        from tensorboardX import SummaryWriter

        self._path = workdir / "metrics.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._last: dict[str, int] = {}
        for line in lines:
            record = _parse(line)
            if record is not None:
                self._last[record["unit"]] = max(record["step"], self._last.get(record["unit"], 0))
        self._file = self._path.open("a")
        self._events = SummaryWriter(str(workdir / "events"), flush_secs=30)

    def write(self, unit: str, step: int, metrics: Mapping[str, float]) -> None:
        record = {"unit": unit, "step": step, "time": round(time.time(), 3), **metrics}
        self._file.write(json.dumps(record) + "\n")
        for name, value in metrics.items():
            self._events.add_scalar(f"{unit}/{name}", value, step)
        self._last[unit] = step

    def rewind(self, unit: str, step: int) -> None:
        """Forget what a killed run recorded of a unit after the step where it now goes on."""
        if self._last.get(unit, 0) <= step:
            return
        self._file.close()
        kept = []
        for line in self._path.read_text().splitlines():
            record = _parse(line)
            if record is not None and (record["unit"] != unit or record["step"] <= step):
                kept.append(line + "\n")
        write_atomic(self._path, "".join(kept).encode())
        self._file = self._path.open("a")
        self._last[unit] = step

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()


def _parse(line: str) -> dict | None:
    """A record, or None for the half line that a killed process leaves."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
