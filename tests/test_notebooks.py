"""Notebooks run from top to bottom, and are stored with their figures."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [
    pytest.param(path, id=path.stem) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
]


def pictures(notebook):
    outputs = (out for cell in notebook.cells for out in cell.get("outputs", []))
    return sum("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_it_runs_and_is_stored_with_its_figures(path, monkeypatch):
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    stored = nbformat.read(path, as_version=4)
    assert pictures(stored) > 0
    fresh = nbformat.read(path, as_version=4)
    NotebookClient(fresh, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert pictures(fresh) == pictures(stored)
