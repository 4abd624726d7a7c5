import importlib.util
import json
from pathlib import Path

import pytest

from rlib.experiment.start import run_guarded

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def toy():
    """The toy experiment's module."""
    spec = importlib.util.spec_from_file_location("toy", HERE / "toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(toy, capfd):
    """Run the toy as from the command line: (exit status, standard output, standard error)."""

    def call(*arguments, main=toy.main, config=f"{HERE / 'toy_config.py'}"):
        status = run_guarded(main, "toy", [f"--config={config}", *arguments], ("steps",))
        out, err = capfd.readouterr()
        return status, out, err

    return call


@pytest.fixture
def values():
    """Method -> values of a work directory's report."""

    def read(workdir):
        report = json.loads((Path(workdir) / "report.json").read_text())
        return {row["method"]: row["values"] for row in report["rows"]}

    return read
