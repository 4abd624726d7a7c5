"""The kernels compiled for TPUs and GPUs that are not here."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import flash_attention, sharded_flash_attention

pytestmark = pytest.mark.aot
GENERATIONS = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}
OPTIONS = {
    "causal": {"causal": True},
    "all": {"window": (700, 100), "softcap": 20.0, "bias": True, "segment_ids": True},
}


@pytest.fixture(scope="module", params=GENERATIONS)
def mesh(request):
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=GENERATIONS[request.param]
    )
    return Mesh(np.array(topology.devices).reshape(4, 2), ("data", "model"))


def step(attend, options, shape, keys, dtype):
    """Outputs and gradients, and the arguments' shapes."""
    (b, t, n, _), (_, s, *_) = shape, keys
    made = {"bias": ((1, n, t, s), jnp.float32), "segment_ids": ((b, t), jnp.int32)}
    arrays = {x: jax.ShapeDtypeStruct(*made[x]) for x in made if options.get(x)}
    fixed = {x: y for x, y in options.items() if x not in arrays}

    def compute(q, k, v, dout, arrays):
        bias = arrays.get("bias")
        attended = lambda q, k, v, bias: attend(q, k, v, bias=bias, **fixed, **arrays_but_bias)
        arrays_but_bias = {x: y for x, y in arrays.items() if x != "bias"}
        out, pull = jax.vjp(attended, q, k, v, bias)
        return out, pull(dout)

    q, k = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(keys, dtype)
    return compute, (q, k, k, q, arrays)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (64, jnp.bfloat16),
        (128, jnp.bfloat16),
        (256, jnp.bfloat16),
        (32, jnp.float32),
        (80, jnp.float32),
    ],
)
def test_a_kernel_compiles(mesh, size, dtype, options):
    one = Mesh(mesh.devices.ravel()[:1], "data")
    shape, keys = (1, 1000, 4, size), (1, 1000, 2, size)
    attend = functools.partial(flash_attention, implementation="mosaic_tpu")
    compute, given = step(attend, OPTIONS[options], shape, keys, dtype)
    replicated = NamedSharding(one, P())
    with jax.set_mesh(one):
        compiled = jax.jit(compute, in_shardings=replicated, out_shardings=replicated).lower(*given)
        text = compiled.compile().as_text()
    assert "flash_attention_forward" in text and "flash_attention_backward" in text


def test_a_tpu_of_the_context_is_chosen_for_and_nothing_is_sent(mesh):
    """Batch over data and heads over model: by the mesh alone, from a machine without a TPU."""
    attend = sharded_flash_attention(batch="data", heads="model")
    compute, given = step(
        attend, OPTIONS["causal"], (8, 2048, 8, 128), (8, 2048, 4, 128), jnp.bfloat16
    )
    split = NamedSharding(mesh, P("data", None, "model"))
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(compute, in_shardings=(split, split, split, split, None), out_shardings=split)
            .lower(*given)
            .compile()
        )
    text = compiled.as_text()
    assert "flash_attention_forward" in text and "flash_attention_backward" in text
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "permute"))


def test_long_sequences_fit(mesh):
    """65536 tokens: the gradient's queries go in parts, and nothing is as large as the scores."""
    one = Mesh(mesh.devices.ravel()[:1], "data")
    shape = (1, 65536, 2, 128)
    compute, given = step(flash_attention, OPTIONS["causal"], shape, shape, jnp.bfloat16)
    replicated = NamedSharding(one, P())
    with jax.set_mesh(one):
        jitted = jax.jit(compute, in_shardings=replicated, out_shardings=replicated)
        compiled = jitted.lower(*given).compile()
    arrays = 65536 * 2 * 128 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * arrays


HOPPER = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from kernels_pallas import flash_attention
from rlib.parallel import h100_mesh

mesh = h100_mesh({"data": 1}, gpus_per_host=1)
size, dtype, causal = int(sys.argv[1]), jnp.dtype(sys.argv[2]), "causal" in sys.argv
t = 1000 if "ragged" in sys.argv else 1024
q, k = (jax.ShapeDtypeStruct((2, t, heads, size), dtype) for heads in (4, 2))
v = jax.ShapeDtypeStruct((2, t, 2, size - 64 if "narrow" in sys.argv else size), dtype)
arrays = {}
if "bias" in sys.argv:
    arrays["bias"] = jax.ShapeDtypeStruct((1, 4, t, t), jnp.float32)
if "segments" in sys.argv:
    arrays["segment_ids"] = jax.ShapeDtypeStruct((2, t), jnp.int32)
options = {"causal": causal}
options |= {"window": (300, 50)} if "window" in sys.argv else {}
options |= {"softcap": 20.0} if "softcap" in sys.argv else {}

def step(q, k, v, dout, arrays):
    out, pull = jax.vjp(lambda *x: flash_attention(*x, **options, **arrays), q, k, v)
    return out, pull(dout)

one = NamedSharding(mesh, P())
with jax.set_mesh(mesh):  # which chooses the kernels
    out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), dtype)
    traced = jax.jit(step, in_shardings=one, out_shardings=one).trace(q, k, v, out, arrays)
    traced.lower(lowering_platforms=("cuda",)).compile()
"""


def hopper(*arguments):
    """What the assembler says: for each kernel its stack and spills, and all warnings."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    command = [sys.executable, "-c", HOPPER, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-3000:]
    pattern = r"for flash_attention_(\w+?)_mosaic\w*\s+(\d+) bytes stack frame, (\d+) bytes spill"
    spills = {name: int(stores) for name, _, stores in re.findall(pattern, text)}
    return spills, re.findall(
        r".*(?:serialized|insufficient register|Performance Loss|setmaxnreg).*", text
    )


@pytest.mark.parametrize("causal", ["causal", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_hopper_kernels_neither_spill_nor_wait_for_each_product(size, dtype, causal):
    spills, warnings = hopper(size, dtype, causal)
    assert spills == {"forward": 0, "dq": 0, "dkv": 0} and warnings == []


#: With the plain ones above, every two values of any two options together.
PAIRWISE = [
    (80, "bfloat16", "causal", "window", "segments", "softcap", "ragged"),
    (128, "float16", "full", "window", "bias", "segments", "softcap", "ragged"),
    (80, "bfloat16", "full", "bias", "segments"),
    (64, "float16", "causal", "bias", "softcap", "ragged"),
    (256, "bfloat16", "full", "window", "bias", "segments", "softcap", "ragged"),
    (80, "float16", "causal", "window", "ragged"),
    (256, "bfloat16", "causal", "narrow"),
    (64, "bfloat16", "full", "window", "bias", "segments", "softcap"),
]


@pytest.mark.parametrize("arguments", PAIRWISE)
def test_hopper_kernels_with_options_compile(arguments):
    spills, _ = hopper(*arguments)
    assert set(spills) == {"forward", "dq", "dkv"}


def test_a_tile_takes_no_more_cycles_than_in_jaxs_own_kernels():
    """By the compiler's final schedules, forward and backward, at equal shapes and tiles."""
    command = [sys.executable, "-m", "kernels_pallas.attention.schedule", "--length=1024"]
    environment = {**os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for device, who, name, tile in re.findall(
        r"^\| (v\w+) \| 128 \| ([\w ]+): (\w+) \| (\d+) \|", done.stdout, re.MULTILINE
    ):
        forward = re.search("forward|fwd|jvp", name) is not None
        place = (device, forward, who)
        found[place] = found.get(place, 0) + int(tile)
    assert len(found) == 3 * 2 * 3
    for (device, forward, who), tile in found.items():
        assert found[device, forward, "ours"] <= 1.1 * tile, (device, forward, who, found)
