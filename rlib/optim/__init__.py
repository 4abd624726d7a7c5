"""Optax gradient transformations."""

from rlib.optim.error_feedback import (
    ErrorFeedbackState,
    econtrol,
    scale_by_econtrol,
    scale_by_ef21,
    scale_by_error_compensation,
)
from rlib.optim.fedhyper import Bounds as FedHyperBounds
from rlib.optim.fedhyper import (
    FedHyperClientState,
    FedHyperState,
    fedhyper_g,
    fedhyper_sl,
    scale_by_fedhyper_cl,
    scale_by_fedhyper_g,
)
from rlib.optim.guards import SkipNonfiniteState, clip_by_global_norm, skip_nonfinite
from rlib.optim.momentum_fl import scale_by_global_momentum
from rlib.optim.onebit_adam import (
    OnebitAdamState,
    check_second_moment,
    onebit_adam,
    scale_by_onebit_adam,
    second_moment_stability,
)
from rlib.optim.swag import (
    SwagState,
    record_swag,
    swag_log_density,
    swag_restrict,
    swag_sample,
)

__all__ = [
    "ErrorFeedbackState",
    "FedHyperBounds",
    "FedHyperClientState",
    "FedHyperState",
    "OnebitAdamState",
    "SkipNonfiniteState",
    "SwagState",
    "check_second_moment",
    "clip_by_global_norm",
    "econtrol",
    "fedhyper_g",
    "fedhyper_sl",
    "onebit_adam",
    "record_swag",
    "scale_by_econtrol",
    "scale_by_ef21",
    "scale_by_error_compensation",
    "scale_by_fedhyper_cl",
    "scale_by_fedhyper_g",
    "scale_by_global_momentum",
    "scale_by_onebit_adam",
    "second_moment_stability",
    "skip_nonfinite",
    "swag_log_density",
    "swag_restrict",
    "swag_sample",
]
