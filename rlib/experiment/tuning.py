"""How a method's settings are chosen, apart from what a report measures."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

Setting = TypeVar("Setting")
#: The first seed for choosing settings; no report uses it or those after it.
TUNING_SEED = 1_000_000


def choose(settings: Sequence[Setting], losses: ArrayLike) -> Setting:
    """The setting of the least loss, on draws from `TUNING_SEED` on.

    Args:
        settings: what was tried.
        losses: one a setting; one that is not finite never wins.

    Returns:
        Of equal losses the first; the first setting if no loss is finite.

    Raises:
        ValueError: no settings, or not one loss a setting.

    >>> choose([0.1, 0.3, 1.0], [2.0, 1.0, float("nan")])
    0.3
    """
    values = np.asarray(losses, float)
    if not len(settings) or values.shape != (len(settings),):
        raise ValueError(f"{len(settings)} settings and losses of shape {values.shape}")
    return settings[int(np.argmin(np.where(np.isfinite(values), values, np.inf)))]
