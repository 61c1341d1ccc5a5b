"""Memory that a run needs for certain: weights, gradients and the optimizer's state, before anything is allocated."""

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
        """Bytes that stay allocated throughout the run."""
        return self.weights + self.optimizer


def memory_of(run: Run, state: TrainState, layout: TrainState) -> Memory:
    """Returns what a device holds of a state (shapes and shardings); gradients are those of what is trained."""
    trained, layouts = split(state.params, run.optim.freeze)[0], split(layout.params, run.optim.freeze)[0]
    pairs = ((state.params, layout.params), (trained, layouts), (state.opt_state, layout.opt_state))
    return Memory(*(sum(jax.tree.leaves(jax.tree.map(_on_a_device, *pair))) for pair in pairs))


def describe(memory: Memory) -> str:
    """One line for people."""
    parts = ", ".join(f"{name} {with_prefix(size)}B" for name, size in memory._asdict().items())
    return f"a device needs {parts}; activations come on top, see python -m mllm_jax.plan"


def check_memory(memory: Memory, mesh: Mesh) -> None:
    """Raises ConfigError where weights and optimizer alone are more than a device, or this host, has left.

    Gradients and activations are not counted: what is refused cannot run.
    """
    own = mesh.local_devices
    limit, where, count = device_limit(own[0]), f"a {own[0].device_kind}", 1
    if own[0].platform == "cpu":  # whose devices share the memory of the host
        limit, where, count = host_limit(), "this host", len(own)
    if limit is None or count * memory.kept <= limit:
        return
    raise ConfigError(
        f"config.model: {describe(memory)}. Weights and optimizer are {with_prefix(count * memory.kept)}B, and {where} "
        f"has {with_prefix(limit)}B left. Train adapters (--config.lora.rank=16 --config.lora.base_dtype=nf4), freeze "
        "parts "
        "(--config.optim.freeze), or spread the run over more devices (--config.mesh.fsdp=-1)"
    )


def trained_share(run: Run) -> str:
    """Returns how many parameters are trained, for people; "" where all are."""
    parts = split(abstract_params(in_full(run.model)), run.optim.freeze)
    trained, frozen = (sum(x.size for x in jax.tree.leaves(part)) for part in parts)
    return f"{with_prefix(trained)} parameters are trained ({trained / (trained + frozen):.2%})" if frozen else ""


def device_limit(device: jax.Device) -> int | None:
    """Bytes that may still be allocated on a device; None where it does not tell."""
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if stats.get("bytes_limit") else None


def host_limit() -> int | None:
    """Bytes that processes of this host may still allocate, swap included; None where the system does not tell."""
    limits = [_container_limit()]
    if MEMINFO.is_file():
        found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE))
        if "MemAvailable" in found:
            limits.append(1024 * (int(found["MemAvailable"]) + int(found.get("SwapFree", 0))))
    return min((limit for limit in limits if limit is not None), default=None)


def _container_limit() -> int | None:
    """Bytes left to the container that this process is in, of cgroups v2, caches counted as free."""
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
