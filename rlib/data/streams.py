"""Endless batches as a Grain pipeline: deterministic, resumable, split by process."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from rlib.data import text
from rlib.data.registry import names
from rlib.data.store import arrays, gather, public_source

if TYPE_CHECKING:
    import grain

Fetch = Callable[[np.ndarray], dict[str, np.ndarray]]

_IN_MEMORY = 2**28  # bytes: what a laptop gives away without noticing


def stream(
    name: str,
    split: str = "train",
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    length: int | None = None,
) -> grain.IterDataset:
    """Shuffled batches without end: dictionaries like those of `arrays`.

    Batch `i` depends on `(seed, i)` alone. The stream is one fresh permutation of all examples
    after another; batches straddle these epochs, so that no example is dropped. A process gets its
    rows of one global batch, so the order is the same for any number of processes.

    Data are kept in memory if they are our own or, decoded, at most 256 MiB (the number of examples
    times the size of the first one); larger ones are read from disk by threads, ahead of need. The
    order is the same either way; it takes 8 bytes of memory for each example.

    Args:
      name: an own or public data set, as for `arrays`.
      split: as in TFDS.
      batch_size: examples in the global batch, a multiple of `process_count`.
      seed: non-negative.
      process_index: which rows of the global batch are this process's.
      process_count: the number of processes.
      length: of text, bytes in an example, instead of 256; the text is cut anew.

    Returns:
      A `grain.IterDataset`, whose `.map` transforms batches; it runs in threads, not under
      `mp_prefetch`. Its iterator resumes by `set_state(get_state())`, and
      `set_state({"next_index": i})` goes to batch `i`.

    Raises:
      DataUnavailable: as for `arrays`.
      ValueError: as for `arrays`, and for a size, seed or index out of range.

    >>> batches = iter(stream("digits", batch_size=32, seed=0))
    >>> next(batches)["image"].shape, batches.get_state()
    ((32, 8, 8, 1), {'next_index': 1})
    """
    import grain

    rows = check_rows(batch_size, seed, process_index, process_count)
    fetch, count, options = fetcher(name, split, length)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(count)

    def batch_at(i: int) -> dict[str, np.ndarray]:
        start, stop = i * batch_size + rows.start, i * batch_size + rows.stop
        chosen = []
        while start < stop:
            epoch, first = divmod(start, count)
            chosen.append(order(epoch)[first : first + stop - start])
            start += len(chosen[-1])
        return fetch(np.concatenate(chosen))

    return grain.MapDataset.range(sys.maxsize).map(batch_at).to_iter_dataset(options)


def check_rows(batch_size: int, seed: int, process_index: int, process_count: int) -> slice:
    """This process's rows of a global batch.

    Raises:
      ValueError: a size, seed or index out of range.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not among {process_count} processes")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is not a positive multiple of process_count {process_count}"
        )
    if seed < 0:
        raise ValueError(f"seed {seed} is negative")
    local = batch_size // process_count
    return slice(process_index * local, (process_index + 1) * local)


def fetcher(name: str, split: str, length: int | None) -> tuple[Fetch, int, grain.ReadOptions]:
    """How to get some rows of a data set, how many rows it has, and how Grain should ask."""
    import grain

    if length is not None and not text.is_text(name):
        raise ValueError(f"length is for text, which {name!r} is not")
    if name not in names():
        source = public_source(name, split)
        example_bytes = sum(column.nbytes for column in gather(source, [0]).values())
        if len(source) * example_bytes > _IN_MEMORY:
            ahead = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)  # counted in batches
            return functools.partial(gather, source), len(source), ahead
    columns = arrays(name, split)
    if length is not None:
        columns = {"tokens": text.cut(columns["tokens"], length)}
    count = len(next(iter(columns.values())))
    # Copying rows is all that there is to do: threads would only queue for the interpreter.
    at_once = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return lambda rows: {key: column[rows] for key, column in columns.items()}, count, at_once
