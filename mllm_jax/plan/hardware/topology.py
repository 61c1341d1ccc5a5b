"""Creates the devices of accelerator topologies that this machine does not have, for compilation ahead of time."""

import contextlib
import importlib.util
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies

from mllm_jax.common.config import ConfigError
from mllm_jax.nn.attention import kernels
from mllm_jax.plan.hardware.chips import CHIPS

TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}  # number of torus dimensions
CORES = {"tpu7x": 2}  # devices per chip; the two cores of a v4 or v5p chip are one device
SINGLE = ("v5e:1x1", "v6e:1x1")  # slices of one chip on a host with one chip
OPTIONS = {"v4": {"chip_config_name": "megacore"}}  # the compiler's default only for v5p


class Gpu(NamedTuple):
    """Properties of a GPU for XLA: memory, L2 and shared memory in bytes, memory bandwidth in bytes/s."""

    name: str
    capability: str
    memory: int
    bandwidth: int
    multiprocessors: int
    clock: float  # GHz
    l2: int
    shared: int = 233472  # per multiprocessor
    threads: int = 2048  # per multiprocessor
    units: int = 128  # fp32 units per multiprocessor

    @property
    def block(self) -> int:
        """Maximum shared memory of a block, in bytes."""
        return self.shared - (1024 if float(self.capability) >= 8 else 0)


# Values from XLA's specifications (xla/tools/hlo_opt/gpu_specs), except T4 and L4: from their data sheets and the table
# of compute capabilities in the CUDA programming guide.
GPUS = {
    "t4": Gpu("Tesla T4", "7.5", 15843721216, 320064000000, 40, 1.59, 4 << 20, 65536, 1024, 64),
    "l4": Gpu("NVIDIA L4", "8.9", 23787470848, 300096000000, 58, 2.04, 48 << 20, 102400, 1536),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", "8.0", 42331013120, 1555200000000, 108, 1.41, 40 << 20, 167936, units=64),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", "8.0", 85100068864, 2039040000000, 108, 1.41, 40 << 20, 167936, units=64),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", "9.0", 84942979072, 2039040000000, 114, 1.755, 50 << 20),
    "h100": Gpu("NVIDIA H100 80GB HBM3", "9.0", 84929347584, 3352320000000, 132, 1.98, 50 << 20),
    "h200": Gpu("NVIDIA H200", "9.0", 150754820096, 4916060000000, 132, 1.98, 50 << 20),
    "b200": Gpu("NVIDIA B200", "10.0", 191514673152, 7672320000000, 148, 1.965, 132644864),
}
GPUS_PER_HOST = 8
KNOWN = (
    f"TPUs are {', '.join(TPUS)} with the chips along each axis, as in v5p:4x8x8 or v6e:16x16 (v6e:16x16*2 is two "
    f"slices); GPUs are {', '.join(GPUS)} with their number, as in h200:64."
)
TARGET = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared} threads_per_core_limit: {gpu.threads} core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.units} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory} shared_memory_per_block_optin: {gpu.block} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability {{ major: {major} minor: {minor} }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
device_description_str: "{gpu.name}"
"""  # XLA's GpuTargetConfigProto in text format
CUDNN = 91200  # the cuDNN version in TARGET
LOWERED = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}  # platform -> its name in jax's lowering


@dataclass(frozen=True)
class Place:
    """Location of a device, for estimates without a compiler. The fields are those of jax's devices."""

    id: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0


class Topology(NamedTuple):
    """Accelerator devices for planning.

    name: name such as "v5p:4x8x8".
    platform: "tpu", "gpu" or "cpu", like `jax.default_backend()` on these devices.
    devices: devices for a mesh. Programs can be compiled for those of TPUs and GPUs, but not run.
    slices: number of TPU slices.
    """

    name: str
    platform: str
    devices: tuple[Any, ...]
    slices: int = 1

    @property
    def device_kind(self) -> str:
        return self.devices[0].device_kind


def get_topology(name: str, slices: int = 1, compiler: bool = True) -> Topology:
    """Returns the devices of a TPU slice ("v5p:4x8x8"), of GPU hosts ("h200:64") or of this machine's CPU ("cpu:8").

    No accelerator is needed: TPUs need libtpu, GPUs jax's CUDA plugin. Sets jax's platform to the CPU.

    Args:
      slices: number of TPU slices, connected by the data-center network. "v6e:16x16*2" in `name` overrides it.
      compiler: return devices for which programs can be compiled. False: only their locations, without these packages.
    Raises:
      ConfigError: the topology does not exist, or a package that it needs is not installed.
    """
    kind, _, size = name.partition(":")
    size, _, written = size.partition("*")
    if written and not (written.isdecimal() and int(written)):
        raise ConfigError(f"topology {name!r}: {written!r} is not a number of slices. {KNOWN}")
    slices = int(written or slices)
    if kind not in (*TPUS, *GPUS, "cpu") or not size or (kind not in TPUS and not size.isdecimal()):
        raise ConfigError(f"there is no topology {name!r}. {KNOWN}")
    if kind not in TPUS and slices > 1:
        raise ConfigError(f"topology {name!r}: only TPUs have slices. Write the number of all devices, as in h200:64.")
    with contextlib.suppress(RuntimeError):  # jax is already initialized, and keeps its platform
        jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        return Topology(name, "cpu", _cpus(int(size)))
    if kind in GPUS:
        return Topology(name, "gpu", _gpus(kind, int(size), compiler))
    return Topology(name, "tpu", _tpus(kind, _chips(name, kind, size), slices, compiler), slices)


def _chips(name: str, kind: str, size: str) -> tuple[int, ...]:
    """Returns the number of chips along each axis of a slice. Raises ConfigError if no slice has this shape."""
    sizes = tuple(int(part) if part.isdecimal() else 0 for part in size.split("x"))
    if len(sizes) != TPUS[kind]:
        raise ConfigError(f"topology {name!r}: the torus of {kind} has {TPUS[kind]} dimensions. {KNOWN}")
    if 0 in sizes:
        raise ConfigError(f"topology {name!r}: {size!r} does not contain numbers of chips. {KNOWN}")
    if f"{kind}:{size}" not in SINGLE and (sizes[0] % 2 or sizes[1] % 2):
        single = f", or one chip, {kind}:1x1" if f"{kind}:1x1" in SINGLE else ""
        raise ConfigError(f"topology {name!r}: a host has 2 x 2 chips. Use even numbers on the first two axes{single}.")
    return sizes


def _cpus(count: int) -> tuple:
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"cpu:{count} needs {count} devices, but jax was initialized with {len(devices)}. "
            f"Set XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return tuple(devices[:count])


def _tpus(kind: str, sizes: tuple[int, ...], slices: int, compiler: bool) -> tuple:
    name = f"{kind}:{'x'.join(map(str, sizes))}"
    if not compiler:
        every = itertools.product(range(slices), *(range(size) for size in reversed(sizes)), range(CORES.get(kind, 1)))
        places = [((*reversed(place), 0, 0)[:3], core, slice_) for slice_, *place, core in every]
        return tuple(Place(number, "tpu", CHIPS[kind].kind, *place) for number, place in enumerate(places))
    if not _installed("libtpu"):
        raise ConfigError(f"{name} needs the TPU compiler. Run pip install -e '.[plan]', or estimate with --compile=0.")
    # There is no TPU whose metadata libtpu could query, and none that a second process could disturb. Without an
    # accelerator type and a host name libtpu complains, although it does not use them here.
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_ACCELERATOR_TYPE": "v6e-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
    options = OPTIONS.get(kind, {}) | ({"num_slices": slices} if slices > 1 else {})
    if name in SINGLE:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"there is no topology {name!r} ({str(error).splitlines()[0].removeprefix('INVALID_ARGUMENT: ')}). {KNOWN}"
        ) from error


def _gpus(kind: str, count: int, compiler: bool) -> tuple:
    gpu = GPUS[kind]
    hosts, rest = divmod(count, GPUS_PER_HOST)
    if count < 1 or (hosts and rest):
        raise ConfigError(f"{kind}:{count}: a host has {GPUS_PER_HOST} GPUs. Use fewer, or a multiple of them.")
    if not compiler:
        return tuple(Place(n, "gpu", gpu.name, process_index=n // GPUS_PER_HOST) for n in range(count))
    if not any(map(_installed, ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"))):
        raise ConfigError(
            f"{kind} needs jax's CUDA plugin. Run pip install -e '.[cuda]', or estimate with --compile=0."
        )
    shape = f"1x{hosts}x{GPUS_PER_HOST}" if hosts else f"1x1x{count}"
    major, minor = gpu.capability.split(".")
    target = TARGET.format(gpu=gpu, major=major, minor=minor)
    with _cuda_by_name():
        return tuple(topologies.get_topology_desc("", platform="cuda", target_config=target, topology=shape).devices)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


@contextlib.contextmanager
def _cuda_by_name() -> Iterator[None]:
    """Lets jax accept the platform name "cuda" on machines without a GPU, where it refuses it (jax issue 23971)."""
    from jax._src import xla_bridge

    canonicalize = xla_bridge.canonicalize_platform
    name = lambda platform: "cuda" if platform in ("gpu", "cuda") else canonicalize(platform)
    with mock.patch.object(xla_bridge, "canonicalize_platform", name):
        yield


@contextlib.contextmanager
def targeting(topology: Topology) -> Iterator[None]:
    """Makes jax report the topology's platform inside the block, so that code chooses the kernels of that platform."""
    with contextlib.ExitStack() as stack:
        patch = lambda owner, name, value: stack.enter_context(mock.patch.object(owner, name, value))
        patch(jax, "default_backend", lambda: topology.platform)
        if topology.platform == "gpu":
            from jax._src.cudnn import fused_attention_stablehlo as cudnn

            capability = float(getattr(topology.devices[0], "compute_capability", kernels.PLANNED))
            patch(kernels, "PLANNED", capability)
            stack.enter_context(_cuda_by_name())
            patch(cudnn, "check_cudnn_version", lambda: CUDNN)
            patch(cudnn, "check_compute_capability", lambda least: float(least) <= capability)
            patch(cudnn, "is_cuda_compute_capability_equal", lambda wanted: float(wanted) == capability)
        yield
