"""EControl: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  minutes on two CPU cores: least squares and digits, no download
full     with a residual network on mnist_5k (extra `data`)
slow_network   two processes over real TCP, on links of 50 to 1000 Mbit/s made on one machine from
         network namespaces; needs root and Linux
paper    the published network: ResNet-18 (with group norm) on CIFAR-10, eight workers, Top-10 %;
         TFDS name cifar10, image (32, 32, 3) and label, licence not stated; prepare it with
         `python -m rlib.data prepare cifar10` (extra `paper`)
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

BASE = {
    "expected": "about 1 minute and 1 GB of memory on two CPU cores",
    "seeds": 5,
    "mesh": {"data": 1},  # it stays on one device
    "momentum": 0.1,  # a of EF21-SGDM
    "squares": {
        "dimension": 60,
        "k": 6,  # Top-K, so delta = 0.1
        "rounds": 3000,  # 0 leaves the problem out
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
        "dataset": "digits",
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
        "dataset": "mnist_5k",
        "workers": 8,
        "fraction": 0.1,
        "batch": 16,
        "rounds": 0,
        "looks": 20,
        "decay": 0.0,
        "gammas": (0.03, 0.1, 0.3),
        "widths": (8, 16, 32),
        "blocks": 1,  # of each width
        "groups": 4,  # of the group norm
        "seeds": 3,
    },
    "network": {
        "megabits": (),  # a second, of each host's link; empty leaves the part out
        "hosts": 2,
        "hidden": (2048, 1024),  # 2.2 million parameters
        "fraction": 0.01,  # Top-K
        "batch": 32,  # digits a host and step; a host has its own labels
        "learning_rate": 0.1,
        "steps": 30,
        "repeats": 3,
        "timeout": 1200,  # seconds
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
    "digits.gammas": (0.1, 0.3),
    "digits.seeds": 2,
}
FULL = {
    "expected": "about half an hour and 2 GB of memory on two CPU cores (an estimate)",
    "squares.noise": (1.0, 10.0),
    "resnet.rounds": 300,
}
PAPER = {
    "expected": "about ten hours on one H100 (an estimate)",
    "squares.noise": (1.0, 10.0),
    "resnet.dataset": "cifar10",
    "resnet.batch": 64,
    "resnet.rounds": 15_000,
    "resnet.looks": 60,
    "resnet.decay": 5e-4,
    "resnet.widths": (64, 128, 256, 512),
    "resnet.blocks": 2,
    "resnet.groups": 32,
}
SLOW_NETWORK = {
    "expected": "about 10 minutes and 2 GB of memory on two cores, as root on Linux",
    "squares.rounds": 0,
    "digits.rounds": 0,
    "network.megabits": (50.0, 200.0, 1000.0),
}
PRESETS = {
    "smoke": SMOKE,
    "default": {},
    "full": FULL,
    "paper": PAPER,
    "slow_network": SLOW_NETWORK,
}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset."""
    return apply_preset(BASE, PRESETS, preset)
