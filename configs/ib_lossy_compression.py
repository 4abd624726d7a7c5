"""Information by lossy compression: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  minutes on two CPU cores: Gaussians, pictures of known information, digits; no download
full     with the paper's convolutional network on mnist_5k (extra `data`), 32 x 32 pictures
paper    the published networks on MNIST, untested: TFDS name mnist, image (28, 28, 1) uint8 and
         label, CC BY-SA 3.0; prepare it with `python -m rlib.data prepare mnist` (extra `paper`)
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

BASE = {
    "expected": "about 8 minutes and 2.5 GB of memory on two busy CPU cores",
    "seeds": 5,
    "mesh": {"data": 1},  # it stays on one device
    "gaussians": {
        # Dimension of X and of Y, samples.
        "cells": ((2, 500), (4, 500), (10, 500), (2, 5000), (4, 5000)),
        "mi": (0.0, 2.0, 5.0),  # nats; empty leaves the part out
        "bounds": ("nwj", "infonce", "mine", "smile"),
    },
    "critics": {  # of the variational bounds; rate and number of steps tuned on a draw of their own
        "learning_rates": (3e-4, 1e-3, 3e-3),
        "steps": 1000,
        "looks": 4,
        "batch": 128,
    },
    "images": {
        # Turned: random rotations mix the parameters of X, and those of Y.
        "kinds": ("bumps", "bumps, turned", "rectangles"),
        "size": 16,  # pixels a side
        "samples": 5000,
        "compressor_samples": 6000,  # separate pictures
        "mi": (0.0, 2.5, 5.0, 7.5, 10.0),  # nats; empty leaves the part out
        "channels": (),  # of the autoencoder's convolutions
        "widths": (128, 64),
        "steps": 1000,
        "batch": 256,
        "learning_rate": 1e-3,
        "pixels": 8,  # of the pictures as they are, with noise
        "pixel_noise": 1e-3,
        "bounds": ("mine",),  # on the pictures as they are
    },
    "digits": {
        "dataset": "digits",
        "epochs": 200,  # 0 leaves the part out
        "every": 5,  # epochs
        "noise": (1e-3,),  # relative to each number
        "channels": (),
        "widths": (32, 16, 8),
        "dropout": 0.0,
        "batch": 128,
        "learning_rate": 1e-3,
        "estimators": ("wkl", "ksg"),
        "dim": 4,  # of the codes of inputs and layers
        "evaluated": "all",  # images that codes and estimates are of; or test
        "code": "pca",  # of inputs; or autoencoder
        "code_channels": (),
        "code_steps": 0,
        "code_batch": 256,
        "code_learning_rate": 1e-3,
        "layer_code": "pca",  # or autoencoder, learnt anew at each look
        "layer_code_widths": (24, 16),
        "layer_code_steps": 1000,
        "seeds": 5,
    },
    "mnist": {
        "dataset": "mnist_5k",
        "epochs": 0,
        "every": 5,
        "noise": (1e-3,),
        "channels": (8, 16, 32),
        "widths": (32,),
        "dropout": 0.1,
        "batch": 256,
        "learning_rate": 3e-4,
        "estimators": ("wkl", "kl", "ksg"),
        "dim": 4,
        "evaluated": "all",
        "code": "autoencoder",
        "code_channels": (8, 16, 32),
        "code_steps": 2000,
        "code_batch": 256,
        "code_learning_rate": 1e-3,
        "layer_code": "pca",
        "layer_code_widths": (24, 16),
        "layer_code_steps": 1000,
        "seeds": 3,
    },
}
SMOKE = {
    "expected": "about 40 seconds",
    "seeds": 2,
    "gaussians.cells": ((4, 64),),  # of the pictures' size: they share programs
    "gaussians.mi": (0.0, 2.0),
    "gaussians.bounds": ("infonce",),
    "critics.learning_rates": (1e-3,),
    "critics.steps": 4,
    "critics.looks": 2,
    "critics.batch": 8,
    "images.kinds": ("bumps",),
    "images.size": 2,
    "images.pixels": 4,
    "images.samples": 64,
    "images.compressor_samples": 64,
    "images.mi": (0.0, 2.0),
    "images.widths": (8,),
    "images.steps": 4,
    "images.batch": 16,
    "images.bounds": ("infonce",),
    "digits.epochs": 2,
    "digits.every": 1,
    "digits.noise": (1e-3,),
    "digits.widths": (),
    "digits.estimators": ("ksg",),
    "digits.layer_code": "autoencoder",
    "digits.layer_code_widths": (),
    "digits.layer_code_steps": 2,
    "digits.seeds": 2,
}
FULL = {
    "expected": "about half an hour and 3 GB of memory on two CPU cores (an estimate)",
    "gaussians.cells": tuple((d, n) for n in (500, 5000) for d in (1, 2, 3, 4, 6, 10)),
    "images.kinds": ("bumps", "bumps, turned", "rectangles", "rectangles, turned"),
    "images.bounds": ("infonce", "mine"),
    "critics.steps": 4000,
    "critics.looks": 8,
    "images.size": 32,
    "digits.noise": (1e-3, 0.3),
    "mnist.epochs": 100,
}
PAPER = {
    "expected": "some hours on one H100 (an estimate); untested",
    "images.kinds": ("bumps, turned", "rectangles, turned"),
    "images.size": 32,
    "images.mi": tuple(0.25 * i for i in range(41)),
    "digits.epochs": 0,
    "mnist.dataset": "mnist",
    "mnist.epochs": 300,
    "mnist.batch": 1024,
    "mnist.learning_rate": 1e-5,
    "mnist.evaluated": "test",
    "mnist.code_steps": 23_400,  # 200 epochs
    "mnist.code_batch": 512,
    "mnist.code_learning_rate": 1e-2,
}
PRESETS = {"smoke": SMOKE, "default": {}, "full": FULL, "paper": PAPER}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset."""
    return apply_preset(BASE, PRESETS, preset)
