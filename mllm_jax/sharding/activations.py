"""Sharding constraints on activations, and folding of inner rows into the batch axis."""

import jax
from einops import rearrange
from jax.sharding import PartitionSpec

from mllm_jax.sharding.logical_axes import Rules, axes_size, divisible_axes, spec_of_axes


def shard(x, names, rules: Rules):
    """Constrains an activation to the ambient mesh (`jax.set_mesh`); returns it unchanged without a mesh.

    An axis whose size its mesh axes do not divide (one row of patches on two devices) is sharded over fewer of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not rules:
        return x
    parts = [divisible_axes(name, size, rules, mesh) for name, size in zip(names, x.shape)]
    return constrain(x, spec_of_axes(names, parts, f"an activation with axes {tuple(names)}"))


def constrain(x, spec: PartitionSpec):
    """Constrains an activation to a spec of the ambient mesh."""
    if all(kind == jax.sharding.AxisType.Explicit for kind in jax.sharding.get_abstract_mesh().axis_types):
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def fold_rows(x, rules: Rules):
    """Folds the inner rows R of [B R ...] into the batch axis: [B*R ...].

    Rows that share a shard of the mesh's `batch` axes stay together, ordered by R first. If other mesh axes shard R,
    no data moves between devices. Example: B = 4 rows a b c d in two shards with R = 2 become a0 b0 a1 b1 c0 d0 c1 d1.
    """
    return rearrange(x, "(group B) R ... -> (group R B) ...", group=_groups(len(x), rules))


def unfold_rows(x, count: int, rules: Rules):
    """Inverts `fold_rows` for `count` batch rows: [B*R ...] -> [B R ...]."""
    groups = _groups(count, rules)
    return rearrange(x, "(group R B) ... -> (group B) R ...", group=groups, B=count // groups)


def _groups(rows: int, rules: Rules) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return axes_size(divisible_axes("batch", rows, rules, mesh), mesh)
