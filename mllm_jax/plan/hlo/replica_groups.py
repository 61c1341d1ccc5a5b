"""Groups of devices that a collective of a compiled program joins, and the mesh axes that they span.

XLA writes groups of devices as lists, as a transposed range, or as axes of its own mesh
(xla/hlo/ir/replica_group.cc, mesh_and_axis.cc); it numbers devices in the order of the program's mesh.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from mllm_jax.plan.hlo.hlo_text import Instruction


def axes_of(instruction: Instruction, mesh: Mapping[str, int], across: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The axes of the mesh along which the devices differ that a collective joins.

    Args:
      across: the axes that slices of a TPU are laid along.
    """
    if instruction.between_slices:
        return across
    sizes = tuple(mesh.values())
    groups = _groups(instruction.attributes, math.prod(sizes))
    places = np.stack(np.unravel_index(groups, sizes))  # [axes, groups, members]
    differs = (places != places[..., :1]).any(axis=(1, 2))
    return tuple(axis for axis, different in zip(mesh, differs) if different)


def _groups(attributes: str, devices: int) -> np.ndarray:
    """i[groups members] numbers of the devices that meet, in the order of the mesh."""
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return _numbers(found[1]).reshape(-1, 2)
    if found := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", attributes):
        rows = [_numbers(row) for row in re.findall(r"\{([\d,]*)\}", found[1])]
        return np.stack([row for row in rows if len(row) == len(rows[0])])
    if found := re.search(r"replica_groups=\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(found[2]).reshape(_numbers(found[1]))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)\s)?\s*\{([^}]*)\}", attributes):
        return _mesh_groups(*found.groups())
    return np.arange(devices)[None]  # all of them


def _mesh_groups(axes: str, ids: str | None, joined: str) -> np.ndarray:
    """Groups that are written as axes of a mesh of the compiler's own, or as parts of them: `'a':(2)4` is the part of
    size 4 of axis a that has a part of size 2 before it."""
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
    kept = [axis for axis in range(len(shape)) if axis not in chosen]
    members = math.prod(shape[axis] for axis in chosen)
    return devices.reshape(shape).transpose(kept + chosen).reshape(-1, members)


def _iota(text: str) -> np.ndarray:
    """Expands `[4,2]T(1,0)`: 0, 1, ... in that shape, transposed, flat."""
    shape, order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    array = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (array.transpose(_numbers(order)) if order else array).ravel()


def _numbers(text: str) -> np.ndarray:
    return np.array(re.findall(r"\d+", text), int)
