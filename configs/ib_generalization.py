"""How does information bottleneck help deep learning: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  minutes on two CPU cores: 3600 small networks on blobs, no download
full     the published widths, 20 data draws, other settings as default
paper    the published grid on blobs: widths 32 to 256, 3 data draws and 3 initialisations. Its data
         is `sklearn.datasets.make_blobs` (scikit-learn, BSD-3-Clause): nothing to prepare. The
         published MNIST, Fashion-MNIST and CIFAR-10 grids (the last one 180 trainings) are left out
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

BASE = {
    "expected": "about 6 minutes and 2 GB of memory on two CPU cores",
    "seeds": 50,  # data draws, each with blobs of its own, which differ most; the paper has 3
    "mesh": {"data": -1},  # networks are split over it
    "published_draws": 3,  # random_state 0, 1 and 2: the paper's centres, other examples
    "initialisations": 2,  # the same for every data draw; the paper has 3
    "widths": (16, 32, 64),  # of the first half of the hidden layers, the others have half of it
    # Hidden layers of the encoder, Z included. Claims are about the last number, the paper's.
    "layers": (2, 4),
    "decays": (0.0, 1e-2, 1e-1),  # weight decay
    "blobs": {
        "centers": 5,  # in two dimensions, uniform in a square of side 20
        "sd": 0.7,
        "train": 50,
        "test": 250,
        # For the information of the representation. The paper's is ten times the training set; its
        # limit log(500 / 5) = 4.6 nats for I(X; Z | Y) by mc is what networks without decay reach.
        "fresh": 1000,
    },
    "learning_rate": 1e-2,
    "momentum": 0.9,
    "epochs": 300,  # of one step: the paper's batches of 64 hold all 50 examples
    "noise_draws": 20,  # a loss is the mean over them
    "bins": 10,
    "swag": {
        "start": 200,  # epochs before the first one recorded
        "rank": 10,
        "draws": 10,  # from each posterior
        "floor": 1e-6,  # least variance of a weight, which the official code adds in densities
    },
    "target": 1.5,  # nats, of I(X; Z) in the constrained series
    "multiplier_rate": 5e-4,
    "least_accuracy": 0.85,  # on training examples, of networks that are compared
    "resamples": 200,  # of the bootstrap
}
SMOKE = {
    "expected": "about 10 seconds",
    "seeds": 2,
    "initialisations": 1,
    "widths": (4,),
    "layers": (2,),
    "blobs.train": 20,
    "blobs.test": 20,
    "blobs.fresh": 40,
    "epochs": 4,
    "noise_draws": 2,
    "swag.start": 1,
    "swag.rank": 2,
    "swag.draws": 2,
    "least_accuracy": 0.0,
    "resamples": 20,
}
FULL = {
    "expected": "about half an hour and 5 GB of memory on two CPU cores (an estimate)",
    "seeds": 20,
    "widths": (32, 64, 128, 256),
}
PAPER = {
    "expected": "about 10 minutes and 4 GB of memory on two CPU cores (an estimate); untested",
    "seeds": 3,
    "initialisations": 3,
    "widths": (32, 64, 128, 256),
    "layers": (4,),
    "blobs.fresh": 500,
}
PRESETS = {"smoke": SMOKE, "default": {}, "full": FULL, "paper": PAPER}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset."""
    return apply_preset(BASE, PRESETS, preset)
