"""FedSpeed: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  minutes on two CPU cores: digits over 20 clients, a perceptron, no download
full     mnist_5k over 100 clients and a small residual network (extra `data`)
paper    the published setting, never run: CIFAR-10 over 100 clients and a residual network of
         widths 64 to 512; TFDS names cifar10 and cifar100, image (32, 32, 3) and
         label, licence not stated; prepare them with `python -m rlib.data prepare cifar10` (extra
         `paper`). It takes the published settings in place of tuned ones.
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

#: For methods of one setting alone.
RATES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
BASE = {
    "expected": "about 3 minutes and 1 GB of memory on two CPU cores",
    "mesh": {"data": 1},  # one device computes all; a round's clients are few
    "seeds": 10,  # each has its own split of the data, weights and batches
    "dataset": "digits",
    "hidden": (32,),  # units of the perceptron
    "widths": (),  # channels of a residual network's stages, in its place
    "blocks": 1,  # of each width
    "groups": 4,  # of its group norm
    "clients": 20,
    "sampled": 4,  # clients a round
    "concentration": 0.1,  # of the Dirichlet distribution of a client's labels
    "size": 64,  # examples a client
    "rounds": 60,
    "looks": 60,  # at losses and accuracies, along the rounds
    "last": 10,  # looks whose mean is reported
    "target": 0.8,  # accuracy
    "intervals": (10, 20, 40),  # K, local steps a round, or epochs
    "unit": "steps",
    "batch": 16,  # examples
    "clip": 0.0,  # the direction's norm, for methods with an optimiser; 0 does not
    "weight_decay": 0.0,
    "rate_decay": 1.0,  # of the rate, by round
    # What is tried for each method: all combinations, as many for all. `prox` is lambda. The rates
    # were moved once, when a first run chose FedSpeed's and FedAvg-M's at the ends of their grids.
    "trials": {
        "fedavg": {"rate": RATES},
        "fedprox": {"rate": (0.1, 0.3, 0.5, 0.7), "proximal": (0.01, 0.1, 1.0)},
        "fedsam": {"rate": (0.1, 0.3, 0.5, 0.7), "ascent": (0.05, 0.1, 0.2)},
        "scaffold": {"rate": RATES},
        "fedavg-m": {"rate": (0.3, 0.6, 1.0, 2.0), "beta": (0.1, 0.3, 0.6)},
        "correction": {"rate": (0.1, 0.2, 0.3, 0.5), "prox": (1.0, 10.0, 100.0)},
        "fedspeed": {"rate": (0.1, 0.3, 0.5), "prox": (1.0, 10.0), "ascent": (0.05, 0.1)},
        "fedspeed-sampled": {"rate": (0.1, 0.3, 0.5), "prox": (1.0, 10.0), "ascent": (0.05, 0.1)},
    },
    "draws": 3,  # a trial
    # One at a time from FedSpeed's setting at the first K.
    "vary": {
        "mixing": (0.0, 0.5, 1.0),  # alpha
        "ascent": (0.0, 0.02, 0.05, 0.1, 0.2),  # rho
        "prox": (1.0, 3.0, 10.0, 30.0, 100.0),
    },
}
SMOKE = {
    "expected": "about 40 seconds",
    "seeds": 2,
    "hidden": (8,),
    "rounds": 4,
    "looks": 4,
    "last": 2,
    "target": 0.1,
    "intervals": (1, 2),
    "batch": 4,
    "draws": 1,
}
FULL = {
    "expected": "about three hours and 2 GB of memory on two CPU cores (an estimate)",
    "seeds": 5,
    "dataset": "mnist_5k",
    "widths": (8, 16),
    "clients": 100,
    "sampled": 10,
    "size": 36,
    "rounds": 100,
    "looks": 50,
    "intervals": (10,),
    "draws": 1,
}
#: The published settings; SCAFFOLD's and FedAvg-M's in the same code.
PUBLISHED = {
    "fedavg": {"rate": (0.1,)},
    "fedprox": {"rate": (0.1,), "proximal": (0.1,)},
    "fedsam": {"rate": (0.1,), "ascent": (0.1,)},
    "scaffold": {"rate": (0.1,)},
    "fedavg-m": {"rate": (0.1,), "beta": (0.1,)},
    "correction": {"rate": (0.1,), "prox": (10.0,)},
    "fedspeed": {"rate": (0.1,), "prox": (10.0,), "ascent": (0.1,)},
    "fedspeed-sampled": {"rate": (0.1,), "prox": (10.0,), "ascent": (0.1,)},
}
PAPER = {
    "expected": "about a week on one H100 (an estimate)",
    "seeds": 5,
    "dataset": "cifar10",
    "widths": (64, 128, 256, 512),
    "blocks": 2,
    "groups": 32,
    "clients": 100,
    "sampled": 10,
    "concentration": 0.1,  # and 0.3, 0.6
    "size": 500,
    "rounds": 1000,
    "looks": 100,
    "last": 1,
    "intervals": (5,),
    "unit": "epochs",
    "batch": 50,
    "clip": 10.0,
    "weight_decay": 1e-3,
    "rate_decay": 0.998,
    "trials": PUBLISHED,
    "draws": 0,
}
PRESETS = {"smoke": SMOKE, "default": {}, "full": FULL, "paper": PAPER}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset."""
    return apply_preset(BASE, PRESETS, preset)
