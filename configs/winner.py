"""WINNER: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  minutes on two CPU cores; tests every claim
full     nine bands, networks twice as wide, twice the settings of every rival: hours on two cores
paper    the published networks and numbers of steps (4 x 222 for sounds, 4 x 256 and 4,000 steps
         for 512 x 512 pixels), on data that ship with the installed packages: scikit-image's
         camera (CC0), which the paper uses too, and a chime (MIT) in place of the paper's clips,
         which come with no licence: the data sets photographs/camera, photographs/gravel and
         sounds/chime-success of rlib.data, prepared on first use. Untested: wants an accelerator.
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

BASE = {
    "expected": "about 7 minutes and 1 GB of memory on two CPU cores",
    "seeds": 5,  # network draws; at least 5 for the claims
    "mesh": {"data": -1},
    "optimizer": {
        "learning_rate": 1e-4,  # Adam, as published for all methods
        "decay": {"audio": 0.99, "image": 0.998},  # factor ...
        "decay_steps": 20,  # ... every so many steps, both as published
    },
    "model": {"width": 64, "layers": 4},
    "bands": {
        "edges": ((0.0, 0.1), (0.1, 0.4), (0.3, 0.7), (0.5, 0.9)),  # fractions of Nyquist
        "samples": 4096,
        "steps": 600,
        "siren": (30, 300, 1000, 2000, 3000, 10000),  # w_first, all of them for all seeds
        "tuned": {"seeds": 2},  # of the tuned methods
    },
    "pictures": {
        "photograph": "photographs/camera",
        "texture": "photographs/gravel",
        "size": 96,  # pixels a side
        "shrink": 5,  # photograph: mean over blocks of that many pixels
        "width": 64,
        "steps": 300,
        "siren": (30, 60, 120),  # w_first; 30 is the published one
        "seeds": 3,
    },
    "sound": {
        "name": "sounds/chime-success",
        "samples": 8192,
        "width": 64,
        "steps": 300,
        "siren": (300, 1000, 3000, 10000),  # w_first; 3000 is the published one
        "seeds": 3,
    },
    "denoising": {
        "photons": 30.0,  # Poisson noise of a photograph of that many photons at white ...
        "readout": 2.0,  # ... and Gaussian readout noise of that many photons
    },
    "speed": {"samples": 150_000, "width": 222, "chunk_rows": 500, "steps": 4, "repeats": 5},
    # (rate, the network's own scale): two trials each, on a draw that no result uses
    "tuned": {
        "winner-tuned": ((5e-4, 30.0), (1e-3, 30.0)),  # w_first stays as published
        "siren-tuned": ((5e-4, 100.0), (5e-4, 1000.0)),  # w_first
        "fourier": ((1e-3, 0.1), (5e-3, 1.0)),  # sigma, as a fraction of Nyquist
        "finer": ((5e-4, 5.0), (1e-4, 20.0)),  # k
        "gauss": ((1e-3, 10.0), (1e-3, 30.0)),  # s
        "wire": ((1e-3, 10.0), (1e-3, 20.0)),  # w and s
    },
    "chunk": 100,  # steps per device call
}

SMOKE = {
    "expected": "about 20 seconds",
    "seeds": 2,
    "model.width": 16,
    "model.layers": 2,
    "bands.edges": ((0.0, 0.1), (0.5, 0.9)),
    "bands.samples": 256,
    "bands.steps": 20,
    "bands.siren": (30, 3000),
    "bands.tuned.seeds": 1,
    "pictures.size": 16,
    "pictures.shrink": 8,
    "pictures.width": 16,
    "pictures.steps": 20,
    "pictures.siren": (30, 60),
    "pictures.seeds": 1,
    "sound.samples": 256,
    "sound.width": 16,
    "sound.steps": 20,
    "sound.siren": (300, 3000),
    "sound.seeds": 1,
    "speed.samples": 2000,
    "speed.width": 32,
    "speed.steps": 2,
    "speed.repeats": 1,
    # Lengths and rates as above, so that programs are shared.
    "tuned": {
        "winner-tuned": ((1e-4, 30.0),),
        "siren-tuned": ((1e-4, 100.0),),
        "fourier": ((1e-3, 0.3),),
        "finer": ((1e-4, 5.0),),
        "gauss": ((1e-3, 30.0),),
        "wire": ((1e-3, 10.0),),
    },
    "chunk": 10,
}
FULL = {
    "expected": "about 3 hours and 3 GB of memory on two CPU cores (an estimate)",
    "model.width": 128,
    "bands.edges": tuple((lo / 10, (lo + 2) / 10) for lo in range(9)),
    "bands.samples": 8192,
    "bands.steps": 1000,
    "bands.tuned.seeds": 5,
    "pictures.size": 128,
    "pictures.shrink": 4,
    "pictures.width": 128,
    "pictures.steps": 1000,
    "pictures.siren": (30, 60, 120, 240),
    "pictures.seeds": 5,
    "sound.samples": 32768,
    "sound.width": 128,
    "sound.steps": 1000,
    "sound.siren": (30, 300, 1000, 2000, 3000, 10000),
    "sound.seeds": 5,
    "tuned": {
        "winner-tuned": ((1e-4, 30.0), (5e-4, 30.0), (1e-3, 30.0), (2e-3, 30.0)),
        "siren-tuned": ((5e-4, 100.0), (5e-4, 300.0), (5e-4, 1000.0), (1e-3, 1000.0)),
        "fourier": ((1e-3, 0.1), (1e-3, 0.3), (5e-3, 0.3), (5e-3, 1.0)),
        "finer": ((5e-4, 1.0), (5e-4, 5.0), (5e-4, 20.0), (1e-4, 20.0)),
        "gauss": ((1e-3, 10.0), (1e-3, 30.0), (5e-4, 30.0), (5e-3, 10.0)),
        "wire": ((1e-3, 10.0), (1e-3, 20.0), (5e-3, 10.0), (5e-3, 20.0)),
    },
}
PAPER = {
    "expected": "about an hour on one accelerator (untested)",
    "bands.edges": ((0.5, 0.9),),
    "bands.samples": 150_000,
    "bands.steps": 1000,  # epochs of one batch, of the paper
    "model.width": 222,
    "pictures.size": 512,  # the published camera picture is this one; "noise" is not available
    "pictures.shrink": 1,
    "pictures.width": 256,
    "pictures.steps": 4000,  # epochs of one batch, of the official script
    "pictures.siren": (30,),
    "pictures.seeds": 5,
    "sound.samples": 83_168,  # nearly the whole recording; the published clips have up to 150,000
    "sound.width": 222,
    "sound.steps": 1000,
    "sound.siren": (3000,),
    "sound.seeds": 5,
}
PRESETS = {"smoke": SMOKE, "default": {}, "full": FULL, "paper": PAPER}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset."""
    return apply_preset(BASE, PRESETS, preset)
