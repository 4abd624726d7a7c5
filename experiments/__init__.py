"""One module a method; `python -m experiments` lists them, `python -m experiments.NAME` runs one.

`METHODS` is the one table of methods: the list command, the README's table and the tests read it.
Imports nothing, so that listing is instant.
"""

from typing import NamedTuple


class Method(NamedTuple):
    """A method of the library.

    Fields:
        name: of `experiments/NAME.py`, `configs/NAME.py`, the test and the README row.
        title: what it is called in print.
        arxiv: identifier of the paper.
        code: where its algorithm lives.
        claim: what the experiment tests, in one line.
        duration: of the default preset.
    """

    name: str
    title: str
    arxiv: str
    code: str
    claim: str
    duration: str


METHODS = (
    Method(
        name="winner",
        title="WINNER initialisation of sinusoidal networks",
        arxiv="2509.09719",
        code="rlib/spectral/winner.py",
        claim="noise set by the target's spectrum frees a SIREN from the spectral bottleneck",
        duration="6 min on two CPU cores",
    ),
)
