"""What a result was computed with."""

import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.monitoring

CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_compile_seconds = 0.0


def _count(event: str, duration_secs: float, **kwargs: Any) -> None:
    global _compile_seconds
    if event == "/jax/core/compile/backend_compile_duration":
        _compile_seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count)


def compile_seconds() -> float:
    """Seconds of this process that went into backend compilation."""
    return _compile_seconds


def _commit() -> str:
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def peak_memory() -> int:
    """Bytes: the process's high-water mark, or the first device's where it counts its own."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    scale = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return int(statistics.get("peak_bytes_in_use", resident))


def describe() -> dict[str, Any]:
    """Versions, device, commit, processes and peak memory."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "commit": _commit(),
        "peak memory (MiB)": round(peak_memory() / 2**20),
    }
