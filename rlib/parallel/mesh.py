"""Meshes: named axes over the devices of all processes."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh


def mesh_shape(sizes: Mapping[str, int], n_devices: int) -> tuple[int, ...]:
    """Sizes of the axes, with one -1 replaced by the devices that remain.

    Raises ValueError, with the sizes and the number of devices, if they do not fit.

    >>> mesh_shape({"data": -1, "model": 2}, 8)
    (4, 2)
    """
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    shape = list(sizes.values())
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise ValueError(f"mesh {given}: sizes are at least 1, or -1 for one axis (the rest)")
    fixed = math.prod(size for size in shape if size != -1)
    if -1 in shape and n_devices % fixed == 0:
        shape[shape.index(-1)] = n_devices // fixed
    if math.prod(shape) != n_devices:
        raise ValueError(
            f"mesh {given} does not divide the devices: this run has {n_devices}; "
            "the sizes must multiply to that number (-1 stands for the rest)"
        )
    return tuple(shape)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with automatic axes, by default over all devices of all processes.

    >>> make_mesh({"data": -1}).axis_names
    ('data',)
    """
    chosen = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(chosen))
    slices = len({getattr(device, "slice_index", 0) for device in chosen})
    if chosen[0].platform == "tpu" and slices > 1 and shape[0] % slices == 0:
        # The first axis crosses the slow network between slices, the others stay inside one.
        within = (shape[0] // slices, *shape[1:])
        across = (slices, *[1] * (len(shape) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(
            within, across, chosen, allow_split_physical_axes=True
        )
    elif chosen[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, chosen, allow_split_physical_axes=True)
    else:
        grid = np.asarray(chosen).reshape(shape)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
