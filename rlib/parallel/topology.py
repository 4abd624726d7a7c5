"""Meshes of machines that one does not own, for compiling ahead of time.

Needs the extra `aot`, and `JAX_PLATFORMS=cpu` before jax starts. A step built on such a mesh is
lowered with `jax.ShapeDtypeStruct`s and compiled by the machine's real compiler; it cannot run.
"""

import os
from collections.abc import Mapping

from jax.experimental import topologies
from jax.sharding import Mesh

from rlib.parallel.mesh import make_mesh

# GpuTargetConfigProto of an H100 SXM 80 GB.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def tpu_mesh(topology: str, sizes: Mapping[str, int], num_slices: int = 1) -> Mesh:
    """A mesh over a TPU system such as "v5e:16x16", "v5p:4x4x4" or "v6e:4x4".

    `tpu_mesh("v5e:4x4", {"data": -1, "model": 2})` has the shape (8, 2).

    Raises:
        ValueError: the sizes do not multiply to the number of chips.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    more = {"num_slices": num_slices} if num_slices > 1 else {}
    system = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
    return make_mesh(sizes, system.devices)


def h100_mesh(sizes: Mapping[str, int], hosts: int = 1, gpus_per_host: int = 8) -> Mesh:
    """A mesh over hosts of H100 GPUs.

    `h100_mesh({"data": -1, "model": 8}, hosts=2)` has the shape (2, 8).

    Raises:
        ValueError: the sizes do not multiply to the number of GPUs.
    """
    system = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h100",
        target_config=_H100,
        topology=f"1x{hosts}x{gpus_per_host}",
    )
    return make_mesh(sizes, system.devices)
