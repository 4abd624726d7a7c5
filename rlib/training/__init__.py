"""Training loops: pure, without files or flags."""

from rlib.training.fit import History, Phase, fit, join_histories

__all__ = ["History", "Phase", "fit", "join_histories"]
