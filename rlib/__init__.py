"""Methods against bottlenecks of learning systems: communication, memory, spectral, information.

Subpackages load on first use, so that `import rlib` costs nothing.
"""

import importlib
from typing import Any

_PACKAGES = (
    "collectives",
    "compression",
    "data",
    "experiment",
    "federated",
    "information",
    "nn",
    "optim",
    "parallel",
    "spectral",
    "training",
)
__version__ = "0.1.0"
__all__ = [*_PACKAGES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"rlib.{name}")
    raise AttributeError(f"module 'rlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
