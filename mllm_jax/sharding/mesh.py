"""Device meshes. Every mesh has all MESH_AXES, many of size 1."""

import math
from collections.abc import Mapping

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
RESERVED = ("stage",)


def make_mesh(shape: Mapping[str, int] | None = None, devices=None) -> Mesh:
    """Returns a mesh with all MESH_AXES.

    Neighbors along a later axis are closer: on a TPU the axes follow the torus, and a dimension of the torus is split
    over several axes if the sizes require it. Slices (TPU pods or GPU hosts, joined by the slower data-center network)
    divide first `data`, then `fsdp`, `expert` and `context`, and never `tensor`.

    Args:
      shape: sizes by axis. Absent axes have size 1; one size may be -1 (all remaining devices). None: {"fsdp": -1}.
      devices: devices of this program, or of a topology to compile for. None: all devices of this program.
    Raises:
      ValueError: an axis is unknown, the product of sizes is not the number of devices, or the sizes cannot be divided
        over the slices.
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
    """Returns the abstract mesh that `make_mesh` creates for `count` devices in `slices` slices.

    Raises:
      ValueError: as `make_mesh`.
    """
    sizes = _sizes(shape or {"fsdp": -1}, count)
    _over_slices(sizes, slices)
    return AbstractMesh(tuple(sizes), MESH_AXES)


def _sizes(shape: Mapping[str, int], count: int) -> list[int]:
    """Returns the size of every mesh axis on `count` devices."""
    for axis in shape:
        if axis in RESERVED:
            raise ValueError(f"mesh axis {axis!r}: is reserved for pipelines, which are not implemented. Remove it.")
    if unknown := set(shape) - set(MESH_AXES):
        raise ValueError(f"unknown mesh axes {sorted(unknown)}. Use only {', '.join(MESH_AXES)}.")
    sizes = [int(shape.get(axis, 1)) for axis in MESH_AXES]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = count // -math.prod(sizes)
    if min(sizes) < 1 or math.prod(sizes) != count:
        text = mesh_text(shape, shape)
        raise ValueError(f"mesh {text} does not cover {count} devices. Set sizes with this product, or one to -1.")
    return sizes


def _over_slices(sizes: list[int], slices: int) -> list[int]:
    """Returns the number of slices along every mesh axis. Example: data=2 x fsdp=4 on 4 slices has 2 and 2."""
    remaining, outer = slices, []
    for axis, size in zip(MESH_AXES, sizes):
        outer.append(1 if axis == "tensor" else math.gcd(size, remaining))
        remaining //= outer[-1]
    if remaining > 1:
        text = mesh_text(MESH_AXES, dict(zip(MESH_AXES, sizes)))
        raise ValueError(
            f"mesh {text} does not divide over {slices} slices: tensor stays within a slice. "
            f"Set data x fsdp x expert x context to a multiple of {slices}."
        )
    return outer


def mesh_text(axes, shape: Mapping[str, int]) -> str:
    """Returns sizes of mesh axes for a message, such as "data=2 x fsdp=4"."""
    return " x ".join(f"{axis}={shape[axis]}" for axis in axes)
