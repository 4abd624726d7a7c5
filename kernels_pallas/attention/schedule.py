"""What the TPU compiler makes of the attention kernels, on a machine without a TPU.

    python -m kernels_pallas.attention.schedule --device=v5e

compiles ours and JAX's own kernels at equal shapes and tiles (needs the extra `aot`) and reads the
compiler's final schedule: a bundle is what a core issues in a cycle, so the longest run of bundles
without a branch, a tile's work, is its cycles where nothing stalls. XLA's `optimal_seconds` stands
beside it with the operations that it counts: of a Pallas kernel those that its author declared,
which for JAX's backward kernels are none, so that it does not compare kernels.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import mosaic_tpu
from kernels_pallas.attention.problem import Band, Problem

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
_DUMP = Path(tempfile.gettempdir()) / f"tpu-schedules-{os.getpid()}"


class Schedule(NamedTuple):
    """A compiled kernel.

    Fields:
        name: as the compiler knows it.
        tile: bundles of its longest run without a branch.
        bundles: all of them.
    """

    name: str
    tile: int
    bundles: int


def prepare() -> None:
    """Ask the TPU compiler for its schedules; before anything is compiled for a TPU."""
    flags = f"--xla_jf_dump_to={_DUMP} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


def schedules(
    device: str, function: Callable[..., Any], *shapes: Any
) -> tuple[list[Schedule], dict[str, float]]:
    """Compile a function for one TPU.

    Args:
        device: a name in `TOPOLOGIES`.
        function, shapes: what is compiled, and `jax.ShapeDtypeStruct`s of its arguments.

    Returns:
        A `Schedule` of each Pallas kernel in it, and of the whole what XLA says: "flops" and
        "optimal_seconds".

    Raises:
        RuntimeError: no schedule was written; `prepare` was called too late, or not at all.
    """
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[device])
    mesh = Mesh(np.array(topology.devices[:1]), "device")
    before = set(_DUMP.glob("*"))
    with jax.set_mesh(mesh):
        jitted = jax.jit(function, in_shardings=NamedSharding(mesh, P()))
        compiled = jitted.lower(*shapes).compile()
    written = sorted(set(_DUMP.glob("*-final_bundles.txt")) - before)
    found = []
    for path in written:
        name = re.match(r"\d+-(.*)-\d+-final_bundles", path.name)
        # Everything else is a fusion or a copy of XLA's own.
        if name and re.search("flash|splash", name[1]) and "schedule-analysis" not in name[1]:
            found.append(Schedule(name[1].rstrip(".0123456789"), *_runs(path.read_text())))
    for path in set(_DUMP.glob("*")) - before:
        path.unlink()
    if not found:
        raise RuntimeError(f"the TPU compiler wrote no schedules to {_DUMP}; call prepare() first")
    costs: Any = compiled.cost_analysis()
    return found, {name: float(costs[name]) for name in ("flops", "optimal_seconds")}


def _runs(text: str) -> tuple[int, int]:
    """The longest run of bundles between branches and their targets, and all bundles."""
    longest = run = bundles = 0
    for line in text.splitlines():
        bundle = re.match(r"\s*(0x[0-9a-f]+|0)\s+(L[HBE]|P[BF]|CT)?\s*:", line)
        if bundle is None:
            continue
        bundles += 1
        run = 1 if bundle[2] else run + 1
        longest = max(longest, run)
        run = 0 if "sbr.rel" in line else run
    return longest, bundles


def kernels(
    length: int, heads: int, size: int, block: int, causal: bool
) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Ours and JAX's own, forward and backward of a sequence [1, T, N, H] in bfloat16.

    Returns:
        By name a function of (q, k, v, dout), and the arguments' shapes.

    >>> list(kernels(1024, 2, 128, 512, causal=True))
    ['ours', 'jax flash', 'jax splash']
    """
    shape = jax.ShapeDtypeStruct((1, length, heads, size), jnp.bfloat16)
    scale = size**-0.5
    problem = Problem(scale, Band(right=0 if causal else None))
    blocks = mosaic_tpu.Blocks(block, block)

    def ours(q, k, v, dout):
        out, lse = mosaic_tpu.forward(problem, q, k, v, blocks=blocks)
        given = (q, k, v, None, None, None, out, lse, dout, jnp.zeros_like(lse))
        return out, mosaic_tpu.backward(problem, *given, bias_gradient=False, blocks=blocks)[:3]

    def swapped(attend, q, k, v, dout):
        heads_first = lambda *xs: attend(*(x.swapaxes(1, 2) for x in xs)).swapaxes(1, 2)
        out, pull = jax.vjp(heads_first, q, k, v)
        return out, pull(dout)

    def flash(q, k, v, dout):
        from jax.experimental.pallas.ops.tpu import flash_attention as library

        names = library.BlockSizes.__dataclass_fields__
        sizes = library.BlockSizes(**{n: 1 if n == "block_b" else block for n in names})
        attend = lambda *x: library.flash_attention(
            *x, causal=causal, sm_scale=scale, block_sizes=sizes
        )
        return swapped(attend, q, k, v, dout)

    def splash(q, k, v, dout):
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel as library,
        )
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        mask = masks.CausalMask if causal else masks.FullMask
        names = ("block_q", "block_kv", "block_kv_compute")
        sizes = {n + of: block for n in names for of in ("", "_dkv")}
        sizes["block_kv_dkv_compute"] = sizes.pop("block_kv_compute_dkv")
        attend = library.make_splash_mha(
            masks.MultiHeadMask([mask((length, length))] * heads),
            block_sizes=library.BlockSizes(**sizes, use_fused_bwd_kernel=True),
            head_shards=1,
            q_seq_shards=1,
        )
        one = lambda q, k, v: attend(q[0] * scale, k[0], v[0])[None]
        return swapped(one, q, k, v, dout)

    every = {"ours": ours, "jax flash": flash, "jax splash": splash}
    return {name: (function, [shape] * 4) for name, function in every.items()}


def main(argv: list[str] | None = None) -> None:
    """Print one line a kernel."""
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.attention.schedule")
    parser.description = "Schedules of attention kernels, compiled for a TPU that need not be here."
    parser.add_argument("--device", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--size", type=int, nargs="+", default=[128])
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--causal", action="store_true")
    given = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    prepare()
    print("| device | head size | kernel | bundles of a tile | bundles | flops | optimal_seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for device in given.device:
        for size in given.size:
            made = kernels(given.length, given.heads, size, given.block, given.causal)
            for who, (function, shapes) in made.items():
                found, costs = schedules(device, function, *shapes)
                told = " | ".join(f"{x:.3g}" for x in costs.values())
                for one in found:
                    row = (device, size, f"{who}: {one.name}", one.tile, one.bundles, told)
                    print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
