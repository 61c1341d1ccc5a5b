"""Computes the memory that a run needs at least (weights, gradients, optimizer state) before anything is allocated."""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_jax.common.config import ConfigError
from mllm_jax.common.format import with_prefix
from mllm_jax.model.vlm import abstract_params, in_full
from mllm_jax.train.runs.config import Run
from mllm_jax.train.step.optimizer import split
from mllm_jax.train.step.state import TrainState

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class Memory(NamedTuple):
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def kept(self) -> int:
        """Bytes that stay allocated during the run: weights and optimizer state."""
        return self.weights + self.optimizer


def memory_of(run: Run, state: TrainState, layout: TrainState) -> Memory:
    """Returns the bytes of a state (shapes and shardings) on one device. Only trained weights have gradients."""
    trained, layouts = split(state.params, run.optim.freeze)[0], split(layout.params, run.optim.freeze)[0]
    pairs = ((state.params, layout.params), (trained, layouts), (state.opt_state, layout.opt_state))
    return Memory(*(sum(jax.tree.leaves(jax.tree.map(_on_a_device, *pair))) for pair in pairs))


def describe(memory: Memory) -> str:
    """Returns one line of text about the memory of a device."""
    parts = ", ".join(f"{name} {with_prefix(size)}B" for name, size in memory._asdict().items())
    return f"a device needs {parts}, plus activations (see python -m mllm_jax.plan)"


def check_memory(memory: Memory, mesh: Mesh) -> None:
    """Raises ConfigError if weights and optimizer state exceed the free memory of a device, or of this host for CPUs.

    Gradients and activations are not counted, so a refused run cannot fit.
    """
    devices = mesh.local_devices
    limit, where, count = device_limit(devices[0]), f"a {devices[0].device_kind}", 1
    if devices[0].platform == "cpu":  # CPU devices share the memory of the host
        limit, where, count = host_limit(), "this host", len(devices)
    if limit is None or count * memory.kept <= limit:
        return
    raise ConfigError(
        f"config.model: {describe(memory)}. Weights and optimizer are {with_prefix(count * memory.kept)}B, and {where} "
        f"has {with_prefix(limit)}B left. Train adapters (--config.lora.rank=16 --config.lora.base_dtype=nf4), freeze "
        "parts (--config.optim.freeze), or shard over more devices (--config.mesh.fsdp=-1)."
    )


def trained_share(run: Run) -> str:
    """Returns a text with the number and share of trained parameters, or "" if all are trained."""
    parts = split(abstract_params(in_full(run.model)), run.optim.freeze)
    trained, frozen = (sum(x.size for x in jax.tree.leaves(part)) for part in parts)
    return f"{with_prefix(trained)} parameters are trained ({trained / (trained + frozen):.2%})" if frozen else ""


def device_limit(device: jax.Device) -> int | None:
    """Returns the bytes that may still be allocated on a device. None if the device does not report them."""
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if stats.get("bytes_limit") else None


def host_limit() -> int | None:
    """Returns the bytes, including swap, that this host's processes may still allocate. None if unknown."""
    limits = [_container_limit()]
    if MEMINFO.is_file():
        kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE))
        if "MemAvailable" in kilobytes:
            limits.append(1024 * (int(kilobytes["MemAvailable"]) + int(kilobytes.get("SwapFree", 0))))
    return min((limit for limit in limits if limit is not None), default=None)


def _container_limit() -> int | None:
    """Returns the bytes left in this process's container (cgroups v2); caches count as free. None: no known limit."""
    try:
        most = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        cached = re.search(r"^file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        swap = (CGROUP / "memory.swap.max").read_text().strip()
    except (OSError, ValueError):
        return None
    if "max" in (most, swap):
        return None
    return int(most) - used + int(cached[1] if cached else 0) + int(swap)


def _on_a_device(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> int:
    return int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
