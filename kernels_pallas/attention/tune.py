"""Measures the fastest tiles of the Hopper kernels: `python -m kernels_pallas.attention.tune`.

On a Hopper GPU; writes `hopper_blocks.json`, which `mosaic_gpu.choose_blocks` reads. Tiles that do
not compile, for want of shared memory, are left out.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import mosaic_gpu
from kernels_pallas.attention.problem import Band, Problem
from kernels_pallas.timing import in_turns

ROWS, STAGES = (32, 64, 128), (1, 2, 3, 4)
#: (kernel, candidate blocks) -> seconds, or None if they do not compile
Seconds = Callable[[str, mosaic_gpu.Blocks], float | None]


def best(start: mosaic_gpu.Blocks, seconds: Seconds) -> dict[str, list[int]]:
    """The fastest rows and stages of each kernel, the others' left as they are at the start.

    >>> start = mosaic_gpu.Blocks((64, 2), (64, 2), (64, 2))
    >>> best(start, lambda kernel, blocks: 1 / sum(blocks.forward) if kernel == "forward" else None)
    {'forward': [128, 4]}
    """
    found = {}
    for kernel in mosaic_gpu.Blocks._fields:
        tried: dict[Any, float] = {}
        for pair in itertools.product(ROWS, STAGES):
            taken = seconds(kernel, start._replace(**{kernel: pair}))
            if taken is not None:
                tried[pair] = taken
        if tried:
            found[kernel] = list(min(tried, key=tried.__getitem__))
    return found


def measured(size: int, dtype: str, causal: bool, length: int, repeats: int = 5) -> Seconds:
    """Times on this machine's GPU, 16384 queries in all over 2048 / size heads."""
    rng = np.random.default_rng(0)
    shape = (max(1, 16384 // length), length, max(1, 2048 // size), size)
    q, k, v, dout = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    problem = Problem(size**-0.5, Band(right=0 if causal else None))
    out, lse = jax.jit(functools.partial(mosaic_gpu.forward, problem))(q, k, v)

    def seconds(kernel: str, blocks: mosaic_gpu.Blocks) -> float | None:
        if kernel == "forward":
            run = jax.jit(functools.partial(mosaic_gpu.forward, problem, blocks=blocks))
            given: tuple[Any, ...] = (q, k, v)
        else:
            backward = functools.partial(
                mosaic_gpu.backward, problem, bias_gradient=False, blocks=blocks
            )
            run = jax.jit(lambda *x: backward(*x)[0 if kernel == "dq" else slice(1, 3)])
            given = (q, k, v, None, None, None, out, lse, dout, jnp.zeros_like(lse))
        try:
            compiled = run.lower(*given).compile()
        except Exception as error:
            print(f"  {kernel} {getattr(blocks, kernel)}: {str(error).splitlines()[0][:80]}")
            return None
        taken = in_turns([functools.partial(compiled, *given)], repeats, shortest=2e-3)
        return float(np.median(taken))

    return seconds


def tune(
    cases: Iterable[tuple[int, str, bool, int]],
    timer: Callable[[int, str, bool, int], Seconds] = measured,
) -> dict[str, dict[str, list[int]]]:
    """The table with what is fastest for (head size, dtype, causal, length), written as it goes."""
    table = json.loads(mosaic_gpu.TABLE.read_text())
    for size, dtype, causal, length in cases:
        pairs = {name: tuple(pair) for name, pair in table[str(size)].items()}
        found = best(mosaic_gpu.Blocks(**pairs), timer(size, dtype, causal, length))
        key = f"{size}/{dtype}/{'causal' if causal else 'full'}/{length}"
        table[key] = found
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())
        mosaic_gpu.TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(key, found, flush=True)
    return table


def main(argv: list[str] | None = None) -> None:
    """Tune all cases, or those of some head sizes and lengths."""
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.attention.tune")
    parser.description = "Find the fastest tiles of the Hopper kernels on this machine's GPU."
    parser.add_argument("--size", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--length", type=int, nargs="+", default=[1024, 4096, 16384])
    given = parser.parse_args(argv)
    reason = mosaic_gpu.why_not_on(jax.default_backend(), jax.devices()[0].device_kind)
    if reason is not None:
        parser.error(reason)
    tune(itertools.product(given.size, given.dtype, (False, True), given.length))


if __name__ == "__main__":
    main(sys.argv[1:])
