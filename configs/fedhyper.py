"""FedHyper: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  minutes on two CPU cores: digits over twenty clients, no download
full     mnist_5k over a hundred clients (extra `data`), five seeds
paper    the published setting, never run here: ResNet-18 (with group norm) on CIFAR-10, a hundred
         clients, Dirichlet(0.5), ten of them in a round, ten local epochs in batches of 64; TFDS
         name cifar10, image (32, 32, 3) and label, licence not stated; prepare it with
         `python -m rlib.data prepare cifar10` (extra `paper`)
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

METHODS = (
    "fedavg",
    "decay",
    "fedadam",
    "fedadagrad",
    "fedexp",
    "g",
    "sl",
    "cl",
    "g+cl",
    "gm",
)
BASE = {
    "expected": "about 3 minutes and 1 GB of memory on two CPU cores",
    "seeds": 10,
    "mesh": {"data": 1},  # it stays on one device
    "dataset": "digits",
    "shift": 0.3,  # subtracted from pixels in [0, 1]
    "hidden": (32,),  # of the perceptron
    "widths": (),  # of a ResNet in its place
    "blocks": 2,  # of each width
    "groups": 8,  # of channels, of its group norm
    "clients": 20,
    "size": 64,  # examples a client
    "concentration": 0.5,  # of the Dirichlet distribution of a client's labels
    "sampled": 5,  # clients a round
    "batch_size": 16,
    "steps": 10,  # K, local; 0 takes the epochs
    "epochs": 10,
    "rounds": 60,
    "last": 5,  # rounds whose mean accuracy is the final one
    "check": 1000,  # training examples at most by whose accuracy settings are chosen
    "methods": METHODS,
    "rates": (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.3, 1.0),  # beta_0
    "worst": (0.003, 0.3),  # the specification's range of beta_0, of which the worst is reported
    "small": (0.003, 0.01),  # of beta_0, too small
    "good": 0.05,  # beta_0 beside bad global rates
    "large": 0.3,  # beta_0 of the failure
    "alphas": (0.1, 0.3, 1.0, 3.0, 10.0),  # global rates, with all of beta_0; () leaves them out
    "alpha_methods": ("fedavg", "g", "g+cl"),
    "gamma": 10.0,  # published bound of beta
    "repair": 3.0,  # bound that repairs the failure
    "gammas": (1.0, 3.0, 10.0, 30.0),  # bounds, of alpha for G, of beta else
    "gamma_methods": ("g", "sl", "cl", "g+cl"),
    "ablations": (
        "cl no global term",
        "g+cl no global term",
        "g official bounds",
        "gm official",
        "sl official",
        "cl official",
        "g+cl official",
        "gm fixed alpha",
        "fedavg He weights",
        "sl He weights",
        "g+cl He weights",
    ),
    "momentum": 0.9,  # of GM, from the official code
    "target": 0.9,  # accuracy to be reached, in the comparison of tuned methods
    "tuning": {
        "draws": 3,
        "one": (0.003, 3.0, 24),  # rates of methods without a second setting: from, to, how many
        "two": (0.01, 3.0, 6),  # rates of methods with one, each with all of:
        "decay": (0.995, 0.98, 0.95, 0.9),  # factor a round
        "fedadam": (0.01, 0.03, 0.1, 0.3),  # rate of the server
        "fedadagrad": (0.01, 0.03, 0.1, 0.3),  # rate of the server
    },
    "timed": ("fedavg", "g", "sl", "cl", "g+cl"),  # against the first
    "repeats": 20,  # of all rounds, side by side
    "turns": 5,  # of a repeat; the quickest counts
}
SMOKE = {
    "expected": "about 1 minute",
    "seeds": 1,
    "clients": 4,
    "size": 16,
    "sampled": 2,
    "steps": 2,
    "batch_size": 4,
    "rounds": 4,
    "last": 2,
    "check": 20,
    "rates": (0.003, 0.01, 0.05, 0.3),
    "alphas": (0.1, 10.0),
    "alpha_methods": ("fedavg", "g", "g+cl"),
    "gammas": (3.0, 10.0),
    "ablations": ("cl no global term", "g+cl no global term", "cl official"),
    "tuning.draws": 1,
    "tuning.one": (0.01, 1.0, 2),
    "tuning.two": (0.1, 0.1, 1),
    "tuning.decay": (0.98, 0.9),
    "tuning.fedadam": (0.01, 0.1),
    "tuning.fedadagrad": (0.01, 0.1),
    "timed": ("fedavg", "g+cl"),
    "repeats": 2,
    "turns": 2,
}
FULL = {
    "expected": "about three hours and 2 GB of memory on two CPU cores (an estimate)",
    "seeds": 5,
    "dataset": "mnist_5k",
    "hidden": (64,),
    "clients": 100,
    "size": 32,
    "sampled": 10,
    "rounds": 100,
}
PAPER = {
    "expected": "about ten days on one H100 (an estimate); fewer --config.rates make it shorter",
    "seeds": 5,
    "dataset": "cifar10",
    "widths": (64, 128, 256, 512),
    "groups": 32,
    "clients": 100,
    "size": 500,
    "sampled": 10,
    "batch_size": 64,
    "steps": 0,
    "rounds": 50,
    "rates": (0.001, 0.003, 0.01, 0.05, 0.3),
    "alphas": (0.1, 10.0),
    "gammas": (3.0, 10.0),
    "target": 0.6,
    "tuning.draws": 1,
    "tuning.one": (0.003, 0.3, 8),
    "tuning.two": (0.01, 0.1, 2),
    "repeats": 3,
}
PRESETS = {"smoke": SMOKE, "default": {}, "full": FULL, "paper": PAPER}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset."""
    return apply_preset(BASE, PRESETS, preset)
