"""Searches mesh, remat policy and vision rule for a run on a topology: estimates all, and compiles the best few."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mllm_jax.common.config import ConfigError
from mllm_jax.common.format import duration, gib, percent
from mllm_jax.nn.runtime import REMAT
from mllm_jax.plan.comms import traffic
from mllm_jax.plan.compile import Planned, TooLarge, plan_step
from mllm_jax.plan.device_workload import DeviceWorkload, read_shapes
from mllm_jax.plan.estimate import estimate
from mllm_jax.plan.hardware.chips import CHIPS, Chip
from mllm_jax.plan.hardware.topology import Topology
from mllm_jax.plan.roofline import Network, Roofline, roofline
from mllm_jax.sharding.mesh import MESH_AXES, make_mesh
from mllm_jax.train.runs.config import Run, with_rules

# Changes of the run's sharding rules for its vision tower, whose width is often not divisible by all devices.
VISION: dict[str, dict[str, Any]] = {
    "as it is": {},
    "over fsdp": {"encoder_embed": "fsdp"},
    "whole": {"encoder_embed": None},
}

ROOM = 0.85  # share of a device's memory up to which an estimated peak counts as sure to fit


class Choice(NamedTuple):
    """Point in the search space."""

    mesh: tuple[tuple[str, int], ...]  # without axes of size 1
    remat: str
    vision: str

    def run(self, run: Run) -> Run:
        """Returns the run with this mesh, remat policy and vision rule."""
        rules = {**run.rules, **VISION[self.vision]}
        runtime = dataclasses.replace(run.model.runtime, remat=self.remat)
        model = with_rules(dataclasses.replace(run.model, runtime=runtime), rules)
        return dataclasses.replace(run, model=model, rules=rules, mesh=dict(self.mesh))


class Candidate(NamedTuple):
    choice: Choice
    planned: Planned
    time: Roofline
    memory: float  # memory of a device, bytes
    compiled: bool = False
    refused: str = ""  # error of the compiler

    @property
    def fits(self) -> bool:
        return not self.refused and self.planned.peak <= self.memory

    @property
    def rank(self) -> tuple:
        """Sort key, best first. Candidates that fit are sorted by: compiled, peak within `ROOM`, step time, peak.

        Candidates that do not fit follow, sorted by peak.
        """
        seconds, peak = float(f"{self.time.seconds:.3g}"), self.planned.peak
        if not self.fits:
            return True, max(peak, self.memory), seconds
        return False, not self.compiled, not self.compiled and peak > ROOM * self.memory, seconds, peak


class Found(NamedTuple):
    """Result of a search."""

    candidates: list[Candidate]  # best first
    impossible: Counter  # reason -> number of meshes


def meshes(devices: int, axes: tuple[str, ...] = MESH_AXES) -> Iterator[dict[str, int]]:
    """Yields all factorizations of a number of devices over mesh axes."""
    if len(axes) == 1:
        yield {axes[0]: devices}
        return
    for size in (n for n in range(1, devices + 1) if devices % n == 0):
        for rest in meshes(devices // size, axes[1:]):
            yield {axes[0]: size, **rest}


class Search:
    """Searches the choices of a run on a topology.

    Args:
      topology: result of `get_topology`.
    Raises:
      ConfigError: the chip has no published figures, or a pattern matches no weight.
    """

    def __init__(self, run: Run, topology: Topology):
        self.run, self.topology, self.chip = run, topology, chip_of(topology)
        try:
            self.shapes = read_shapes(run)
        except ValueError as error:  # a pattern of the optimizer matches no weight
            raise ConfigError(str(error)) from error

    def rank(self, report: Callable[[float], None] = lambda share: None) -> Found:
        """Estimates every mesh with every remat policy, under the first vision rule that divides. Takes seconds.

        Args:
          report: function that receives the share of meshes done.
        Raises:
          ConfigError: no mesh is possible.
        """
        moe = self.run.model.decoder.moe
        policies = [name for name in REMAT if name != "experts" or moe]
        # Without experts, the axis "expert" acts like "fsdp".
        axes = tuple(axis for axis in MESH_AXES if axis != "expert" or moe)
        every, candidates, impossible = list(meshes(len(self.topology.devices), axes)), [], Counter()
        for number, sizes in enumerate(every):
            report(number / len(every))
            mesh = tuple((axis, size) for axis, size in sizes.items() if size > 1)
            try:
                candidates += self.estimate(mesh, policies, list(VISION))
            except ValueError as error:
                impossible[str(error)] += 1
        if not candidates:
            reason, _ = impossible.most_common(1)[0]
            raise ConfigError(f"no mesh of {len(self.topology.devices)} devices is possible: {reason}")
        return Found(sorted(candidates, key=lambda candidate: candidate.rank), impossible)

    def estimate(self, mesh: tuple[tuple[str, int], ...], policies: list[str], rules: list[str]) -> list[Candidate]:
        """Estimates a mesh with remat policies, under the first vision rule that divides.

        Raises ValueError if none does, with the reason of the first rule.
        """
        refused = None
        for vision in rules:
            try:
                portion = DeviceWorkload(self.shapes, Choice(mesh, policies[0], vision).run(self.run), dict(mesh))
            except ValueError as error:
                refused = refused or error
                continue
            candidates, network = [], self.network(mesh)
            for remat in policies:
                planned = estimate(portion, remat, self.chip.kind)
                times = roofline(planned, network, traffic(portion, remat))
                candidates.append(Candidate(Choice(mesh, remat, vision), planned, times, self.chip.memory))
            return candidates
        raise refused

    def network(self, mesh: tuple[tuple[str, int], ...]) -> Network:
        return Network(make_mesh(dict(mesh), self.topology.devices), self.chip)

    def portion(self, choice: Choice) -> DeviceWorkload:
        return DeviceWorkload(self.shapes, choice.run(self.run), dict(choice.mesh))

    def compile(self, candidate: Candidate, quick: bool = False) -> Candidate:
        """Compiles a candidate and returns it with the compiler's plan. `quick`: as in `plan_step`."""
        choice = candidate.choice
        try:
            planned = plan_step(choice.run(self.run), self.topology, dict(choice.mesh), quick)
        except TooLarge as error:
            return candidate._replace(compiled=True, refused=str(error))
        times = roofline(planned, self.network(choice.mesh), traffic(self.portion(choice), choice.remat))
        return candidate._replace(planned=planned, time=times, compiled=True)

    def compile_best(self, found: Found, count: int, seconds: float, report: Callable[[str], None]) -> Found:
        """Compiles the best candidates with `quick` until `count` fit or the next one would likely exceed `seconds`.

        Args:
          report: function that receives the mesh being compiled, as text.
        """
        candidates, began, longest = list(found.candidates), time.monotonic(), 0.0
        while sum(candidate.compiled and candidate.fits for candidate in candidates) < count:
            left = [one for one in candidates if not one.compiled and ROOM * one.planned.peak <= one.memory]
            spent = time.monotonic() - began
            if not left or (longest and spent + longest > seconds):
                break
            report(mesh_text(left[0].choice.mesh))
            try:
                compiled = self.compile(left[0], quick=True)
            except ConfigError as error:  # a failure that the estimate did not foresee
                compiled = left[0]._replace(compiled=True, refused=str(error))
            candidates[candidates.index(left[0])] = compiled
            longest = max(longest, time.monotonic() - began - spent)
        return found._replace(candidates=sorted(candidates, key=lambda candidate: candidate.rank))


def chip_of(topology: Topology) -> Chip:
    """Returns the figures of a topology's chip. Raises ConfigError if there are none."""
    name = topology.name.partition(":")[0]
    if name not in CHIPS:
        raise ConfigError(f"{topology.name} has no published figures to plan with. Choose one of {', '.join(CHIPS)}.")
    return CHIPS[name]


def mesh_text(mesh: Any) -> str:
    """Returns the sizes of a mesh's axes above 1: "fsdp=16 expert=16"."""
    return " ".join(f"{axis}={size}" for axis, size in dict(mesh).items() if size > 1) or "one device"


def read_mesh(text: str, topology: Topology) -> dict[str, int]:
    """Parses sizes such as "fsdp=16,expert=-1" to those of all axes. Raises ValueError if the mesh is impossible."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not size.lstrip("-").isdecimal() or axis in sizes:
            raise ValueError("a mesh is written as in fsdp=16,expert=16.")
        sizes[axis] = int(size)
    return dict(make_mesh(sizes, topology.devices).shape)


def summary(best: Candidate, tokens: int) -> str:
    """Returns a sentence about the best candidate: whether it fits, its planned speed and its bottleneck.

    Args:
      tokens: number of tokens in a step.
    """
    time, planned = best.time, best.planned
    what = f"{mesh_text(best.choice.mesh)} with remat {best.choice.remat}"
    what += "" if best.choice.vision == "as it is" else f" and the encoder's weights {best.choice.vision}"
    where = f"on {planned.devices} x {planned.device_kind}"
    if best.refused:
        return f"does not fit: {what}: {best.refused}"
    origin = "compiled" if best.compiled else "estimated, not compiled"
    if not best.fits:
        return (
            f"does not fit: {what} {where} ({origin}) needs {gib(planned.peak)} of {gib(best.memory)}; use more "
            "devices, lower data.batch, or raise train.grad_accum_steps"
        )
    return (
        f"fits: {what} {where} ({origin}) needs {gib(planned.peak)} of {gib(best.memory)}; planned step "
        f"{duration(time.seconds)}, {tokens / time.seconds:,.0f} tokens/s, MFU {percent(time.mfu)}, "
        f"bound by {time.bound}"
    )
