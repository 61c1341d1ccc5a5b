"""Devices that are not there: topologies of accelerators, as their compilers know them."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies

from mllm_jax.config import ConfigError

TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}  # dimensions of their torus
GPUS = {  # name and bytes of memory, bytes per second of it
    "h100": ("NVIDIA H100 80GB HBM3", 84929347584, 3352320000000),
    "h200": ("NVIDIA H200", 150754820096, 4916060000000),
}
GPUS_PER_HOST = 8
KNOWN = (
    "TPUs are v4, v5e, v5p, v6e and tpu7x with the chips along each axis, as in v5p:4x8x8 or v6e:16x16 "
    "(v6e:16x16*2 is two slices); GPUs h100 and h200 with their number, as in h200:64; cpu:8 is eight virtual devices"
)
TARGET = """
gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: %d
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: %d shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 }
device_description_str: "%s"
"""  # a GpuTargetConfigProto of XLA, in text
CUDNN = 91200  # as in TARGET
LOWERED = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}  # platforms, as jax's lowering names them


class Topology(NamedTuple):
    """
    name: as in "v5p:4x8x8".
    platform: "tpu", "gpu" or "cpu", as `jax.default_backend()` would answer there.
    devices: to make a mesh of; those of TPUs and GPUs can be compiled for, but hold nothing.
    """

    name: str
    platform: str
    devices: tuple[Any, ...]
    slices: int = 1

    @property
    def device_kind(self) -> str:
        return self.devices[0].device_kind


def get_topology(name: str, slices: int = 1) -> Topology:
    """The devices of a TPU slice ("v5p:4x8x8"), of hosts of GPUs ("h200:64") or of this machine's CPU ("cpu:8").

    No accelerator is needed: TPUs need libtpu, GPUs jax's CUDA plugin. jax is told to use the CPU for everything else.

    Args:
      slices: number of TPU slices, which a network of the data centre joins; "v6e:16x16*2" says the same.
    Raises:
      ConfigError: no such topology, or what it needs is not installed.
    """
    kind, _, size = name.partition(":")
    size, _, written = size.partition("*")
    if written and not (written.isdigit() and int(written)):
        raise ConfigError(f"topology {name!r}: {written!r} is no number of slices. {KNOWN}")
    slices = int(written or slices)
    if kind not in (*TPUS, *GPUS, "cpu") or not size or (kind not in TPUS and not size.isdigit()):
        raise ConfigError(f"there is no topology {name!r}. {KNOWN}")
    if kind in TPUS and size.count("x") + 1 != TPUS[kind]:
        raise ConfigError(f"topology {name!r}: the chips of {kind} lie in {TPUS[kind]} dimensions. {KNOWN}")
    if kind not in TPUS and slices > 1:
        raise ConfigError(f"topology {name!r}: only TPUs have slices; write the number of all devices, as in h200:64")
    with contextlib.suppress(RuntimeError):  # too late where jax has begun already, which is well
        jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        return Topology(name, "cpu", _cpus(int(size)))
    if kind in GPUS:
        return Topology(name, "gpu", _gpus(kind, int(size)))
    return Topology(name, "tpu", _tpus(f"{kind}:{size}", slices), slices)


def _cpus(count: int) -> tuple:
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"cpu:{count} needs {count} devices, jax has begun with {len(devices)}; "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return tuple(devices[:count])


def _tpus(name: str, slices: int) -> tuple:
    if not _installed("libtpu"):
        raise ConfigError(f"{name} needs the TPU compiler: pip install mllm_jax[plan]")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask for its metadata
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")  # nor one that a second process could disturb
    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"there is no topology {name!r} ({str(error).splitlines()[0].removeprefix('INVALID_ARGUMENT: ')}). {KNOWN}"
        ) from error


def _gpus(kind: str, count: int) -> tuple:
    if not any(map(_installed, ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"))):
        raise ConfigError(f"{kind} needs jax's CUDA plugin: pip install mllm_jax[cuda]")
    hosts, rest = divmod(count, GPUS_PER_HOST)
    if count < 1 or (hosts and rest):
        raise ConfigError(f"{kind}:{count}: hosts have {GPUS_PER_HOST} GPUs; take fewer or a multiple of them")
    description, memory, bandwidth = GPUS[kind]
    shape = f"1x{hosts}x{GPUS_PER_HOST}" if hosts else f"1x1x{count}"
    target = TARGET % (bandwidth, memory, description)
    with _cuda_by_name():
        return tuple(topologies.get_topology_desc("", platform="cuda", target_config=target, topology=shape).devices)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is absent too
        return False


@contextlib.contextmanager
def _cuda_by_name() -> Iterator[None]:
    """Without a GPU jax has the plugin, but refuses its name (jax issue 23971)."""
    from jax._src import xla_bridge

    known = xla_bridge.canonicalize_platform
    name = lambda platform: "cuda" if platform in ("gpu", "cuda") else known(platform)
    with mock.patch.object(xla_bridge, "canonicalize_platform", name):
        yield


@contextlib.contextmanager
def targeting(topology: Topology) -> Iterator[None]:
    """Inside, code that asks jax for its platform to choose a kernel is told that of the topology."""
    with contextlib.ExitStack() as stack:
        patch = lambda owner, name, value: stack.enter_context(mock.patch.object(owner, name, value))
        patch(jax, "default_backend", lambda: topology.platform)
        if topology.platform == "gpu":
            from jax._src.cudnn import fused_attention_stablehlo as cudnn

            stack.enter_context(_cuda_by_name())
            patch(cudnn, "check_cudnn_version", lambda: CUDNN)
            patch(cudnn, "check_compute_capability", lambda least: float(least) <= 9.0)
            patch(cudnn, "is_cuda_compute_capability_equal", lambda wanted: float(wanted) == 9.0)
        yield
