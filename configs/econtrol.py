"""EControl: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  a minute on two CPU cores: least squares and digits, no download
full     with a residual network on mnist_5k (extra `data`): half an hour on two cores
paper    the published network is ResNet-18 on CIFAR-10 (TFDS name cifar10, image (32, 32, 3) and
         label; prepare it with `python -m rlib.data prepare cifar10`, extra `paper`); its licence
         is not stated. Not built yet: `full` is the largest that runs.
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

BASE = {
    "expected": "about 1 minute and 1 GB of memory on two CPU cores",
    "seeds": 5,
    "mesh": {"data": -1},
    "momentum": 0.1,  # a of EF21-SGDM
    "squares": {
        "dimension": 60,
        "k": 6,  # Top-K, so delta = 0.1
        "rounds": 3000,
        "workers": 5,
        "heterogeneity": (0.0, 10.0),  # zeta
        "gammas": (0.002, 0.005, 0.01, 0.02, 0.05),  # step sizes
        "many_workers": (2, 4, 8, 16),
        "noise": (10.0,),  # s
        "noisy_gamma": 0.002,
        "gains": (0.0025, 0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 10.0),  # eta / delta; 1/400 is the theory's
        "gain_gamma": 0.01,
    },
    "digits": {
        "workers": 10,
        "fraction": 0.05,  # Top-K
        "batch": 16,  # examples a worker and round
        "rounds": 1000,  # 0 leaves the problem out
        "looks": 50,  # at loss and accuracy
        "decay": 1e-3,  # of the squared weights
        "gammas": (0.03, 0.1, 0.3, 1.0, 3.0),
        "seeds": 5,
    },
    "resnet": {
        "workers": 8,
        "fraction": 0.1,
        "batch": 16,
        "rounds": 0,
        "looks": 20,
        "decay": 0.0,
        "gammas": (0.03, 0.1, 0.3),
        "widths": (8, 16, 32),
        "seeds": 3,
    },
}
SMOKE = {
    "expected": "about 20 seconds",
    "seeds": 2,
    "squares.rounds": 60,
    "squares.gammas": (0.005, 0.01, 0.02),
    "squares.many_workers": (2, 4),
    "squares.heterogeneity": (10.0,),
    "squares.gains": (1.0, 10.0),
    "digits.rounds": 20,
    "digits.looks": 4,
    "digits.gammas": (0.3,),
    "digits.seeds": 2,
}
FULL = {
    "expected": "about half an hour and 2 GB of memory on two CPU cores (an estimate)",
    "squares.noise": (1.0, 10.0),
    "resnet.rounds": 300,
}
PRESETS = {"smoke": SMOKE, "default": {}, "full": FULL}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset."""
    return apply_preset(BASE, PRESETS, preset)
