"""Training loops: pure, without files or flags."""

from rlib.training.descend import Descent, descend
from rlib.training.fit import History, Phase, fit, join_histories

__all__ = ["Descent", "History", "Phase", "descend", "fit", "join_histories"]
