"""Federated rounds as one compiled call: an algorithm is what clients do, a mean, and the server.

>>> import jax.numpy as jnp, numpy as np, optax
>>> from rlib import data, federated
>>> x, y = data.images("digits")
>>> parts = data.partition_dirichlet(y, 20, 0.5, size=64)
>>> held = federated.client_data({"x": x, "y": y}, parts)
>>> held.rows.shape
(20, 64)
"""

from rlib.federated.averaging import fedavg, fedexp, sam_gradient
from rlib.federated.clients import Batches, ClientData, LocalWork, client_data, local_steps
from rlib.federated.engine import (
    Algorithm,
    Cohort,
    FederatedState,
    Rounds,
    Simulation,
    make_rounds,
    make_train_step,
    simulate,
)
from rlib.federated.fedhyper import fedhyper
from rlib.federated.fedspeed import fedspeed
from rlib.federated.momentum_fl import fedavg_m, scaffold, scaffold_m
from rlib.federated.problems import (
    Classification,
    classification,
    image_classification,
    rounds_to,
)

__all__ = [
    "Algorithm",
    "Batches",
    "Classification",
    "ClientData",
    "Cohort",
    "FederatedState",
    "LocalWork",
    "Rounds",
    "Simulation",
    "classification",
    "client_data",
    "fedavg",
    "fedavg_m",
    "fedexp",
    "fedhyper",
    "fedspeed",
    "image_classification",
    "local_steps",
    "make_rounds",
    "make_train_step",
    "rounds_to",
    "sam_gradient",
    "scaffold",
    "scaffold_m",
    "simulate",
]
