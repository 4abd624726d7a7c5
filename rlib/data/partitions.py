"""Who holds which examples: splits of a labelled data set over clients or workers.

Every function returns one array of positions for each client; no position occurs twice.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

Parts = list[np.ndarray]


def partition_iid(examples: int, clients: int, seed: int = 0) -> Parts:
    """Shuffled and dealt as evenly as possible: sizes differ by one at most.

    Raises:
      ValueError: fewer examples than clients.

    >>> [part.size for part in partition_iid(10, 3)]
    [4, 3, 3]
    """
    _check(examples, clients)
    return np.array_split(np.random.default_rng(seed).permutation(examples), clients)


def partition_by_label(labels: ArrayLike, clients: int) -> Parts:
    """Sorted by label and cut into equal parts, the rest dropped: the fewest labels a client.

    With as many clients as equally frequent labels each has one label alone.

    Raises:
      ValueError: fewer examples than clients, or labels that are not one for each example.

    >>> partition_by_label([1, 0, 1, 0, 1], 2)
    [array([1, 3]), array([0, 2])]
    """
    order = np.argsort(_vector(labels), kind="stable")
    _check(order.size, clients)
    size = order.size // clients
    return list(order[: clients * size].reshape(clients, size))


def partition_shards(labels: ArrayLike, clients: int, each: int = 2, seed: int = 0) -> Parts:
    """Sorted by label, cut into `clients * each` equal shards, `each` of them dealt to a client.

    The split of McMahan et al., arXiv 1602.05629, where `each` is 2: about two labels a client.

    Raises:
      ValueError: `each` below 1, or fewer examples than shards.

    >>> parts = partition_shards(np.arange(100) // 10, 5)
    >>> [np.unique(part // 10).size for part in parts]
    [2, 2, 2, 2, 2]
    """
    if each < 1 or np.size(labels) < clients * each:
        raise ValueError(
            f"{np.size(labels)} examples in {clients} clients times each={each} shards"
        )
    shards = partition_by_label(labels, clients * each)
    dealt = np.random.default_rng(seed).permutation(len(shards)).reshape(clients, each)
    return [np.concatenate([shards[i] for i in own]) for own in dealt]


def partition_dirichlet(
    labels: ArrayLike,
    clients: int,
    concentration: float,
    seed: int = 0,
    *,
    size: int | None = None,
    least: int = 1,
) -> Parts:
    """Label skew by a Dirichlet distribution: the smaller its concentration, the more.

    Two size rules are in use. Without `size` the examples of each label are dealt by proportions
    over clients, drawn for that label, so sizes differ widely; the draw is repeated until every
    client has `least` (Yurochkin et al., arXiv 1905.12022, as in most benchmarks). With `size`
    every client has so many examples, whose labels are drawn one by one from proportions over
    labels, drawn for that client (Hsu et al., arXiv 1909.06335); a label that is used up is left
    out from there on.

    Args:
      labels: (examples,) integers.
      concentration: alpha > 0 of the symmetric Dirichlet distribution.
      size: examples of each client, or None.
      least: the least number of examples, without `size`.

    Raises:
      ValueError: a concentration that is not positive; more examples needed than there are; a
        hundred draws without `least` examples for every client.

    >>> labels = np.repeat(np.arange(10), 20)
    >>> parts = partition_dirichlet(labels, 5, 0.5, size=30)
    >>> [part.size for part in parts], np.unique(np.concatenate(parts)).size
    ([30, 30, 30, 30, 30], 150)
    """
    labels = _vector(labels)
    wanted = clients * (least if size is None else size)
    if not 0 < concentration < np.inf:
        raise ValueError(f"concentration={concentration} must be positive and finite")
    if clients < 1 or wanted > labels.size or (size is not None and size < 1) or least < 1:
        raise ValueError(
            f"{clients} clients of {'at least ' if size is None else ''}{wanted // max(clients, 1)}"
            f" examples from {labels.size}"
        )
    draw = np.random.default_rng(seed)
    pools = [draw.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    if size is not None:
        return _equal_sizes(draw, pools, clients, concentration, size)
    for _ in range(100):
        cuts = [
            np.round(np.cumsum(draw.dirichlet(np.full(clients, concentration))) * pool.size)
            for pool in pools
        ]
        dealt = [
            np.split(pool, cut[:-1].astype(int)) for pool, cut in zip(pools, cuts, strict=True)
        ]
        parts = [np.concatenate(own) for own in zip(*dealt, strict=True)]
        if min(part.size for part in parts) >= least:
            return parts
    raise ValueError(
        f"100 Dirichlet({concentration:g}) draws left one of {clients} clients with fewer than "
        f"{least} examples; give size=, a larger concentration or fewer clients"
    )


def partition_by_key(keys: ArrayLike) -> Parts:
    """The natural split: one client for each distinct key, for example a writer or a speaker.

    Raises:
      ValueError: no keys, or keys that are not one for each example.

    >>> partition_by_key(["ann", "bob", "ann"])
    [array([0, 2]), array([1])]
    """
    _, owner = np.unique(_vector(keys), return_inverse=True)
    _check(owner.size, 1)
    return [np.flatnonzero(owner == client) for client in range(owner.max() + 1)]


def _equal_sizes(draw, pools: Sequence[np.ndarray], clients: int, concentration: float, size: int):
    left = np.array([pool.size for pool in pools])
    parts = []
    for _ in range(clients):
        shares = draw.dirichlet(np.full(len(pools), concentration))
        own = []
        for _ in range(size):
            open_ = shares * (left > 0)
            # A client whose labels are all used up takes what is left.
            chances = open_ / open_.sum() if open_.sum() > 0 else left / left.sum()
            label = draw.choice(len(pools), p=chances)
            left[label] -= 1
            own.append(pools[label][left[label]])
        parts.append(np.array(own))
    return parts


def _vector(labels: ArrayLike) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels of shape {labels.shape}; one for each example is wanted")
    return labels


def _check(examples: int, clients: int) -> None:
    if clients < 1 or examples < clients:
        raise ValueError(f"{examples} examples cannot be dealt to {clients} clients")
