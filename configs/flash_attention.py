"""FlashAttention-2: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  minutes on two CPU cores: up to 4096 queries; no download
full     up to 8192 queries, a longer training
paper    the published setting of the kernels' speed, for one A100, H100 or TPU

The paper's trainings, GPT3-1.3B and 2.7B on eight A100s, are not here.
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

BASE = {
    "expected": "about 4 minutes and 3 GB of memory on two CPU cores",
    "seeds": 5,
    "mesh": {"data": 1},  # it stays on one device
    # "fa2" is `flash_attention`, the implementation that serves on the machine.
    "methods": ("fa2", "fa1", "standard", "jax.nn", "reference"),
    "heads": 4,
    "size": 64,  # of a head
    "tile": 256,  # keys of a tile in FlashAttention's order
    "exact": {
        "lengths": (128, 509, 1024),  # one is a prime number
        "kv_heads": (4, 2),  # one of them groups queries
        "margin": 2.0,  # the factor between errors, as kernels are tested in public
    },
    "memory": {"lengths": (512, 1024, 2048, 4096), "share": 16},  # share: of jax.nn's, 1 / it
    "tiles": {"n": 4096, "sides": (64, 128, 256, 512)},
    "time": {
        "lengths": (512, 1024, 2048, 4096),  # the last one is judged
        "turns": 9,
        "causal_length": 8192,  # eight blocks of queries: 72 of 128 tiles are left
        "causal_turns": 5,
        "jax_nn": 0.4,  # the largest ratio asked for
        "standard": 0.6,
        "fa1": 1.0,
        "causal": 1.6,  # the smallest ratio of full to causal: of 1.7 to 1.8 published for an A100
    },
    "train": {
        "text": "python_source",  # standard-library modules
        "methods": ("fa2", "jax.nn", "reference"),
        "layers": 2,
        "embed": 64,
        "heads": 2,
        "kv_heads": 1,
        "length": 320,  # bytes a sequence; two tiles of keys
        "batch": 4,
        "steps": 200,
        "learning_rate": 1e-3,  # of Adam
        "close": 1e-4,  # nats between losses that count as one
    },
    # On a GPU or TPU alone: 16384 tokens and 2048 hidden numbers, as published.
    "speed": {
        "tokens": 16384,
        "hidden": 2048,
        "size": 128,
        "lengths": (1024, 4096, 16384),
        "causal": (False, True),
        "dtype": "bfloat16",
        "turns": 5,
    },
}
SMOKE = {
    "expected": "about 20 seconds",
    "seeds": 2,
    "heads": 2,
    "size": 8,
    "tile": 16,
    "exact.lengths": (37,),
    "exact.kv_heads": (1,),
    "memory.lengths": (32, 64),
    "tiles.n": 64,
    "tiles.sides": (8, 16),
    "time.lengths": (64,),
    "time.turns": 2,
    "time.causal_length": 64,
    "time.causal_turns": 2,
    "train.layers": 1,
    "train.embed": 16,
    "train.length": 16,
    "train.batch": 2,
    "train.steps": 4,
    "speed.tokens": 256,
    "speed.hidden": 256,
    "speed.lengths": (128, 256),
    "speed.turns": 2,
}
FULL = {
    "expected": "about 15 minutes and 12 GB of memory on two CPU cores (an estimate)",
    "exact.lengths": (128, 509, 1024, 2039),
    "memory.lengths": (512, 1024, 2048, 4096, 8192),
    "time.lengths": (512, 1024, 2048, 4096, 8192),
    "train.steps": 600,
}
PAPER = {
    "expected": "minutes on one GPU or TPU (an estimate)",
    "memory.lengths": (512, 1024, 2048, 4096, 8192, 16384),
    "time.lengths": (512, 1024, 2048, 4096),
    "speed.lengths": (512, 1024, 2048, 4096, 8192, 16384),
}
PRESETS = {"smoke": SMOKE, "default": {}, "full": FULL, "paper": PAPER}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset."""
    return apply_preset(BASE, PRESETS, preset)
