"""Where arrays live: axis names on weights, rules from names to mesh axes, and the specs of whole trees.

A weight names its axes (`embed`, `heads`, `mlp` ...) where it is made; activations name theirs at few places.
A *rule set* maps each name to a mesh axis, to several, or to None. It is data, which a run edits.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import struct
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
Rules = tuple[tuple[str, Any], ...]

# Of weights: embed head_dim layers taps patch position; of activations: batch patch_row length; of both: the rest.
RULES: dict[str, dict[str, Any]] = {
    "fsdp": {
        "batch": ("data", "fsdp"),
        "patch_row": "tensor",
        "length": None,
        "embed": "fsdp",
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
        "head_dim": None,
        "layers": None,
        "taps": None,
        "patch": None,
        "position": None,
    }
}
RULES["replicated"] = {**dict.fromkeys(RULES["fsdp"]), "batch": ("data", "fsdp", "tensor")}


def freeze_rules(rules: Mapping[str, Any]) -> Rules:
    """Rules as a hashable tuple, the form that a model's runtime config carries."""
    return tuple((name, tuple(axes) if isinstance(axes, list) else axes) for name, axes in sorted(rules.items()))


class Named(struct.PyTreeNode, meta.AxisMetadata):
    """A weight with the names of its axes.

    Flax's own `LogicallyPartitioned` constrains on unboxing, which fails on Explicit axes; this box only remembers.
    """

    value: Any
    names: tuple[str | None, ...] = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, value):
        return self.replace(value=value)

    def add_axis(self, index: int, params: dict):
        return self.replace(names=(*self.names[:index], params[nn.PARTITION_NAME], *self.names[index:]))

    def remove_axis(self, index: int, params: dict):
        return self.replace(names=(*self.names[:index], *self.names[index + 1 :]))


def named(init, *names):
    """An initializer whose result carries the names of its axes."""
    return lambda *args: Named(init(*args), names)


def make_mesh(shape: Mapping[str, int] | None = None, devices=None) -> Mesh:
    """A mesh with the axes `data`, `fsdp`, `tensor`; absent axes have size 1 and one size may be -1 (what is left).

    Without a shape every device is on `fsdp`. Raises ValueError where the sizes do not multiply to the devices.
    """
    shape = dict(shape or {"fsdp": -1})
    devices = jax.devices() if devices is None else devices
    unknown = set(shape) - set(MESH_AXES)
    if unknown:
        raise ValueError(f"unknown mesh axes {sorted(unknown)}; the axes are {', '.join(MESH_AXES)}")
    sizes = [int(shape.get(axis, 1)) for axis in MESH_AXES]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        sizes_text = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes))
        raise ValueError(f"mesh {sizes_text} does not cover {len(devices)} devices; at most one size may be -1")
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    )


def _mesh_axes(axes, mesh) -> tuple[str, ...]:
    """The axes of a rule that the mesh has."""
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return tuple(axis for axis in axes if axis in mesh.shape)


def ways(name: str | None, rules: Rules, mesh) -> int:
    """Over how many devices of a mesh the axis `name` is spread; 1 without a mesh or a rule."""
    return math.prod(mesh.shape[axis] for axis in _mesh_axes(dict(rules).get(name), mesh))


def partition_spec(names, rules: Rules, mesh, shape=None, what: str = "") -> PartitionSpec:
    """The PartitionSpec of axis names under rules.

    Mesh axes that the mesh lacks are dropped. With `shape`, a size that its mesh axes do not divide raises ValueError,
    as do a name without a rule and a mesh axis used twice.
    """
    table = dict(rules)
    spec, used = [], set()
    for dimension, name in enumerate(names):
        if name is None:
            spec.append(None)
            continue
        if name not in table:
            raise ValueError(f"no sharding rule for axis {name!r} of {what or names}; rules: {sorted(table)}")
        axes = _mesh_axes(table[name], mesh)
        if used & set(axes):
            raise ValueError(f"{what or names}: mesh axes {sorted(used & set(axes))} are used twice by {tuple(names)}")
        used |= set(axes)
        parts = ways(name, rules, mesh)
        if shape is not None and shape[dimension] % parts:
            raise ValueError(
                f"{what}: axis {name!r} of size {shape[dimension]} is not divisible by {axes} ({parts} ways); "
                f"change the mesh or the rule for {name!r}"
            )
        spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*spec)


def shard(x, names, rules: Rules):
    """Constrain an activation to the ambient mesh (`jax.set_mesh`); without a mesh it is returned as it is.

    A size that the mesh does not divide (one row of patches on two devices) stays whole: this is advice, not a weight.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not rules:
        return x
    kept = [name if size % ways(name, rules, mesh) == 0 else None for size, name in zip(x.shape, names)]
    spec = partition_spec(kept, rules, mesh)
    if all(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def _path_name(path) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def shardings(boxed, mesh: Mesh, rules: Rules):
    """NamedSharding of every weight, for a tree of `Named` boxes as `model.init` or its `eval_shape` returns it."""

    def of(path, box):
        if not isinstance(box, Named):
            return NamedSharding(mesh, PartitionSpec())
        what = f"weight {_path_name(path)}"
        return NamedSharding(mesh, partition_spec(box.names, rules, mesh, box.value.shape, what))

    return jax.tree_util.tree_map_with_path(of, boxed, is_leaf=lambda leaf: isinstance(leaf, Named))
