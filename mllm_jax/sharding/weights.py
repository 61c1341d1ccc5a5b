"""Weights with axis names, and the shardings of a tree of them."""

from typing import Any

import jax
from flax import linen as nn
from flax import struct
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.sharding.logical_axes import Rules, partition_spec


class Partitioned(struct.PyTreeNode, meta.AxisMetadata):
    """A weight with the names of its axes.

    Unlike Flax's `LogicallyPartitioned`, which fails on Explicit mesh axes, it applies no constraint on unboxing.

    matrix: (input axes, output axes) of an `Einsum`'s weight, counted from the end. None: not such a weight.
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
    """Returns an initializer whose result is `Partitioned` with these axis names and this `matrix`."""
    return lambda *args: Partitioned(init(*args), names, matrix)


def shardings(boxed, mesh: Mesh, rules: Rules):
    """Returns the NamedSharding of every weight in a tree of `Partitioned`, from `model.init` or its `eval_shape`.

    The first key of a path is the part of the model, which may have rules of its own.
    """

    def sharding(path, box):
        if not isinstance(box, Partitioned):
            return NamedSharding(mesh, PartitionSpec())
        names = [str(getattr(key, "key", key)) for key in path]
        what = f"weight {'/'.join(names)}"
        return NamedSharding(mesh, partition_spec(box.names, rules, mesh, box.value.shape, what, names[0]))

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, Partitioned))
