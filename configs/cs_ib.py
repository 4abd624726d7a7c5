"""CS-IB: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  minutes on two CPU cores: Friedman-1 and six tables, with and without outliers, no download
full     all methods on the tables, five times the data and steps, more seeds
paper    the published setting on California Housing: 200 epochs of batches of 128, rate 1e-4 (x 0.6
         every 10 epochs there; constant here), the published betas. The data: scikit-learn's
         fetch_california_housing (StatLib, 1990 census; licence not stated). TFDS has no such set:
         prepare it once with
         `python -c "from sklearn.datasets import fetch_california_housing as f; f()"`
         Untested; its other sets (Appliance Energy, Beijing PM2.5, Bike Sharing, Rotated MNIST,
         UTKFace) are not here
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

BETAS = (0.001, 0.01, 0.1, 0.3, 1.0)
METHODS = (
    "mse", "huber", "mse-ib", "cs", "cs-ib", "cs-ib-median", "vib", "nib", "nib-squared",
    "nib-exponential", "hsic",
)  # fmt: skip
BASE = {
    "expected": "about 6 minutes on two CPU cores, 1.4 GB of memory",
    "seeds": 10,  # of Friedman-1
    "mesh": {"data": 1},  # it stays on one device
    "together": 5,  # fits that one device call vectorises
    "model": {"hidden": 128, "latent": 32},
    "batch": 64,
    "contamination": {
        "share": 0.2,  # of the training labels
        "scale": 4.0,  # mean of the exponential that is added, in sd of the clean labels
    },
    # Every method tries each rate with each value of one parameter of its own.
    "rates": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "own": {
        "mse": (0.0, 1.0, 3.0, 10.0, 30.0),  # weight decay (decoupled)
        "huber": (0.03, 0.1, 0.3, 1.0, 3.0),  # delta, in sd of the labels
        "mse-ib": BETAS,
        "cs": (0.1, 0.3, 1.0, 3.0, 10.0),  # sigma_y, in sd of the labels
        "cs-ib": BETAS,  # at sigma_y = 1, as published
        "cs-ib-median": BETAS,  # the same, widths on x and t the median distances
        "vib": (1e-4, 1e-3, 1e-2, 0.1, 1.0),
        "nib": (1e-4, 1e-3, 1e-2, 0.1, 1.0),
        "nib-squared": (1e-4, 1e-3, 1e-2, 0.1, 1.0),
        "nib-exponential": (1e-4, 1e-3, 1e-2, 0.1, 1.0),
        "hsic": BETAS,
    },
    "friedman": {
        "train": 420,
        "test": 180,
        "noise": 1.0,  # sd, where the signal's is about 5
        "steps": 360,  # 60 epochs
        "tuning_draws": 2,
    },
    "attacks": {  # distances in sd of each input
        "fgsm": (0.05, 0.1, 0.2, 0.3, 0.5),
        "pgd": 0.3,
        "pgd_step": 0.05,
        "pgd_steps": 10,  # published: 5, which do not reach the distance
    },
    "plane": {
        "methods": ("mse-ib", "cs-ib", "cs-ib-median", "vib"),
        "betas": (0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        "rate": 1e-3,
        "seeds": 5,
    },
    "widths": {
        "method": "cs-ib-median",
        "factors": (0.1, 0.3, 1.0, 3.0, 10.0),  # of sigma_y = 1, and of the median distances
        "beta": 0.1,
        "rate": 1e-3,
        "seeds": 5,
    },
    "tables": {
        "names": ("auto_mpg", "boston_housing", "diabetes", "diamonds", "nox_emissions", "rotated"),
        "methods": ("mse", "huber", "mse-ib", "cs", "cs-ib"),
        "train": 400,  # at most; the tables' own test parts are only tested on
        "test": 400,
        "steps": 360,
        "tuning_draws": 1,
        "seeds": 5,
    },
    "estimators": {
        "samples": (50, 100, 200, 400, 800, 1600),
        "draws": 20,
        "timed": 4000,  # samples, dense against blocked
        "large": 20_000,  # samples, blocked; 0 leaves the timing out
        "block": 256,
        "repeats": 7,  # each the best of three
    },
}
SMOKE = {
    "expected": "about 20 seconds",
    "seeds": 2,
    "together": 2,
    "model.hidden": 8,
    "model.latent": 4,
    "batch": 16,
    "rates": (1e-2,),
    "own": dict.fromkeys(("mse", "cs-ib", "vib"), (0.1, 1.0)),
    "friedman.train": 32,
    "friedman.test": 16,
    "friedman.steps": 4,
    "friedman.tuning_draws": 1,
    "plane.methods": ("cs-ib",),
    "plane.betas": (0.0, 1.0),
    "plane.seeds": 2,
    "widths.method": "cs-ib",
    "widths.factors": (1.0, 3.0),
    "widths.seeds": 2,
    "tables.names": ("diabetes",),
    "tables.methods": ("mse", "cs-ib"),
    "tables.train": 32,
    "tables.test": 16,
    "tables.steps": 4,
    "tables.tuning_draws": 1,
    "tables.seeds": 2,
    "estimators.samples": (20,),
    "estimators.draws": 3,
    "estimators.timed": 100,
    "estimators.large": 200,
    "estimators.block": 50,
    "estimators.repeats": 2,
}
FULL = {
    "expected": "about half an hour and 2 GB of memory on two CPU cores (an estimate)",
    "seeds": 20,
    "plane.methods": tuple(m for m in METHODS[2:] if m != "cs"),
    "plane.seeds": 10,
    "widths.seeds": 10,
    "tables.methods": METHODS,
    "tables.train": 2000,
    "tables.test": 2000,
    "tables.steps": 2000,
    "tables.seeds": 10,
}
PAPER = {
    "expected": "hours on two CPU cores, an hour on a GPU (estimates)",
    "batch": 128,
    "model.latent": 128,
    "rates": (1e-4,),
    "friedman.steps": 3600,  # ten times the default's, since the rate is a tenth
    "plane.rate": 1e-4,
    "widths.rate": 1e-4,
    # The published betas, and as many values for the methods without one.
    "own": {
        **dict.fromkeys(METHODS, (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0)),
        "mse": (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
        "huber": (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0),
        "cs": (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0),
    },
    "tables.names": ("california_housing",),
    "tables.methods": METHODS,
    "tables.train": 12_700,  # 64 % of the 19,648 whose price is below 5, and 20 % of them
    "tables.test": 3_900,
    "tables.steps": 19_800,  # 200 epochs
    "tables.tuning_draws": 1,
}
PRESETS = {"smoke": SMOKE, "default": {}, "full": FULL, "paper": PAPER}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset."""
    return apply_preset(BASE, PRESETS, preset)
