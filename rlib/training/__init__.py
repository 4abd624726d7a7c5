"""Training loops: pure, without files or flags."""

from rlib.training.fit import History, Phase, fit, whole_batch

__all__ = ["History", "Phase", "fit", "whole_batch"]
