"""Computes a lower bound of a planned step's time: a roofline of compute, memory and communication.

Bandwidths of collectives follow the book "How to Scale Your Model" (jax-ml.github.io/scaling-book): rings along the
dimensions of a torus, a switch within a GPU node, and the data-center network between slices or nodes.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from mllm_jax.plan.compile import Collective, Planned
from mllm_jax.plan.hardware.chips import Chip

EXCHANGES = ("all-to-all", "ragged-all-to-all")


class Ring(NamedTuple):
    """Devices along one dimension of a torus."""

    size: int
    bandwidth: float  # bytes/s that each device can receive


class Group(NamedTuple):
    """Devices of a collective."""

    near: int  # devices within a slice or a node
    far: int  # number of slices or nodes
    rings: tuple[Ring, ...]  # rings within a slice; a switch is one ring

    @property
    def size(self) -> int:
        return self.near * self.far

    @property
    def bandwidth(self) -> float:
        """Bytes/s that each device can receive within the slice, along all rings at once."""
        return sum(ring.bandwidth for ring in self.rings)


class Network:
    """Network between the devices of a mesh."""

    def __init__(self, mesh: Mesh, chip: Chip):
        self.mesh, self.chip, self._groups = mesh, chip, {}

    def group(self, axes: Sequence[str]) -> Group:
        """Returns the group of devices that a collective over these mesh axes connects."""
        axes = tuple(axis for axis in self.mesh.axis_names if axis in axes)
        if axes not in self._groups:
            index = tuple(slice(None) if axis in axes else 0 for axis in self.mesh.axis_names)
            self._groups[axes] = self._describe(self.places[index].reshape(-1, 4))
        return self._groups[axes]

    @cached_property
    def places(self) -> np.ndarray:
        """(slice or node, x, y, z) of every device, with the shape of the mesh."""
        chip = self.chip

        def place(device):
            if chip.node:
                return (getattr(device, "slice_index", 0), device.id // chip.node, 0, 0)
            return (getattr(device, "slice_index", 0), *device.coords)

        devices = self.mesh.devices
        places = np.array([place(device) for device in devices.flat]).reshape(*devices.shape, 4)
        if chip.node:  # treat every node as a slice
            places[..., 0], places[..., 1] = places[..., 0] * 10**6 + places[..., 1], 0
        return places

    def _describe(self, places: np.ndarray) -> Group:
        far = len(np.unique(places[:, 0]))
        near = len(places) // far
        members = places[places[:, 0] == places[0, 0], 1:]
        if near == 1:
            return Group(near, far, ())
        if self.chip.switch:
            return Group(near, far, (Ring(near, self.chip.switch),))
        extent = self.places[..., 1:].reshape(-1, 3).max(axis=0) + 1
        rings = tuple(filter(None, (self._ring(members[:, d], int(extent[d])) for d in range(3))))
        if math.prod(ring.size for ring in rings) != len(np.unique(members, axis=0)) or not rings:
            rings = (Ring(near, 2 * self.chip.link),)  # the group winds through the torus, or is within a chip
        return Group(near, far, rings)

    def _ring(self, coordinates: np.ndarray, extent: int) -> Ring | None:
        """Returns the ring of a group along one torus dimension. None if the group has one coordinate there.

        Groups with a stride of several chips share the links between them, which divides the bandwidth.
        """
        along = np.unique(coordinates)
        if len(along) == 1:
            return None
        stride = (along[-1] - along[0]) / (len(along) - 1)
        closed = extent % self.chip.wraps == 0 and len(along) * stride == extent
        return Ring(len(along), self.chip.link * (2 if closed else 1) / stride)


def seconds(collective: Collective, network: Network) -> float:
    """Returns the seconds of a collective in one step: the time of its bytes on the slowest network that they cross.

    An all-gather of R bytes moves R (n - 1) / n to each of n devices. A reduce-scatter moves as much in the other
    direction, an all-reduce both. An all-to-all of R bytes on a ring of n moves R n / 4 over each link, in both
    directions.
    """
    group, chip = network.group(collective.axes), network.chip
    if group.size == 1:
        return 0.0
    kind, result = collective.kind, collective.bytes
    if kind == "collective-permute":
        return result / (chip.network if group.far > 1 else chip.link or chip.switch)
    if kind in EXCHANGES:
        stays = result / group.far
        inside = stays * (group.near - 1) / group.near / group.bandwidth if group.rings else 0.0
        if chip.link:
            inside = max([inside, *(stays * ring.size / 4 / ring.bandwidth for ring in group.rings)])
        return max(inside, (result - stays) / chip.network)
    total = result * group.size if kind == "reduce-scatter" else result
    inside = total * (group.near - 1) / group.near / group.bandwidth if group.rings else 0.0
    outside = total / group.near * (group.far - 1) / group.far / chip.network
    return max(inside, outside) * (2 if kind == "all-reduce" else 1)


class Roofline(NamedTuple):
    """Times of a step in seconds. `compute`, `memory` and `communication` are the times of each resource alone."""

    compute: float
    memory: float
    communication: float
    waited: float  # the part of communication that does not overlap with compute
    axes: dict[tuple[str, ...], float]  # communication by mesh axes
    mfu: float

    @property
    def seconds(self) -> float:
        """Time of the step. Communication of weights and gradients overlaps with compute, that of activations not."""
        return max(self.compute, self.memory, self.communication - self.waited) + self.waited

    @property
    def bound(self) -> str:
        """Name of the resource that takes longest."""
        return max(("compute", "memory", "communication"), key=lambda name: getattr(self, name))


def roofline(planned: Planned, network: Network, traffic: float) -> Roofline:
    """Computes the roofline of a planned step.

    Args:
      traffic: bytes that a device reads and writes in its memory (`mllm_jax.plan.comms.traffic`).
    """
    chip, axes, waited = network.chip, {}, 0.0
    for collective in planned.collectives:
        duration = seconds(collective, network)
        axes[collective.axes] = axes.get(collective.axes, 0.0) + duration
        waited += duration * _is_waited_for(collective)
    rows = dict(
        compute=sum(planned.flops.values()) / chip.peak,
        memory=traffic / chip.memory_bandwidth,
        communication=sum(axes.values()),
        waited=waited,
        axes=axes,
    )
    result = Roofline(**rows, mfu=0.0)
    return result._replace(mfu=planned.useful / chip.peak / result.seconds)


def _is_waited_for(collective: Collective) -> bool:
    """Returns whether a layer waits for a collective of activations: an exchange of tokens, or any over `tensor`."""
    return collective.kind in (*EXCHANGES, "collective-permute") or "tensor" in collective.axes
