"""Finds the mesh axes over which a collective of a compiled program communicates, from its replica groups.

XLA writes groups of devices as lists, as a transposed range, or as axes of a mesh that it defines
(xla/hlo/ir/replica_group.cc, mesh_and_axis.cc). It numbers devices in the order of the program's mesh.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from mllm_jax.plan.hlo.hlo_text import Instruction


def axes_of(instruction: Instruction, mesh: Mapping[str, int], across: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a collective's groups differ.

    Args:
      across: mesh axes along which TPU slices differ, returned for transfers between slices.
    """
    if instruction.between_slices:
        return across
    sizes = tuple(mesh.values())
    groups = _groups(instruction.attributes, math.prod(sizes))
    places = np.stack(np.unravel_index(groups, sizes))  # [axes, groups, members]
    differs = (places != places[..., :1]).any(axis=(1, 2))
    return tuple(axis for axis, different in zip(mesh, differs) if different)


def _groups(attributes: str, devices: int) -> np.ndarray:
    """Returns i[groups members]: the device numbers of each group, in the order of the mesh."""
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return _numbers(match[1]).reshape(-1, 2)
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", attributes):
        rows = [_numbers(row) for row in re.findall(r"\{([\d,]*)\}", match[1])]
        return np.stack([row for row in rows if len(row) == len(rows[0])])
    if match := re.search(r"replica_groups=\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(match[2]).reshape(_numbers(match[1]))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)\s)?\s*\{([^}]*)\}", attributes):
        return _mesh_groups(*match.groups())
    return np.arange(devices)[None]  # no groups: one group of all devices


def _mesh_groups(axes: str, ids: str | None, joined: str) -> np.ndarray:
    """Returns the groups that are written as axes of the compiler's mesh, or as factors of axes.

    `'a':(2)4` is the factor of size 4 of axis a that follows a factor of size 2: an axis of size 16 is read as
    2 x 4 x 2, and the groups join devices along the middle factor.
    """
    sizes = {name: int(size) for name, size in re.findall(r"([^=,]+)=(\d+)", axes)}
    devices = np.arange(math.prod(sizes.values())) if ids is None else _iota(ids) if "[" in ids else _numbers(ids)
    wanted: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in re.findall(r"([^:,]+)(?::\((\d+)\)(\d+))?(?:,|$)", joined):
        wanted.setdefault(name, []).append((int(before or 1), int(size or sizes[name])))
    shape, chosen = [], []
    for name, size in sizes.items():
        done = 1
        for before, part in sorted(wanted.get(name, [])):
            shape += [before // done, part]
            chosen.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
    others = [axis for axis in range(len(shape)) if axis not in chosen]
    members = math.prod(shape[axis] for axis in chosen)
    return devices.reshape(shape).transpose(others + chosen).reshape(-1, members)


def _iota(text: str) -> np.ndarray:
    """Expands an iota list: `[4,2]T(1,0)` is 0, 1, ... 7 in shape (4, 2), transposed and flattened: 0 2 4 6 1 3 5 7."""
    shape, order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    array = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (array.transpose(_numbers(order)) if order else array).ravel()


def _numbers(text: str) -> np.ndarray:
    return np.array(re.findall(r"\d+", text), int)
