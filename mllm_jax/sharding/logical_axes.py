"""Rules from the names of an array's axes to mesh axes, and the spec of an array under them.

A weight names its axes (`embed`, `heads`, `mlp` ...) where it is made; activations name theirs at few places.
A *rule set* maps each name to a mesh axis, to several, or to None. It is data, which a run edits.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from jax.sharding import PartitionSpec

from mllm_jax.common.settings import Constraint, check
from mllm_jax.sharding.mesh import MESH_AXES, mesh_text

Rules = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class MeshAxes(Constraint):
    """Value of a sharding rule: an axis of the mesh, several different ones, or None."""

    def fault(self, value: Any) -> str | None:
        axes = as_axes(value)
        known = isinstance(axes, (tuple, list)) and all(axis in MESH_AXES for axis in axes)
        if not known or len(set(axes)) < len(axes):
            return f"must be None, an axis of the mesh, or a tuple of different ones of {', '.join(MESH_AXES)}."


def freeze_rules(rules: Mapping[str, Any]) -> Rules:
    """Rules as a hashable tuple, as a model's runtime config carries them. ValueError for an unknown mesh axis."""
    check(Mapping[str, Annotated[Any, MeshAxes()]], rules, "rules")
    return tuple((name, tuple(axes) if isinstance(axes, list) else axes) for name, axes in sorted(rules.items()))


def rules_of(part: str, rules: Rules) -> Rules:
    """The rules that hold inside the part of a model that is called `part`."""
    prefix = f"{part}_"
    own = {name.removeprefix(prefix): axes for name, axes in rules if name.startswith(prefix)}
    return freeze_rules(dict(rules) | own)


def as_axes(entry):
    """Returns the mesh axes of a rule, or of an entry of a PartitionSpec, as a tuple."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def _mesh_axes(axes, mesh) -> tuple[str, ...]:
    """The axes of a rule over which the mesh spreads anything."""
    return tuple(axis for axis in as_axes(axes) if mesh.shape.get(axis, 1) > 1)


def axes_size(axes: tuple[str, ...], mesh) -> int:
    """Returns the number of devices along several axes of a mesh."""
    return math.prod(mesh.shape[axis] for axis in axes)


Name = str | tuple[str, ...] | None  # of an axis of an activation, or those of several that were joined to one


def num_shards(name: Name, rules: Rules, mesh) -> int:
    """Over how many devices of a mesh the axis `name` is spread; 1 without a mesh or a rule."""
    return axes_size(split_axes(name, rules, mesh), mesh)


def split_axes(name: Name, rules: Rules, mesh) -> tuple[str, ...]:
    """Returns the axes of a mesh, larger than 1, over which the axis `name` is spread."""
    table, names = dict(rules), name if isinstance(name, tuple) else (name,)
    return tuple(axis for name in names for axis in _mesh_axes(table.get(name), mesh))


def divisible_axes(name: Name, size: int, rules: Rules, mesh) -> tuple[str, ...]:
    """The mesh axes over which an activation's axis is spread: those of its rule, but for the last ones where all of
    them do not divide its size."""
    axes = split_axes(name, rules, mesh)
    while size % axes_size(axes, mesh):
        axes = axes[:-1]
    return axes


def partition_spec(names, rules: Rules, mesh, shape=None, what: str = "", part: str = "") -> PartitionSpec:
    """The PartitionSpec of axis names under rules, those of a part of the model if it is named.

    Mesh axes of size 1 and those that the mesh lacks are dropped. With `shape`, a size that its mesh axes do not
    divide raises ValueError, as do a name without a rule and a mesh axis used twice.
    """
    known, rules = dict(rules), rules_of(part, rules)
    table, what = dict(rules), what or f"an array with axes {tuple(names)}"
    for name in names:
        if name is not None and name not in table:
            raise ValueError(f"{what}: its axis {name!r} has no sharding rule; there are rules for {sorted(table)}")
    parts = [_mesh_axes(table.get(name), mesh) for name in names]
    for name, size, axes in zip(names, shape or (), parts):
        if size % axes_size(axes, mesh):
            fits, rule = _entry(divisible_axes(name, size, rules, mesh)), f"{part}_{name}"
            raise ValueError(
                f"{what}: its axis {name!r} of size {size} is not divisible by {mesh_text(axes, mesh.shape)} devices; "
                f"change the size, the mesh, or the sharding rule of {(rule if rule in known else name)!r} to {fits!r}"
            )
    return spec_of_axes(names, parts, what)


def spec_of_axes(names, parts, what: str) -> PartitionSpec:
    """Returns the PartitionSpec of mesh axes per named axis. ValueError for a mesh axis that two of them use."""
    for (name, axes), (other, taken) in itertools.combinations(zip(names, parts), 2):
        if twice := sorted(set(axes) & set(taken)):
            raise ValueError(
                f"{what}: its axes {name!r} and {other!r} are both spread over {', '.join(twice)}; "
                f"take {'it' if len(twice) == 1 else 'them'} out of one of the two sharding rules"
            )
    return PartitionSpec(*map(_entry, parts))


def _entry(axes: tuple[str, ...]):
    return axes if len(axes) > 1 else axes[0] if axes else None
