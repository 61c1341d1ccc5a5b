"""Compiles the training step for devices that this machine need not have, and reads its memory, FLOPs and collectives.

Nothing is measured: all numbers come from the compiler, the traced program or the text of the compiled program. No
weight is allocated.
"""

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_jax.common.config import ConfigError
from mllm_jax.plan.hardware.topology import LOWERED, Topology, targeting
from mllm_jax.plan.hlo import hlo_text
from mllm_jax.plan.hlo.checks import warnings_of
from mllm_jax.plan.hlo.jaxpr import operations, place, products
from mllm_jax.plan.hlo.replica_groups import axes_of
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms import algorithm_of
from mllm_jax.train.monitor.flops import count_flops, padded
from mllm_jax.train.runs.config import Run, train_context
from mllm_jax.train.step.state import TrainState
from mllm_jax.types import Batch

LARGEST = 12  # number of arrays to list
# Compiler options for a quick plan: they skip most optimization of TPU code, which takes 80 % of the time. For
# Qwen3-VL-8B on 64 v6e the peak is 1 % off, and collectives move an eighth more bytes.
QUICK = {"tpu": {"exec_time_optimization_effort": -1.0}}
ABSENT = {"gpu": {"xla_gpu_autotune_level": "0"}}  # no autotuning, which needs a GPU


class Collective(NamedTuple):
    """Collectives of one kind over the same mesh axes, on one device in one step.

    kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all" or "collective-permute".
    axes: mesh axes over which the collective communicates.
    runs: number of executions.
    bytes: bytes of the results, summed over the runs.
    """

    kind: str
    axes: tuple[str, ...]
    runs: int
    bytes: float


class Planned(NamedTuple):
    """Planned resources of a training step on each device. Nothing is measured.

    mesh: size of every axis. devices: number of devices. device_kind: name of the device in jax.
    arguments: bytes of the state and of a batch.
    temporaries: bytes allocated in addition at the peak.
    peak: highest number of allocated bytes, which the compiler compares with the memory of a device.
    largest: (name, bytes) of the largest groups of arguments and arrays of the program, largest first.
    flops: FLOPs of all matrix products that run, by part: encoder, connector, decoder, experts, head, optimizer.
    useful: FLOPs that a step with a full batch needs, without recomputation.
    recomputed: FLOPs that repeat others to save memory.
    collectives: collectives by kind and axes.
    warnings: texts that begin with the name of their check (see `mllm_jax.plan.hlo.checks`).
    compile_seconds: seconds of tracing, lowering and compiling. host_bytes: peak memory of this process.
    """

    mesh: dict[str, int]
    devices: int
    device_kind: str
    arguments: int
    temporaries: int
    peak: int
    largest: tuple[tuple[str, int], ...]
    flops: dict[str, float]
    useful: float
    recomputed: float
    collectives: tuple[Collective, ...]
    warnings: tuple[str, ...]
    compile_seconds: float
    host_bytes: int


class TooLarge(ConfigError):
    """The step needs more memory than a device has, according to the compiler."""


def plan_step(run: Run, topology: Topology, mesh: Mapping[str, int] | None = None, quick: bool = False) -> Planned:
    """Compiles the training step of a run for a topology.

    Args:
      run: result of `read_run`. Kernels set to "auto" are chosen for the topology.
      mesh: sizes of axes, as in `Run.mesh`. None: the run's mesh.
      quick: compile with less effort than for a run (see `QUICK`), to compare meshes.
    Raises:
      ConfigError: the topology or its compiler cannot run the step. TooLarge: the step exceeds a device's memory.
    """
    began = time.perf_counter()
    with targeting(topology):
        try:
            devices = make_mesh(run.mesh if mesh is None else mesh, topology.devices)
            step, state, batch = abstract_step(run, devices)
            traced = step.trace(state, batch)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{topology.name}: {error}") from error
        compiled = _compile(traced, topology, QUICK.get(topology.platform, {}) if quick else {})
    seconds = time.perf_counter() - began
    steps, program = list(operations(traced.jaxpr)), hlo_text.parse(compiled.as_text())
    arguments, peak = _memory(compiled, topology.platform)
    flops, recomputed = _flops(steps, devices.size)
    counts = padded(batch, run.model.decoder.window)
    useful = sum(part.total for part in count_flops(run.model, counts, run.optim.freeze).values())
    groups = argument_groups(state, batch)
    return Planned(
        mesh=dict(devices.shape),
        devices=devices.size,
        device_kind=topology.device_kind,
        arguments=arguments,
        temporaries=peak - arguments,
        peak=peak,
        largest=_largest(groups, program),
        flops=flops,
        useful=useful / devices.size,
        recomputed=recomputed,
        collectives=collectives(program, devices),
        warnings=warnings_of(run, topology.platform, steps, program, devices),
        compile_seconds=seconds,
        host_bytes=_host_bytes(),
    )


def abstract_step(run: Run, mesh: Mesh) -> tuple[Any, TrainState, Batch]:
    """Returns (jitted step, state, batch) as in training, with shapes and shardings instead of arrays.

    Raises ValueError if the mesh does not divide an axis.
    """
    algorithm, context = algorithm_of(run), train_context(run, mesh)
    algorithm.check_plannable()
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = jax.tree.map(place, context.state, context.state_shardings)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((run.data.batch, *x.shape[1:]), x.dtype), algorithm.padding())
    return algorithm.step(context), state, jax.tree.map(place, batch, algorithm.batch_shardings(batch, mesh))


def _compile(traced: Any, topology: Topology, options: dict[str, Any]) -> Any:
    try:
        lowered = traced.lower(lowering_platforms=(LOWERED[topology.platform],))
        return lowered.compile(compiler_options=ABSENT.get(topology.platform, {}) | options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in reason:
            raise TooLarge(
                f"{topology.name}: {reason.partition(': ')[2]}; use more devices, lower data.batch, raise "
                "train.grad_accum_steps, or set runtime.remat='full'."
            ) from error
        raise ConfigError(f"the compiler for {topology.name} refuses the step: {reason}") from error


def _memory(compiled: Any, platform: str) -> tuple[int, int]:
    """Returns (bytes of the arguments, bytes at the peak)."""
    stats = compiled.memory_analysis()
    if platform != "cpu":
        return stats.argument_size_in_bytes, stats.peak_memory_in_bytes
    # For CPUs XLA's peak leaves out temporaries, which are one block.
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes, stats.argument_size_in_bytes + results + stats.temp_size_in_bytes


def _flops(steps: list, devices: int) -> tuple[dict[str, float], float]:
    """Returns (FLOPs by part, recomputed FLOPs) of one device."""
    parts: dict[str, float] = defaultdict(float)
    recomputed = 0.0
    for product in products(steps):
        parts[product.part] += product.flops / devices
        recomputed += product.recomputed / devices
    return dict(parts), recomputed


def collectives(program: hlo_text.Program, mesh: Mesh) -> tuple[Collective, ...]:
    """Returns the collectives of a compiled program by kind and mesh axes, most bytes first."""
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0])
    slices = np.array([getattr(device, "slice_index", 0) for device in mesh.devices.flat]).reshape(mesh.devices.shape)
    across = tuple(name for axis, name in enumerate(mesh.axis_names) if np.ptp(slices, axis=axis).any())
    for transfer in hlo_text.transfers(program):
        total = sums[transfer.kind, axes_of(transfer.instruction, mesh.shape, across)]
        total[0] += transfer.runs
        total[1] += transfer.runs * transfer.bytes
    merged = [Collective(kind, axes, int(runs), size) for (kind, axes), (runs, size) in sums.items()]
    return tuple(sorted(merged, key=lambda collective: -collective.bytes))


def argument_groups(state: TrainState, batch: Batch) -> dict[str, int]:
    """Returns the bytes on one device of parameters and optimizer state by part of the model, and of a batch."""
    groups: dict[str, int] = defaultdict(int)
    for path, leaf in jax.tree_util.tree_leaves_with_path({"state": state._asdict(), "batch": batch._asdict()}):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        groups[_group([str(getattr(key, "key", getattr(key, "name", key))) for key in path])] += size
    return dict(groups)


def _group(names: list[str]) -> str:
    if names[0] == "batch":
        return "batch"
    kind = {"params": "parameters", "opt_state": "optimizer state"}.get(names[1], "counters")
    part = next((name for name in ("encoder", "connector", "decoder") if name in names), "")
    part = "experts" if any(name.startswith("experts_") for name in names) else part
    return f"{kind} of {part}" if part else kind


def _largest(groups: dict[str, int], program: hlo_text.Program) -> tuple[tuple[str, int], ...]:
    arrays = {f"{shape} {place(scope)}": size for shape, scope, size in hlo_text.largest_arrays(program, 4 * LARGEST)}
    items = [*groups.items(), *arrays.items()]
    return tuple(sorted(items, key=lambda item: -item[1])[:LARGEST])


def _host_bytes() -> int:
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
