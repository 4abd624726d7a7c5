"""I/O of attention: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  a minute on two CPU cores: 1024 queries executed, a million counted; no download
full     up to 2048 queries executed

There is no preset of the published setting: the paper has no experiments.
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

BASE = {
    "expected": "about 1 minute and 500 MB of memory on two CPU cores",
    "seeds": 1,  # draws of queries, keys and values; what is moved does not depend on them
    "mesh": {"data": 1},  # it stays on one device
    "methods": ("square", "fa2", "fa1", "unfused"),
    "executed": {  # in a cache that counts
        "n": (256, 1024),  # queries, and keys
        "d": (16, 64),  # their width
        "m": tuple(4**i for i in range(3, 10)),  # words of cache, on both sides of d^2
    },
    "counted": {  # by the closed forms
        "n": 2**20,
        "d": (64, 256),
        "octave": 16,  # values of m an octave
    },
    "crossing": (16, 32, 64, 128, 256, 512),  # widths at which the winner is followed over every m
    "memories": {  # words
        "A100 multiprocessor, bfloat16": 98304,  # 192 KiB, of which some are the L1 cache's
        "H100 multiprocessor, float32": 58112,  # 227 KiB, what one block may have
        "registers of one, 32 bits": 65536,  # 256 KiB
        "TPU v5e, float32": 2**25,  # 128 MiB of VMEM
    },
    "heads": (64, 128, 256, 512, 1024),  # widths
    "practical": 256,  # the widest head in use
    "constant": 10.5,  # over the bound, as derived before any run
    "time": {
        "n": (1024, 4096),  # queries, and keys
        "d": 64,
        "m": 2**18,  # words of float32 in the 1 MiB of L2 cache of a core; an assumption elsewhere
        "inner": 64,  # keys a tile
        "repeats": 7,  # in turns
    },
}
SMOKE = {
    "expected": "about 10 seconds",
    "executed.n": (32,),
    "executed.d": (4, 8),
    "executed.m": (16, 64, 256, 1024),
    "counted.n": 2**12,
    "counted.d": (64,),
    "counted.octave": 4,
    "crossing": (16, 32),
    "heads": (64, 512),
    "time.n": (64,),
    "time.d": 8,
    "time.m": 4096,
    "time.inner": 16,
    "time.repeats": 2,
}
FULL = {
    "expected": "about a quarter of an hour and 2 GB of memory on two CPU cores (an estimate)",
    "executed.n": (256, 1024, 2048),
    "executed.d": (16, 64, 128),
    "crossing": (16, 32, 64, 128, 256, 512, 1024),
    "time.n": (1024, 4096, 8192),
}
PRESETS = {"smoke": SMOKE, "default": {}, "full": FULL}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset."""
    return apply_preset(BASE, PRESETS, preset)
