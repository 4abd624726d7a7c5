"""Cooldown: what the experiment computes.

smoke    seconds; for tests, its numbers mean nothing
default  minutes on two CPU cores: five languages whose texts differ by a factor of 60; extra `text`
full     twelve languages, a Transformer of two layers, four times the steps

There is no preset of the published setting: it needs mT5's tokenizer, and does not tell the model's
size.
"""

from ml_collections import ConfigDict

from rlib.experiment import apply_preset

BASE = {
    "expected": "about 8 minutes and 1 GB of memory on two CPU cores",
    "seeds": 5,
    "mesh": {"data": -1},
    # From the largest to the smallest: English, Russian, Turkish, Swahili, Igbo.
    "domains": ("python_docs", "messages/ru", "messages/tr", "messages/sw", "messages/ig"),
    "length": 48,  # bytes a sequence
    "batch": 16,  # sequences
    "steps": 2000,
    "switch": 1000,  # half of the steps, as published
    "hi": 5.0,
    "lo": 1.0,
    "epochs": 8.0,  # of the smallest sets, at most, under UniMax
    "layers": 1,
    "embed": 64,
    "heads": 4,
    "learning_rate": 5e-3,  # of Adam, at the end of the warm-up
    "sgd_learning_rate": 0.5,
    "warmup": 150,  # steps
    "b2": 0.98,
    "chunk": 200,  # steps after which held-out text is read
    "noise": (20, 375),  # steps over which the gradient's norm varies, as in the specification
    "moments": 64,  # sequences a domain for E|g|^2
    "rows": 64,  # held-out sequences a domain, at most
    "margin": 0.03,  # nats that count as equal, set before any run
    "methods": (
        "tau=1",
        "tau=5",
        "tau=100",
        "unimax",
        "scalarised",
        "cooldown",
        "gradual",
        "increasing",
        "tau=5-sgd",
        "scalarised-sgd",
    ),
}
SMOKE = {
    "expected": "about 20 seconds",
    "seeds": 1,
    "domains": ("python_docs", "messages/ig"),
    "length": 16,
    "batch": 8,
    "steps": 8,
    "switch": 4,
    "warmup": 2,
    "embed": 16,
    "heads": 2,
    "chunk": 4,
    "noise": (0, 8),
    "moments": 4,
    "rows": 4,
}
FULL = {
    "expected": "about two hours and 2 GB of memory on two CPU cores (an estimate)",
    "domains": (
        "python_docs",
        *(f"messages/{code}" for code in ("ru", "ar", "fr", "ja", "de", "tr", "fi", "vi")),
        *(f"messages/{code}" for code in ("sw", "ta", "ig")),
    ),
    "layers": 2,
    "length": 64,
    "steps": 8000,
    "switch": 4000,
    "warmup": 600,
}
PRESETS = {"smoke": SMOKE, "default": {}, "full": FULL}


def get_config(preset: str = "default") -> ConfigDict:
    """The configuration of a preset."""
    return apply_preset(BASE, PRESETS, preset)
