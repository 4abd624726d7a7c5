"""Eight CPU devices, a compilation cache, and a data directory of the test run's own."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# Most programs of the tests run for milliseconds, and take longer to optimise than to run. XLA's
# older code generator takes half the time, and parts of so small programs are not worth threads.
# A jaxlib that no longer knows a flag would stop at it.
QUICK = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
if not version("jaxlib").startswith("0.10."):
    QUICK = ()
given = os.environ.get("XLA_FLAGS", "").split()  # by the process that started this one, too
flags = dict.fromkeys((*given, *QUICK, "--xla_force_host_platform_device_count=8"))
os.environ["XLA_FLAGS"] = " ".join(flags)
CACHE = Path(__file__).resolve().parents[1] / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("RLIB_DATA_DIR", tempfile.mkdtemp(prefix="rlib-data-"))


def pytest_runtest_setup(item):
    """Compilers of other machines read the same flags, and stop at one that they do not know."""
    if item.get_closest_marker("aot"):
        kept = [flag for flag in os.environ["XLA_FLAGS"].split() if flag not in QUICK]
        os.environ["XLA_FLAGS"] = " ".join(kept)


@pytest.fixture
def usual_optimizations():
    """Compile as users do: where rounding, memory or time of the compiled form is what counts."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def assert_replicas_equal():
    """`(tree)`: devices that hold the same part of an array hold the same bits."""
    import jax
    import numpy as np

    def check(tree):
        for leaf in jax.tree.leaves(tree):
            parts = {}
            for shard in leaf.addressable_shards:
                parts.setdefault(str(shard.index), set()).add(np.asarray(shard.data).tobytes())
            assert all(len(copies) == 1 for copies in parts.values())

    return check


@pytest.fixture(scope="session")
def collectives():
    """`(train, batch, *arguments of init)` -> (kind, dtype, shape) of a compiled step's."""
    import re

    import jax

    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"

    def found(train, batch, *init):
        text = train.step.lower(jax.eval_shape(train.init, *init), batch).compile().as_text()
        pattern = rf"= \(?(\w+)\[([\d,]*)\].* ({kinds})\("
        return [(kind, dtype, shape) for dtype, shape, kind in re.findall(pattern, text)]

    return found
