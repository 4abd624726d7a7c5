"""1-bit Adam: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  minutes on two CPU cores: digits and a byte-level Transformer, eight workers
full     a larger Transformer, three times the steps
slow_network   two processes over real TCP, on links of 50 to 1000 Mbit/s made on one machine from
         network namespaces; needs root and Linux
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

BASE = {
    "expected": "about 5 minutes and 2 GB of memory on two CPU cores",
    "seeds": 5,
    "workers": 8,
    "mesh": {"data": 8},  # the workers; a CPU starts that many virtual devices
    "digits": {
        "hidden": (64,),
        "batch": 16,  # examples a worker and step
        "steps": 400,
        "warmup": 80,
        "learning_rate": 3e-3,
        "b2": 0.999,
        "eps": 1e-8,
        "v_floor": 1e-10,
        "window": 50,  # steps over which the stability of v is measured
        "stable": 0.85,  # or its inverse; the paper's 0.96 is for v without corrected bias
        "margin": 0.02,  # nats of final training loss that count as equal, set before any run
        "chunk": 20,
        "smooth": 10,
        "cost": 1.0,
        "methods": (
            "adam",
            "onebit",
            "onebit-auto",
            "no-mask",
            "no-feedback",
            "compressed-gradients",
        ),
    },
    "text": {
        "layers": 2,
        "embed": 64,
        "heads": 4,
        "length": 128,  # bytes a sequence
        "batch": 2,  # sequences a worker and step
        "steps": 300,
        "warmup": 60,
        "learning_rate": 2e-3,
        "b2": 0.99,
        "eps": 1e-8,
        "v_floor": 1e-12,
        "window": 20,
        "stable": 0.85,
        "margin": 0.1,  # nats of test loss that count as equal, set before any run
        "chunk": 10,
        "smooth": 20,
        "test_rows": 256,
        "cost": 15.0,
        "methods": ("adam", "onebit", "onebit-auto", "no-feedback"),
    },
    # One worker's step, timed `steps` times for each repeat; no repeat leaves the part out.
    "speed": {"tensors": 30, "size": 330_000, "steps": 20, "repeats": 0},
    "network": {
        "megabits": (),  # a second, of each host's link; empty leaves the part out
        "hosts": 2,
        "layers": 4,
        "embed": 448,
        "heads": 7,  # 9.9 million parameters
        "length": 64,
        "batch": 1,  # sequences a host and step
        "learning_rate": 5e-4,
        "b2": 0.99,
        "v_floor": 1e-14,
        "steps": 20,
        "repeats": 3,
        "warmup": 0.15,  # share of the steps in bfloat16
        "timeout": 2400,  # seconds
    },
}
SMOKE = {
    "expected": "about 30 seconds",
    "seeds": 2,
    "digits.steps": 12,
    "digits.warmup": 6,
    "digits.window": 2,
    "digits.stable": 0.5,
    "digits.chunk": 4,
    "digits.smooth": 2,
    "text.layers": 1,
    "text.embed": 16,
    "text.heads": 2,
    "text.length": 16,
    "text.batch": 1,
    "text.steps": 6,
    "text.warmup": 3,
    "text.window": 2,
    "text.chunk": 3,
    "text.smooth": 2,
    "text.test_rows": 8,
    "text.methods": ("adam", "onebit"),
    "speed.tensors": 2,
    "speed.size": 2000,
    "speed.steps": 2,
    "speed.repeats": 2,
}
FULL = {
    "expected": "about an hour and 4 GB of memory on two CPU cores (an estimate)",
    "text.layers": 4,
    "text.embed": 128,
    "text.steps": 1000,
    "text.warmup": 150,
    "text.methods": BASE["digits"]["methods"],
}
SLOW_NETWORK = {
    "expected": "about 20 minutes and 4 GB of memory on two cores, as root on Linux",
    "digits.methods": (),
    "text.methods": (),
    "network.megabits": (50.0, 200.0, 1000.0),
}
ONE_WORKER = {
    "expected": "about 15 seconds on two CPU cores; time it on an idle machine",
    "workers": 1,
    "digits.methods": (),
    "text.methods": (),
    "speed.repeats": 10,
}
PRESETS = {
    "smoke": SMOKE,
    "default": {},
    "full": FULL,
    "slow_network": SLOW_NETWORK,
    "one_worker": ONE_WORKER,
}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset; its mesh has one device a worker."""
    config = apply_preset(BASE, PRESETS, preset)
    config.mesh.data = config.get_ref("workers")
    return config
