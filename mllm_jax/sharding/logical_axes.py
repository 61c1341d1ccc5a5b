"""Where arrays live: axis names on weights, rules from names to mesh axes, and the specs of whole trees.

A weight names its axes (`embed`, `heads`, `mlp` ...) where it is made; activations name theirs at few places.
A *rule set* maps each name to a mesh axis, to several, or to None. It is data, which a run edits.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import jax
from einops import rearrange
from flax import linen as nn
from flax import struct
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mllm_jax.common.settings import Constraint, check

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
RESERVED = ("stage",)
Rules = tuple[tuple[str, Any], ...]

# Of activations: batch expert_batch patch_row length residual; of weights: embed expert_embed head_dim latent q_latent
# layers taps patch position; of both: the rest. `residual` is the length of what one decoder layer hands to the next.
#
# Inside the encoder a rule `encoder_embed` goes before `embed`, and so on; likewise `connector_`. There the rows are
# rows of patches, which know nothing of each other: they lie over all devices, and no device does another's work.
RULES: dict[str, Any] = {
    "batch": ("data", "fsdp", "expert"),
    "length": "context",
    "residual": "context",
    "patch_row": ("context", "tensor"),
    "embed": ("fsdp", "expert", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "expert",
    "expert_batch": ("data", "fsdp"),
    "expert_embed": ("fsdp", "context"),
    "expert_mlp": "tensor",
    "head_dim": None,
    "latent": None,
    "q_latent": None,
    "layers": None,
    "taps": None,
    "patch": None,
    "position": None,
    "encoder_batch": MESH_AXES,
    "encoder_length": None,
    "encoder_embed": ("fsdp", "expert", "context"),
    "connector_batch": MESH_AXES,
    "connector_length": None,
}


class Preset(TypedDict):
    mesh: dict[str, int]  # sizes of axes, as `make_mesh` takes them
    rules: dict[str, Any]  # all of them


# Where to begin: a run names one and edits it. Every mesh has every axis, so one set of rules serves most mixtures of
# them, and the sizes say which; a preset has rules of its own only where the usual ones would do worse.
PRESETS: dict[str, Preset] = {
    # Each device keeps a part of every weight, and has rows of its own (ZeRO, arXiv 1910.02054).
    "fsdp": {"mesh": {"fsdp": -1}, "rules": RULES},
    # Heads and mlp are split besides (Megatron, arXiv 1909.08053), and tokens between layers (arXiv 2205.05198).
    "fsdp_tensor": {"mesh": {"fsdp": -1, "tensor": 4}, "rules": RULES | {"residual": ("context", "tensor")}},
    # Experts lie apart, and tokens travel (GShard, arXiv 2006.16668). A vision tower's width rarely divides as far.
    "expert": {"mesh": {"fsdp": -1, "expert": 4}, "rules": RULES | {"encoder_embed": "fsdp"}},
    # The tokens of a row lie on several devices, which exchange keys or heads (nn/attention/context_parallel.py).
    "long_context": {"mesh": {"fsdp": -1, "context": 4}, "rules": RULES},
    # Each device has all weights, and rows of its own: for models that are small.
    "replicated": {
        "mesh": {"data": -1},
        "rules": dict.fromkeys(RULES) | dict.fromkeys(("batch", "encoder_batch", "connector_batch"), MESH_AXES),
    },
}


@dataclass(frozen=True)
class MeshAxes(Constraint):
    """Value of a sharding rule: an axis of the mesh, several different ones, or None."""

    def fault(self, value: Any) -> str | None:
        axes = () if value is None else (value,) if isinstance(value, str) else value
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


class Named(struct.PyTreeNode, meta.AxisMetadata):
    """A weight with the names of its axes.

    Flax's own `LogicallyPartitioned` constrains on unboxing, which fails on Explicit axes; this box only remembers.

    matrix: of the weight of an `Einsum`, (the axes that its product sums over, those that it gives), from the end.
    """

    value: Any
    names: tuple[str | None, ...] = struct.field(pytree_node=False)
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None = struct.field(pytree_node=False, default=None)

    def unbox(self):
        return self.value

    def replace_boxed(self, value):
        return self.replace(value=value)

    def add_axis(self, index: int, params: dict):
        return self.replace(names=(*self.names[:index], params[nn.PARTITION_NAME], *self.names[index:]))

    def remove_axis(self, index: int, params: dict):
        return self.replace(names=(*self.names[:index], *self.names[index + 1 :]))


def named(init, *names, matrix=None):
    """An initializer whose result carries the names of its axes, and what a matrix does with them (see `Named`)."""
    return lambda *args: Named(init(*args), names, matrix)


def make_mesh(shape: Mapping[str, int] | None = None, devices=None) -> Mesh:
    """A mesh with all MESH_AXES; absent ones have size 1 and one size may be -1 (what is left).

    Without a shape every device is on `fsdp`. Neighbours on a later axis are nearer to each other: on a TPU the axes
    are laid along the torus, one of its axes split over several where sizes ask for it. Between slices (TPU pods, or
    hosts of GPUs, that are joined by the slower data-centre network) lies as much of `data` as possible, then of
    `fsdp`, `expert` and `context`; never `tensor`.

    Args:
      devices: of this program, or of a topology that is compiled for ahead of time; by default all of this program.
    Raises:
      ValueError: an unknown axis, sizes that do not multiply to the devices, or slices that they cannot be cut into.
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
    """The mesh that `make_mesh` makes of `count` devices in so many slices, without any device.

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
        text = _product(shape, shape)
        raise ValueError(f"mesh {text} does not cover {count} devices; at most one size may be -1")
    return sizes


def _over_slices(sizes: list[int], slices: int) -> list[int]:
    """How many parts of every mesh axis lie in different slices."""
    left, outer = slices, []
    for axis, size in zip(MESH_AXES, sizes):
        outer.append(1 if axis == "tensor" else math.gcd(size, left))
        left //= outer[-1]
    if left > 1:
        text = _product(MESH_AXES, dict(zip(MESH_AXES, sizes)))
        raise ValueError(
            f"mesh {text} does not lie on {slices} slices: data x fsdp x expert x context must be a multiple of "
            f"{slices}, as tensor stays within a slice"
        )
    return outer


def _product(axes, shape: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={shape[axis]}" for axis in axes)


def _mesh_axes(axes, mesh) -> tuple[str, ...]:
    """The axes of a rule over which the mesh spreads anything."""
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def _count(axes: tuple[str, ...], mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


Name = str | tuple[str, ...] | None  # of an axis of an activation, or those of several that were joined to one


def ways(name: Name, rules: Rules, mesh) -> int:
    """Over how many devices of a mesh the axis `name` is spread; 1 without a mesh or a rule."""
    return _count(_axes_of(name, rules, mesh), mesh)


def _axes_of(name: Name, rules: Rules, mesh) -> tuple[str, ...]:
    table, names = dict(rules), name if isinstance(name, tuple) else (name,)
    return tuple(axis for name in names for axis in _mesh_axes(table.get(name), mesh))


def fitting_axes(name: Name, size: int, rules: Rules, mesh) -> tuple[str, ...]:
    """The mesh axes over which an activation's axis is spread: those of its rule, but for the last ones where all of
    them do not divide its size."""
    axes = _axes_of(name, rules, mesh)
    while size % _count(axes, mesh):
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
        if size % _count(axes, mesh):
            fits, rule = _entry(fitting_axes(name, size, rules, mesh)), f"{part}_{name}"
            raise ValueError(
                f"{what}: its axis {name!r} of size {size} is not divisible by {_product(axes, mesh.shape)} devices; "
                f"change the size, the mesh, or the sharding rule of {(rule if rule in known else name)!r} to {fits!r}"
            )
    return _spec(names, parts, what)


def _spec(names, parts, what: str) -> PartitionSpec:
    for (name, axes), (other, taken) in itertools.combinations(zip(names, parts), 2):
        if twice := sorted(set(axes) & set(taken)):
            raise ValueError(
                f"{what}: its axes {name!r} and {other!r} are both spread over {', '.join(twice)}; "
                f"take {'it' if len(twice) == 1 else 'them'} out of one of the two sharding rules"
            )
    return PartitionSpec(*map(_entry, parts))


def _entry(axes: tuple[str, ...]):
    return axes if len(axes) > 1 else axes[0] if axes else None


def shard(x, names, rules: Rules):
    """Constrain an activation to the ambient mesh (`jax.set_mesh`); without a mesh it is returned as it is.

    A size that the mesh does not divide (one row of patches on two devices) is spread less: this is advice, not a
    weight.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not rules:
        return x
    parts = [fitting_axes(name, size, rules, mesh) for name, size in zip(names, x.shape)]
    return place(x, _spec(names, parts, f"an activation with axes {tuple(names)}"))


def place(x, spec: PartitionSpec):
    """Constrain an activation to a spec of the ambient mesh."""
    if all(kind == jax.sharding.AxisType.Explicit for kind in jax.sharding.get_abstract_mesh().axis_types):
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def join_rows(x, rules: Rules):
    """[B R ...] -> [B*R ...]: rows within batch rows, all in one line.

    Rows of batch rows that the `batch` axes of the mesh keep together stand together, by R first: where other axes
    spread R, each device has a piece of the line, and nothing moves.
    """
    return rearrange(x, "(group B) R ... -> (group R B) ...", group=_groups(len(x), rules))


def split_rows(x, count: int, rules: Rules):
    """[B*R ...] -> [B R ...]: the inverse of `join_rows` for `count` batch rows."""
    groups = _groups(count, rules)
    return rearrange(x, "(group R B) ... -> (group B) R ...", group=groups, B=count // groups)


def _groups(rows: int, rules: Rules) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return _count(fitting_axes("batch", rows, rules, mesh), mesh)


def shardings(boxed, mesh: Mesh, rules: Rules):
    """NamedSharding of every weight, for a tree of `Named` boxes as `model.init` or its `eval_shape` returns it.

    The first key of a path is the part of the model, which may have rules of its own.
    """

    def of(path, box):
        if not isinstance(box, Named):
            return NamedSharding(mesh, PartitionSpec())
        names = [str(getattr(key, "key", key)) for key in path]
        what = f"weight {'/'.join(names)}"
        return NamedSharding(mesh, partition_spec(box.names, rules, mesh, box.value.shape, what, names[0]))

    return jax.tree_util.tree_map_with_path(of, boxed, is_leaf=lambda leaf: isinstance(leaf, Named))
