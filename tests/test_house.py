"""The house itself: imports go down only, methods are in every room, public names have examples."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest

import rlib
from experiments import METHODS
from rlib.experiment import results

ROOT = Path(__file__).parents[1]
#: A module may import from floors below its own, and from its own package.
FLOORS = [
    {"kernels_pallas"},
    {"rlib.compression", "rlib.data"},
    {"rlib.collectives"},
    {"rlib.parallel"},
    {"rlib.nn", "rlib.optim"},
    {"rlib.training"},
    {"rlib.spectral", "rlib.information", "rlib.concepts", "rlib.federated", "rlib.generative"},
    {"rlib.experiment"},
    {"experiments", "configs"},
]
ROOMS = sorted(path.parent.name for path in (ROOT / "rlib").glob("*/__init__.py"))
KERNELS = sorted(path.parent.name for path in (ROOT / "kernels_pallas").glob("*/api.py"))
FACES = [*(f"rlib.{room}" for room in ROOMS), *(f"kernels_pallas.{op}" for op in KERNELS)]
#: All that kernels need.
FOR_KERNELS = {"jax", "numpy", "kernels_pallas", *sys.stdlib_module_names}
#: Public functions and classes whose docstring has no example that runs, and why.
WITHOUT_EXAMPLE = {
    "rlib.parallel.h100_mesh": "compiles for machines that are not there, by the extra aot",
    "rlib.parallel.tpu_mesh": "the same",
}
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}


def package_of(module):
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "rlib" else parts[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "rlib":
                yield from (f"rlib.{alias.name}" for alias in node.names)
            else:
                yield node.module


def modules():
    folders = ("kernels_pallas", "rlib", "experiments", "configs")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def problems(path, relative):
    own = package_of(".".join(relative.with_suffix("").parts))
    for module in imported(path):
        target = package_of(module)
        known = target in FLOOR_OF and own in FLOOR_OF and target != own
        if known and FLOOR_OF[target] >= FLOOR_OF[own]:
            yield f"{relative} imports {module}, which is not below {own}"
        if own == "kernels_pallas" and module.partition(".")[0] not in FOR_KERNELS:
            yield f"{relative} imports {module}; kernels need jax alone"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    assert list(problems(path, path.relative_to(ROOT))) == []


def test_an_import_that_goes_up_is_found(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("from rlib.experiment import Run\nfrom rlib import spectral\n")
    found = list(problems(path, Path("rlib/training/bad.py")))
    assert len(found) == 2
    path.write_text("import jax.numpy, math, flax.nnx\nfrom kernels_pallas.op import api\n")
    assert len(list(problems(path, Path("kernels_pallas/op/bad.py")))) == 1


def test_every_package_has_a_floor():
    assert {f"rlib.{room}" for room in ROOMS} <= set(FLOOR_OF)


def test_every_package_is_an_attribute_of_rlib():
    assert set(rlib.__all__) == {*ROOMS, "__version__"}


def wants_example(value):
    """Functions and classes do, but named tuples, which are read, protocols and exceptions."""
    if isinstance(value, type):
        return not (issubclass(value, tuple | BaseException) or getattr(value, "_is_protocol", 0))
    return inspect.isfunction(inspect.unwrap(value)) if callable(value) else False


def public(face):
    """Names and values, also those of its modules that say what is public."""
    for name in face.__all__:
        value = getattr(face, name)
        yield name, value
        if hasattr(value, "__all__"):
            yield from public(value)


@pytest.mark.parametrize("face", FACES)
def test_public_names_have_an_example_that_runs(face):
    missing = set()
    for name, value in public(importlib.import_module(face)):
        text = value.__doc__ or ""
        if wants_example(value) and (">>>" not in text or "+SKIP" in text):
            missing.add(f"{face}.{name}")
    assert missing == {name for name in WITHOUT_EXAMPLE if name.startswith(f"{face}.")}


def names(folder):
    return {p.stem for p in (ROOT / folder).glob("*.py") if not p.stem.startswith("_")}


def test_experiments_configs_and_the_table_agree():
    table = {method.name for method in METHODS}
    assert names("experiments") == names("configs") == table
    assert {
        p.stem.removeprefix("test_") for p in (ROOT / "tests/experiments").glob("test_*.py")
    } == table


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_method_is_in_every_room(method):
    assert (ROOT / method.code).is_file()
    assert f"experiments.{method.name}" in (ROOT / "README.md").read_text()
    source = (ROOT / "experiments" / f"{method.name}.py").read_text()
    assert method.arxiv in ast.get_docstring(ast.parse(source))
    assert "| paper |" in (ROOT / method.code).read_text(), "the deviations table"
    code = Path(method.code)
    room = code.parent.relative_to("rlib") if code.parts[0] == "rlib" else code.parent
    oracles = ROOT / "tests" / room / f"test_{code.name}"
    assert oracles.is_file(), "the oracles of what is in `code`"
    _, _, section = (ROOT / "RESULTS.md").read_text().partition(f"\n## {method.name}, preset ")
    assert section.partition("\n## ")[0].count("\n> ") >= 1, "what was found, in RESULTS.md"


def test_the_readmes_table_is_that_of_the_stored_results():
    readme = (ROOT / "README.md").read_text()
    made = results.table(METHODS, (ROOT / "RESULTS.md").read_text())
    assert results.with_table(readme, made) == readme, "python -m experiments table"


def test_importing_rlib_is_free():
    import subprocess
    import sys

    code = "import sys, rlib; print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
