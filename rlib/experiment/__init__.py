"""One run from the outside: flags, configuration, work directory, cache, logs, report, verdicts."""

from rlib.experiment import results, slow_network
from rlib.experiment.config import apply_preset
from rlib.experiment.errors import Stopped, UsageError, unknown
from rlib.experiment.figures import COLOURS, draw_split, legend, panels, picture, styled
from rlib.experiment.report import Claim, Claims, Report, Row, capped, judge
from rlib.experiment.run import Run, named_key
from rlib.experiment.start import start
from rlib.experiment.tuning import TUNING_SEED, choose

__all__ = [
    "COLOURS",
    "TUNING_SEED",
    "Claim",
    "Claims",
    "Report",
    "Row",
    "Run",
    "Stopped",
    "UsageError",
    "apply_preset",
    "capped",
    "choose",
    "draw_split",
    "judge",
    "legend",
    "named_key",
    "panels",
    "picture",
    "results",
    "slow_network",
    "start",
    "styled",
    "unknown",
]
