"""Momentum FedAvg and SCAFFOLD: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  minutes on two CPU cores: digits and quadratics, no download
full     with a small residual network on mnist_5k over 100 clients (extra `data`)
paper    near the published setting: a residual network (with group norm) on CIFAR-10, split by a
         Dirichlet distribution over 10 and over 100 clients; TFDS name cifar10, image (32, 32, 3)
         and label, licence not stated; prepare it with `python -m rlib.data prepare cifar10`
         (extra `paper`). Untested
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

DIGITS = {
    "dataset": "digits",
    "hidden": (32,),  # units of a perceptron
    "widths": (),  # channels of a residual network's stages, in place of the perceptron
    "blocks": 1,  # of each stage
    "clients": 10,  # N
    "sampled": 10,  # S of a round
    "split": "label",  # one label a client; or "shards", about two, or "dirichlet"
    "concentration": 0.1,  # of the Dirichlet distribution
    "steps": 32,  # K
    "batch": 16,
    "rounds": 60,  # 0 leaves the problem out
    "looks": 60,  # at loss and accuracy
    "tail": 10,  # looks whose mean is the final value
    "seeds": 10,
    "draws": 4,  # on which settings are chosen
    # Every method tries as many settings, here 45: local rate, server rate, and its own third
    # number; methods without one try more local rates.
    "etas": (0.01, 0.03, 0.1, 0.3, 1.0),
    "more_etas": (
        0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0,
    ),
    "servers": (0.3, 1.0, 3.0),  # gamma / (eta K): 1 goes to the mean of the clients' models
    "betas": (0.03, 0.1, 0.3),
    "mus": (0.01, 0.1, 1.0),  # of FedProx
    "momenta": (0.5, 0.8, 0.9),  # of the server
}  # fmt: skip
PARTIAL = {"clients": 20, "sampled": 2, "split": "shards", "steps": 16, "rounds": 120, "looks": 120}
NOISY = {
    "clients": 100, "sampled": 5, "split": "shards", "steps": 16, "batch": 1,
    "rounds": 200, "looks": 200,
}  # fmt: skip
NETWORK = {
    "dataset": "mnist_5k",
    "widths": (8, 16),
    "clients": 100,
    "sampled": 10,
    "split": "dirichlet",
    "steps": 10,
    "rounds": 0,
    "looks": 20,
    "tail": 2,
    "seeds": 5,
    "draws": 1,
    "etas": (0.03, 0.1),
    "more_etas": (0.01, 0.03, 0.1, 0.3),
    "servers": (1.0,),
    "betas": (0.1, 0.3),
    "mus": (0.01, 0.1),
    "momenta": (0.5, 0.9),
}
BASE = {
    "expected": "about 10 minutes and 1 GB of memory on two CPU cores",
    "mesh": {"data": 1},  # one device computes all
    "methods": (
        "fedavg",
        "fedprox",
        "server-momentum",
        "fedavg-m",
        "fedavg-m-vr",
        "scaffold",
        "scaffold-m",
        "scaffold-m-vr",
    ),
    # Tried unchosen too: FL-Simulator's for FedCM; mu and the server's momentum as often published.
    "published": {"eta": 0.1, "server": 1.0, "beta": 0.1, "mu": 0.01, "momentum": 0.9},
    "target": 0.85,  # accuracy to be reached
    "full": DIGITS,
    "partial": DIGITS | PARTIAL,
    "noisy": DIGITS | PARTIAL | NOISY,
    "network": DIGITS | NETWORK,
    "network_100": DIGITS | NETWORK,
    # Clients' losses (x - b_i)' A_i (x - b_i) / 2 whose gradients get Gaussian noise.
    "quadratics": {
        "dimension": 10,
        "heterogeneity": 1.0,  # scale of the b_i
        "condition": 10.0,  # largest over smallest curvature of the mean, whose largest is 1
        "seeds": 10,
        "tail": 0.25,  # of the rounds, whose mean squared gradient is the error
        # Exact gradients: where the methods end, by K. Settings are those of the hand cases.
        "bias": {
            "clients": 10, "steps": (1, 4, 16), "rounds": 1000,
            "eta": 0.1, "gamma": 0.2, "beta": 0.1,
        },
        # Noisy gradients, all clients: the error by N at one K, and by K at one N.
        "floors": {
            "clients": (2, 8, 32), "steps": (1, 4, 16), "middle": (8, 4), "rounds": 400,
            "noise": 1.0, "eta": 0.05, "gamma": 0.2, "beta": 0.1,
        },
        # Settings chosen for each problem, as many for each method.
        "gain": {
            "pairs": ((10, 10), (100, 2), (100, 10)),  # N, S
            "steps": 8,
            "rounds": 200,
            "noises": (0.0, 3.0),
            "draws": 2,
            "etas": (0.001, 0.01, 0.1),
            "more_etas": (
                0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2,
            ),
            "gammas": (0.03, 0.1, 0.3, 1.0),
            "betas": (0.01, 0.05, 0.2, 0.6),
        },
    },
}  # fmt: skip
QUICK = {
    "seeds": 2, "draws": 1, "rounds": 4, "looks": 4, "tail": 2, "steps": 2,
    "etas": (0.03, 0.1), "more_etas": (0.03, 0.1), "servers": (1.0,),
    "betas": (0.1,), "mus": (0.01,), "momenta": (0.5,),
}  # fmt: skip
SMOKE = {
    "expected": "about a minute, nearly all of it compilation",
    **{f"full.{key}": value for key, value in QUICK.items()},
    "partial.rounds": 0,
    "noisy.rounds": 0,
    # One shape for bias, floors and the first pair: they share programs.
    "quadratics.seeds": 2,
    "quadratics.bias.clients": 4,
    "quadratics.bias.steps": (1, 2, 3, 4),
    "quadratics.bias.rounds": 20,
    "quadratics.floors.clients": (2, 4),
    "quadratics.floors.steps": (2, 4),
    "quadratics.floors.middle": (2, 3),
    "quadratics.floors.rounds": 20,
    "quadratics.gain.pairs": ((4, 4), (4, 2)),
    "quadratics.gain.steps": 4,
    "quadratics.gain.rounds": 20,
    "quadratics.gain.draws": 1,
    "quadratics.gain.etas": (0.1,),
    "quadratics.gain.more_etas": (0.01, 0.03, 0.1, 0.3),
    "quadratics.gain.gammas": (0.1, 0.3),
}
FULL = {
    "expected": "about two hours and 2 GB of memory on two CPU cores (an estimate)",
    "network.rounds": 100,
}
CIFAR = {
    "dataset": "cifar10", "widths": (64, 128, 256, 512), "blocks": 2, "batch": 50, "steps": 50,
    "rounds": 1000, "looks": 50, "concentration": 0.3,
}  # fmt: skip
PAPER = {
    "expected": "days on one H100 (an estimate; untested)",
    **{f"network.{key}": value for key, value in CIFAR.items()},
    "network.clients": 10,
    "network.sampled": 10,
    **{f"network_100.{key}": value for key, value in CIFAR.items()},
}
PRESETS = {"smoke": SMOKE, "default": {}, "full": FULL, "paper": PAPER}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset."""
    return apply_preset(BASE, PRESETS, preset)
