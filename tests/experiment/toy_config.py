"""The toy's configuration."""

from rlib.experiment import apply_preset

BASE = {
    "expected": "a second",
    "seeds": 2,
    "steps": 8,
    "mesh": {"data": -1},
    "optimizer": {"rate": 0.1, "name": "adam"},
    "widths": (3, 4),
    "edges": ((0.0, 0.5), (0.5, 1.0)),
}
PRESETS = {"default": {}, "smoke": {"steps": 4}}


def get_config(preset="default"):
    return apply_preset(BASE, PRESETS, preset)
