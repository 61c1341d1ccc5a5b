"""Constraints on activations inside a program, and rows of batch rows joined to one line."""

import jax
from einops import rearrange
from jax.sharding import PartitionSpec

from mllm_jax.sharding.logical_axes import Rules, axes_size, divisible_axes, spec_of_axes


def shard(x, names, rules: Rules):
    """Constrain an activation to the ambient mesh (`jax.set_mesh`); without a mesh it is returned as it is.

    A size that the mesh does not divide (one row of patches on two devices) is spread less: this is advice, not a
    weight.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not rules:
        return x
    parts = [divisible_axes(name, size, rules, mesh) for name, size in zip(names, x.shape)]
    return constrain(x, spec_of_axes(names, parts, f"an activation with axes {tuple(names)}"))


def constrain(x, spec: PartitionSpec):
    """Constrain an activation to a spec of the ambient mesh."""
    if all(kind == jax.sharding.AxisType.Explicit for kind in jax.sharding.get_abstract_mesh().axis_types):
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def fold_rows(x, rules: Rules):
    """[B R ...] -> [B*R ...]: rows within batch rows, all in one line.

    Rows of batch rows that the `batch` axes of the mesh keep together stand together, by R first: where other axes
    spread R, each device has a piece of the line, and nothing moves.
    """
    return rearrange(x, "(group B) R ... -> (group R B) ...", group=_groups(len(x), rules))


def unfold_rows(x, count: int, rules: Rules):
    """[B*R ...] -> [B R ...]: the inverse of `fold_rows` for `count` batch rows."""
    groups = _groups(count, rules)
    return rearrange(x, "(group R B) ... -> (group B) R ...", group=groups, B=count // groups)


def _groups(rows: int, rules: Rules) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return axes_size(divisible_axes("batch", rows, rules, mesh), mesh)
