"""Meshes of devices: every one has all MESH_AXES, most of them of size 1."""

import math
from collections.abc import Mapping

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
RESERVED = ("stage",)


def make_mesh(shape: Mapping[str, int] | None = None, devices=None) -> Mesh:
    """Returns a mesh with all MESH_AXES; absent ones have size 1 and one size may be -1 (all remaining devices).

    Without a shape every device is on `fsdp`. Neighbors on a later axis are closer: on a TPU the axes follow the torus,
    one of whose dimensions is split over several axes if the sizes require it. Between slices (TPU pods, or GPU hosts,
    joined by the slower data-center network) lies as much of `data` as possible, then of `fsdp`, `expert` and
    `context`; never `tensor`.

    Args:
      devices: devices of this program, or of a topology to compile for. Default: all of this program.
    Raises:
      ValueError: an unknown axis, sizes that do not multiply to the devices, or slices that the sizes cannot be split
        over.
    """
    shape = dict(shape or {"fsdp": -1})
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(shape, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        outer = _over_slices(sizes, slices)
        inner = [size // part for size, part in zip(sizes, outer)]
        array = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def mesh_without_devices(shape: Mapping[str, int], count: int, slices: int = 1) -> AbstractMesh:
    """The mesh of `make_mesh` for `count` devices in a number of slices, without any device.

    Raises:
      ValueError: as `make_mesh`.
    """
    sizes = _sizes(shape or {"fsdp": -1}, count)
    _over_slices(sizes, slices)
    return AbstractMesh(tuple(sizes), MESH_AXES)


def _sizes(shape: Mapping[str, int], count: int) -> list[int]:
    """The size of every mesh axis on `count` devices."""
    for axis in shape:
        if axis in RESERVED:
            raise ValueError(f"the mesh axis {axis!r} is reserved for pipelines, which do not exist yet; leave it out")
    if unknown := set(shape) - set(MESH_AXES):
        raise ValueError(f"unknown mesh axes {sorted(unknown)}; the axes are {', '.join(MESH_AXES)}")
    sizes = [int(shape.get(axis, 1)) for axis in MESH_AXES]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = count // -math.prod(sizes)
    if min(sizes) < 1 or math.prod(sizes) != count:
        text = mesh_text(shape, shape)
        raise ValueError(f"mesh {text} does not cover {count} devices; at most one size may be -1")
    return sizes


def _over_slices(sizes: list[int], slices: int) -> list[int]:
    """Number of parts of every mesh axis that are in different slices."""
    left, outer = slices, []
    for axis, size in zip(MESH_AXES, sizes):
        outer.append(1 if axis == "tensor" else math.gcd(size, left))
        left //= outer[-1]
    if left > 1:
        text = mesh_text(MESH_AXES, dict(zip(MESH_AXES, sizes)))
        raise ValueError(
            f"mesh {text} does not lie on {slices} slices: data x fsdp x expert x context must be a multiple of "
            f"{slices}, as tensor stays within a slice"
        )
    return outer


def mesh_text(axes, shape: Mapping[str, int]) -> str:
    """Returns sizes of mesh axes for a message, as "data=2 x fsdp=4"."""
    return " x ".join(f"{axis}={shape[axis]}" for axis in axes)
