"""How long functions take, measured in turns, so that ratios can be trusted on a busy machine."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


def in_turns(
    functions: Iterable[Callable[[], Any]],
    repeats: int,
    *,
    warm: int = 1,
    shortest: float = 0.0,
    ahead: int = 0,
    between: Callable[[], Any] | None = None,
) -> np.ndarray:
    """Seconds of a call of each function, until its result is ready.

    The first function is called, then the second, ..., and this is repeated: what else the machine
    does falls on all of them. Which statistic is told is up to the caller.

    Args:
        functions: take nothing and return arrays, of any structure.
        repeats: turns that are measured.
        warm: turns before those, not measured; one compiles.
        shortest: seconds; quicker functions are called so often in a row that it takes about as
            long, and a mean is told.
        ahead: calls of a function before each measurement of it, not measured, where the one
            before would leave it another state of caches and memory than its own.
        between: called before each measurement, outside of it.

    Returns:
        (function, repeat), float64.

    Raises:
        ValueError: fewer than one repeat, or a negative `warm` or `ahead`.

    >>> slow, quick = (jax.jit(lambda n=n: jax.numpy.ones((n, n))) for n in (64, 2))
    >>> seconds = in_turns([slow, quick], repeats=5)
    >>> seconds.shape, bool((seconds > 0).all())
    ((2, 5), True)
    >>> ratio = np.median(seconds[0] / seconds[1])  # of the same turn
    """
    if repeats < 1 or warm < 0 or ahead < 0:
        raise ValueError(f"repeats={repeats}, warm={warm}, ahead={ahead}: at least 1, 0 and 0")
    calls = list(functions)
    before = between or (lambda: None)

    def turn(often: Iterable[int]) -> list[float]:
        taken = []
        for call, times in zip(calls, often, strict=True):
            for _ in range(ahead):
                jax.block_until_ready(call())
            before()
            taken.append(_seconds(call, times))
        return taken

    once = often = [1] * len(calls)
    for _ in range(warm):
        turn(once)
    if shortest:
        often = [max(1, math.ceil(shortest / taken)) for taken in turn(once)]
    return np.array([turn(often) for _ in range(repeats)], float).reshape(repeats, len(calls)).T


def _seconds(call: Callable[[], Any], times: int) -> float:
    """Of one call, over so many that follow each other."""
    begun = time.perf_counter()
    for _ in range(times):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - begun) / times
