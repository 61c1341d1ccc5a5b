"""Searches for the mesh, remat policy and vision rule of a run on a topology: estimates all, compiles the best few."""

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

# Alternative rules of the vision tower, whose width often is not divisible by all devices.
VISION: dict[str, dict[str, Any]] = {
    "as it is": {},
    "over fsdp": {"encoder_embed": "fsdp"},
    "whole": {"encoder_embed": None},
}


ROOM = 0.85  # estimates of memory are trusted to within a factor: of a device's memory, this share surely fits


class Choice(NamedTuple):
    """One point of the search."""

    mesh: tuple[tuple[str, int], ...]  # without axes of size 1
    remat: str
    vision: str

    def run(self, run: Run) -> Run:
        """The run under this choice."""
        rules = {**run.rules, **VISION[self.vision]}
        runtime = dataclasses.replace(run.model.runtime, remat=self.remat)
        model = with_rules(dataclasses.replace(run.model, runtime=runtime), rules)
        return dataclasses.replace(run, model=model, rules=rules, mesh=dict(self.mesh))


class Candidate(NamedTuple):
    choice: Choice
    planned: Planned
    time: Roofline
    memory: float  # bytes that a device has
    compiled: bool = False
    refused: str = ""  # the compiler's error

    @property
    def fits(self) -> bool:
        return not self.refused and self.planned.peak <= self.memory

    @property
    def rank(self) -> tuple:
        """Sort key: candidates that fit first, then compiled ones, those with room for errors of the estimate, fast
        ones, small ones. Candidates that do not fit are ordered by size.
        """
        seconds, peak = float(f"{self.time.seconds:.3g}"), self.planned.peak
        if not self.fits:
            return True, max(peak, self.memory), seconds
        return False, not self.compiled, not self.compiled and peak > ROOM * self.memory, seconds, peak


class Found(NamedTuple):
    """Candidates, best first, and why other meshes are impossible: reason -> how many."""

    candidates: list[Candidate]
    impossible: Counter


def meshes(devices: int, axes: tuple[str, ...] = MESH_AXES) -> Iterator[dict[str, int]]:
    """All ways to spread devices over axes of a mesh."""
    if len(axes) == 1:
        yield {axes[0]: devices}
        return
    for size in (n for n in range(1, devices + 1) if devices % n == 0):
        for rest in meshes(devices // size, axes[1:]):
            yield {axes[0]: size, **rest}


class Search:
    """The choices of a run on a topology.

    Raises ConfigError for a topology without published figures, and for patterns that match no weight.

    Args:
      topology: of `get_topology`.
    """

    def __init__(self, run: Run, topology: Topology):
        self.run, self.topology, self.chip = run, topology, chip_of(topology)
        try:
            self.shapes = read_shapes(run)
        except ValueError as error:  # of patterns that no weight has
            raise ConfigError(str(error)) from error

    def rank(self, report: Callable[[float], None] = lambda share: None) -> Found:
        """Estimates every mesh with every remat policy, in seconds, each under the first vision rule that divides.

        Args:
          report: receives the fraction done.
        Raises:
          ConfigError: no mesh is possible.
        """
        moe = self.run.model.decoder.moe
        policies = [name for name in REMAT if name != "experts" or moe]
        # Without experts their axis is another name for fsdp.
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
        """A mesh under remat policies and the first of the vision rules that is possible.

        Raises ValueError where none is: the reason of the first.
        """
        refused = None
        for vision in rules:
            try:
                portion = DeviceWorkload(self.shapes, Choice(mesh, policies[0], vision).run(self.run), dict(mesh))
            except ValueError as error:
                refused = refused or error
                continue
            found, network = [], self.network(mesh)
            for remat in policies:
                planned = estimate(portion, remat, self.chip.kind)
                spent = roofline(planned, network, traffic(portion, remat))
                found.append(Candidate(Choice(mesh, remat, vision), planned, spent, self.chip.memory))
            return found
        raise refused

    def network(self, mesh: tuple[tuple[str, int], ...]) -> Network:
        return Network(make_mesh(dict(mesh), self.topology.devices), self.chip)

    def portion(self, choice: Choice) -> DeviceWorkload:
        return DeviceWorkload(self.shapes, choice.run(self.run), dict(choice.mesh))

    def compile(self, candidate: Candidate, quick: bool = False) -> Candidate:
        """Compiles a candidate, with low effort if `quick`."""
        choice = candidate.choice
        try:
            planned = plan_step(choice.run(self.run), self.topology, dict(choice.mesh), quick)
        except TooLarge as error:
            return candidate._replace(compiled=True, refused=str(error))
        spent = roofline(planned, self.network(choice.mesh), traffic(self.portion(choice), choice.remat))
        return candidate._replace(planned=planned, time=spent, compiled=True)

    def compile_best(self, found: Found, count: int, seconds: float, report: Callable[[str], None]) -> Found:
        """Compiles the best candidates with low effort until `count` fit, or one more would likely exceed `seconds`.

        Args:
          report: receives the mesh that is compiled.
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
            except ConfigError as error:  # what the estimate did not foresee
                compiled = left[0]._replace(compiled=True, refused=str(error))
            candidates[candidates.index(left[0])] = compiled
            longest = max(longest, time.monotonic() - began - spent)
        return found._replace(candidates=sorted(candidates, key=lambda candidate: candidate.rank))


def chip_of(topology: Topology) -> Chip:
    name = topology.name.partition(":")[0]
    if name not in CHIPS:
        raise ConfigError(f"{topology.name} has no published figures to plan with; {', '.join(CHIPS)} have")
    return CHIPS[name]


def mesh_text(mesh: Any) -> str:
    """The sizes of a mesh's axes above 1: "fsdp=16 expert=16"."""
    return " ".join(f"{axis}={size}" for axis, size in dict(mesh).items() if size > 1) or "one device"


def read_mesh(text: str, topology: Topology) -> dict[str, int]:
    """Sizes of all axes from "fsdp=16,expert=-1". Raises ValueError for what is no mesh of the topology."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not size.lstrip("-").isdecimal() or axis in sizes:
            raise ValueError("a mesh is written as in fsdp=16,expert=16")
        sizes[axis] = int(size)
    return dict(make_mesh(sizes, topology.devices).shape)


def summary(best: Candidate, tokens: int) -> str:
    """A sentence: whether it fits, how fast it is at best, what bounds it.

    Args:
      tokens: of a step.
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
            f"does not fit: {what} {where} ({origin}) needs {gib(planned.peak)} of {gib(best.memory)}; spread the run "
            "over more devices, lower data.batch, or raise train.grad_accum_steps"
        )
    return (
        f"fits: {what} {where} ({origin}) needs {gib(planned.peak)} of {gib(best.memory)}; planned step "
        f"{duration(time.seconds)}, {tokens / time.seconds:,.0f} tokens/s, MFU {percent(time.mfu)}, "
        f"bound by {time.bound}"
    )
