"""What every experiment's test gets for free."""

import importlib
import json

import numpy as np
import pytest

from rlib.experiment import Run
from rlib.experiment.start import run_guarded


@pytest.fixture(scope="module")
def smoke(request, tmp_path_factory):
    """The report of preset smoke, after an error in its second unit of work and a restart.

    `test_NAME.py` gets that of `experiments.NAME`, as the dictionary of report.json, with its work
    directory added. What was done before the error is not done again, every number is finite, and
    every figure is there.
    """
    name = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    experiment = importlib.import_module(f"experiments.{name}")
    workdir = tmp_path_factory.mktemp(name) / "run"
    arguments = [f"--config=configs/{name}.py:smoke", f"--workdir={workdir}"]
    real, done = Run.cached, []

    def cached(self, unit, compute, limit):
        def counted():
            if len(done) == limit:
                raise RuntimeError("injected")
            result = compute()
            done.append(unit)
            return result

        return real(self, unit, counted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "cached", lambda *args: cached(*args, limit=1))
        assert run_guarded(experiment.main, name, arguments, ()) == 1
        patch.setattr(Run, "cached", lambda *args: cached(*args, limit=None))
        assert run_guarded(experiment.main, name, arguments, ()) == 0
    assert len(set(done)) == len(done) > 1
    report = json.loads((workdir / "report.json").read_text())
    assert all(np.isfinite(row["values"]).all() for row in report["rows"])
    assert report["figures"]
    assert all((workdir / figure).stat().st_size > 5000 for figure in report["figures"])
    return {**report, "workdir": workdir}
