"""Accelerators that need not be there: their compilers run on any host, and tell what they make.

The package of the plug-in has to be installed, `dhp_jax[cuda]` or `dhp_jax[tpu]`; programs are
compiled and cannot be run. A process calls `prepare` before it computes anything.
"""

from collections.abc import Iterator, Sequence
import contextlib
from dataclasses import dataclass, field
import os
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies

from dhp_jax.backend.platform import compiler_options

# NVIDIA's data sheet and CUDA's programming guide (compute capability 9.0); clock: the highest.
H200 = """
gpu_device_info {
  name: "NVIDIA H200" cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  memory_bandwidth: 4800000000000 device_memory_size: 151397597184
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


@dataclass(frozen=True)
class Target:
    """A kind of accelerator.

    Attributes:
      label: for tables.
      platform: `jax.default_backend()` where there is one.
      plugin: platform, as its plug-in has it.
      shapes: how the devices of so many are connected, where that is not for all numbers alike.
      options: of the plug-in.
    """

    label: str
    platform: str
    plugin: str
    shapes: dict[int, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def devices(self, count: int) -> Sequence[jax.Device]:
        """So many of them, for which programs can be compiled.

        Raises:
          ValueError: there are no such slices, or the plug-in is not there.
        """
        if self.shapes and count > max(self.shapes):
            raise ValueError(f"expected at most {max(self.shapes)} of {self.label}, got {count}")
        size = min((n for n in self.shapes if n >= count), default=count)
        name = self.shapes.get(size, f"1x1x{size}")
        options = self.options | ({} if self.shapes else {"topology": name})
        try:
            topology = topologies.get_topology_desc(name, platform=self.plugin, **options)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"expected a target whose plug-in is installed, such as with `pip install -e "
                f"'.[{self.plugin}]'`, and used by no other process; got {self.label} ({error})"
            ) from error
        return topology.devices[:count]


TPU_SLICES = {4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4", 32: "v5e:4x8", 64: "v5e:8x8"}
TARGETS = {
    "h200": Target("H200", "gpu", "cuda", options={"target_config": H200}),
    "v5e": Target("TPU v5e", "tpu", "tpu", TPU_SLICES | {128: "v5e:8x16", 256: "v5e:16x16"}),
}


def prepare() -> None:
    """Keeps JAX to the host, so that no plug-in looks for its devices."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # of a driver
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # asks the network which TPU this host has
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Which of several algorithms is fastest is found out on the device.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """The library does as it would on the accelerator."""
    compiler_options.cache_clear()
    with mock.patch.object(jax, "default_backend", return_value=target.platform):
        yield
    compiler_options.cache_clear()
