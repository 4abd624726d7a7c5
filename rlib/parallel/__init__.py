"""Meshes, sharding rules, the step builder, and compiling for machines one does not own."""

from rlib.parallel.mesh import make_mesh, mesh_shape
from rlib.parallel.sharding import (
    LOGICAL_AXIS_RULES,
    batch_spec,
    data_axis_size,
    map_over_mesh,
    named,
    parameter_specs,
    place,
    shard_batch,
    state_specs,
)
from rlib.parallel.step import TrainState, TrainStep, make_train_step
from rlib.parallel.topology import h100_mesh, tpu_mesh
from rlib.parallel.wire import WireReport, WireRow, wire_bytes, wire_bytes_of_text
from rlib.parallel.workers import (
    PerWorker,
    is_per_worker,
    local_value_and_grad,
    on_one_device,
    resize_workers,
)

__all__ = [
    "LOGICAL_AXIS_RULES",
    "PerWorker",
    "TrainState",
    "TrainStep",
    "WireReport",
    "WireRow",
    "batch_spec",
    "data_axis_size",
    "h100_mesh",
    "is_per_worker",
    "local_value_and_grad",
    "make_mesh",
    "make_train_step",
    "map_over_mesh",
    "mesh_shape",
    "named",
    "on_one_device",
    "parameter_specs",
    "place",
    "resize_workers",
    "shard_batch",
    "state_specs",
    "tpu_mesh",
    "wire_bytes",
    "wire_bytes_of_text",
]
