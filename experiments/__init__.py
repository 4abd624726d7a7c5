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
    """

    name: str
    title: str
    arxiv: str
    code: str
    claim: str


METHODS = (
    Method(
        name="winner",
        title="WINNER initialisation of sinusoidal networks",
        arxiv="2509.09719",
        code="rlib/spectral/winner.py",
        claim="noise set by the target's spectrum frees a SIREN from the spectral bottleneck",
    ),
    Method(
        name="onebit_adam",
        title="1-bit Adam",
        arxiv="2102.02888",
        code="rlib/optim/onebit_adam.py",
        claim="Adam's convergence with one bit a coordinate on the wire after a short warm-up",
    ),
    Method(
        name="econtrol",
        title="EControl",
        arxiv="2311.05645",
        code="rlib/optim/error_feedback.py",
        claim="compressed gradients that neither heterogeneity nor noise stalls",
    ),
    Method(
        name="cs_ib",
        title="CS-IB",
        arxiv="2404.17951",
        code="rlib/information/cs_ib.py",
        claim="an information bottleneck for regression without a Gaussian decoder",
    ),
    Method(
        name="information_plane",
        title="the information plane of training",
        arxiv="1703.00810",
        code="rlib/information/plane.py",
        claim="layers first fit, then compress their input; or units saturate and bins show it",
    ),
    Method(
        name="ib_lossy_compression",
        title="information by lossy compression",
        arxiv="2305.08013",
        code="rlib/information/lossy.py",
        claim="on short codes of images and layers, neighbours estimate their information",
    ),
    Method(
        name="ib_generalization",
        title="information bottleneck and generalisation",
        arxiv="2305.18887",
        code="rlib/information/generalization.py",
        claim="what representation and parameters keep of the data orders the generalisation gap",
    ),
    Method(
        name="cooldown",
        title="Cooldown",
        arxiv="2410.04579",
        code="rlib/data/mixtures.py",
        claim="rare domains over-sampled at first and then left at their share",
    ),
    Method(
        name="fedhyper",
        title="FedHyper",
        arxiv="2310.03156",
        code="rlib/optim/fedhyper.py",
        claim="rates of server and clients that repair themselves when badly chosen",
    ),
    Method(
        name="fedspeed",
        title="FedSpeed",
        arxiv="2302.10429",
        code="rlib/federated/fedspeed.py",
        claim="clients that neither drift nor over-fit, so longer local phases and fewer rounds",
    ),
    Method(
        name="momentum_fl",
        title="momentum FedAvg and SCAFFOLD",
        arxiv="2306.16504",
        code="rlib/federated/momentum_fl.py",
        claim="the last round's direction in every local step, against the drift of unlike clients",
    ),
    Method(
        name="attention_io",
        title="I/O of attention",
        arxiv="2402.07443",
        code="kernels_pallas/attention/transfers.py",
        claim="FlashAttention moves the fewest words if a cache holds d^2, square tiling if not",
    ),
    Method(
        name="flash_attention",
        title="FlashAttention-2",
        arxiv="2307.08691",
        code="kernels_pallas/attention/api.py",
        claim="exact attention in memory that grows with the length, and faster",
    ),
)
