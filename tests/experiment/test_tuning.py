import numpy as np
import pytest

from rlib.experiment import choose


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ([3, 1, 2], "b"),
        ([1, 1, 1], "a"),
        ([np.nan, 2, 1], "c"),
        ([-np.inf, 2, np.inf], "b"),
        ([np.nan, np.inf, np.nan], "a"),
        (np.float32([5, 4, np.nan]), "b"),
    ],
)
def test_the_least_finite_loss_wins(losses, chosen):
    assert choose("abc", losses) == chosen


@pytest.mark.parametrize(("settings", "losses"), [([], []), ([1, 2], [0.5]), ([1], [[0.5]])])
def test_every_setting_has_one_loss(settings, losses):
    with pytest.raises(ValueError, match="settings and losses"):
        choose(settings, losses)
