"""Weights with the names of their axes, and the shardings of a tree of them."""

from typing import Any

import jax
from flax import linen as nn
from flax import struct
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.sharding.logical_axes import Rules, partition_spec


class Partitioned(struct.PyTreeNode, meta.AxisMetadata):
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


def partitioned(init, *names, matrix=None):
    """An initializer whose result carries the names of its axes, and what a matrix does with them (see
    `Partitioned`)."""
    return lambda *args: Partitioned(init(*args), names, matrix)


def shardings(boxed, mesh: Mesh, rules: Rules):
    """NamedSharding of every weight, for a tree of `Partitioned` boxes as `model.init` or its `eval_shape` returns it.

    The first key of a path is the part of the model, which may have its own rules.
    """

    def of(path, box):
        if not isinstance(box, Partitioned):
            return NamedSharding(mesh, PartitionSpec())
        names = [str(getattr(key, "key", key)) for key in path]
        what = f"weight {'/'.join(names)}"
        return NamedSharding(mesh, partition_spec(box.names, rules, mesh, box.value.shape, what, names[0]))

    return jax.tree_util.tree_map_with_path(of, boxed, is_leaf=lambda leaf: isinstance(leaf, Partitioned))
