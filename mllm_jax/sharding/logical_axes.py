"""Rules from logical axes to mesh axes, and the PartitionSpec of an array under them.

Weights name their axes (`embed`, `heads`, `mlp` ...) where they are created, activations where they are constrained. A
rule set maps each name to one mesh axis, several, or None; a run's config can change it.
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
    """Constraint on the value of a sharding rule: a mesh axis, several different ones, or None."""

    def fault(self, value: Any) -> str | None:
        axes = as_axes(value)
        valid = isinstance(axes, (tuple, list)) and all(axis in MESH_AXES for axis in axes)
        if not valid or len(set(axes)) < len(axes):
            return f"must be None, a mesh axis, or a tuple of different mesh axes: {', '.join(MESH_AXES)}."


def freeze_rules(rules: Mapping[str, Any]) -> Rules:
    """Returns rules as a hashable tuple, for `Runtime.rules`. Raises ValueError for an unknown mesh axis."""
    check(Mapping[str, Annotated[Any, MeshAxes()]], rules, "rules")
    return tuple((name, tuple(axes) if isinstance(axes, list) else axes) for name, axes in sorted(rules.items()))


def rules_of(part: str, rules: Rules) -> Rules:
    """Returns the rules inside a part of the model: a rule "{part}_{name}" overrides the rule of `name`."""
    prefix = f"{part}_"
    overrides = {name.removeprefix(prefix): axes for name, axes in rules if name.startswith(prefix)}
    return freeze_rules(dict(rules) | overrides)


def as_axes(entry):
    """Returns the mesh axes of a rule, or of an entry of a PartitionSpec, as a tuple."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def _mesh_axes(axes, mesh) -> tuple[str, ...]:
    """Returns the mesh axes of a rule that are larger than 1."""
    return tuple(axis for axis in as_axes(axes) if mesh.shape.get(axis, 1) > 1)


def axes_size(axes: tuple[str, ...], mesh) -> int:
    """Returns the number of devices along several axes of a mesh."""
    return math.prod(mesh.shape[axis] for axis in axes)


Name = str | tuple[str, ...] | None  # name of an activation's axis, or names of several axes folded into one


def num_shards(name: Name, rules: Rules, mesh) -> int:
    """Returns the number of shards of the axis `name` on a mesh; 1 without a mesh or a rule."""
    return axes_size(split_axes(name, rules, mesh), mesh)


def split_axes(name: Name, rules: Rules, mesh) -> tuple[str, ...]:
    """Returns the mesh axes, larger than 1, that shard the axis `name`."""
    table, names = dict(rules), name if isinstance(name, tuple) else (name,)
    return tuple(axis for name in names for axis in _mesh_axes(table.get(name), mesh))


def divisible_axes(name: Name, size: int, rules: Rules, mesh) -> tuple[str, ...]:
    """Returns the mesh axes that shard an activation's axis: those of its rule, as far as they divide `size`.

    Example: a rule ("data", "fsdp") with sizes 2 and 4 gives both for size 8, and ("data",) for size 6.
    """
    axes = split_axes(name, rules, mesh)
    while size % axes_size(axes, mesh):
        axes = axes[:-1]
    return axes


def partition_spec(names, rules: Rules, mesh, shape=None, what: str = "", part: str = "") -> PartitionSpec:
    """Returns the PartitionSpec of axis names under rules. Mesh axes that are missing or of size 1 are left out.

    Args:
      names: logical axes of the array; None: not sharded.
      shape: sizes of the axes, which are checked. None: no check.
      what: name of the array in messages.
      part: part of the model whose rules apply ("encoder", "connector").
    Raises:
      ValueError: a name has no rule, mesh axes do not divide a size of `shape`, or two names use the same mesh axis.
    """
    all_rules, rules = dict(rules), rules_of(part, rules)
    table, what = dict(rules), what or f"an array with axes {tuple(names)}"
    for name in names:
        if name is not None and name not in table:
            raise ValueError(f"{what}: its axis {name!r} has no sharding rule. Use one of {', '.join(sorted(table))}.")
    parts = [_mesh_axes(table.get(name), mesh) for name in names]
    for name, size, axes in zip(names, shape or (), parts):
        if size % axes_size(axes, mesh):
            divisor, rule = _entry(divisible_axes(name, size, rules, mesh)), f"{part}_{name}"
            raise ValueError(
                f"{what}: its axis {name!r} of size {size} is not divisible by {mesh_text(axes, mesh.shape)} devices. "
                f"Change the size, the mesh, or rules.{rule if rule in all_rules else name} to {divisor!r}."
            )
    return spec_of_axes(names, parts, what)


def spec_of_axes(names, parts, what: str) -> PartitionSpec:
    """Returns the PartitionSpec of `parts`, the mesh axes of each name. ValueError if two names share an axis."""
    for (name, axes), (other, other_axes) in itertools.combinations(zip(names, parts), 2):
        if shared := sorted(set(axes) & set(other_axes)):
            raise ValueError(
                f"{what}: its axes {name!r} and {other!r} are both sharded over {', '.join(shared)}. "
                f"Remove {'it' if len(shared) == 1 else 'them'} from one of the two sharding rules."
            )
    return PartitionSpec(*map(_entry, parts))


def _entry(axes: tuple[str, ...]):
    return axes if len(axes) > 1 else axes[0] if axes else None
