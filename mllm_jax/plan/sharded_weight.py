"""Computes the sharding of a run's weights on a mesh, and the axes over which a weight is all-gathered before use."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from flax.core import meta
from jax.sharding import AbstractMesh

from mllm_jax.common.trees import flatten
from mllm_jax.model.vlm import abstract_boxed, abstract_params, in_full
from mllm_jax.sharding.logical_axes import Rules, partition_spec
from mllm_jax.sharding.mesh import MESH_AXES
from mllm_jax.train.runs.config import Run
from mllm_jax.train.step.optimizer import make_optimizer, split
from mllm_jax.train.step.state import new_state

STACKED = ("layers", "deepstack_layers")  # axes that stack the weights of successive layers
VOCABULARY = ("decoder/head/w", "decoder/embed")


class Weight(NamedTuple):
    """A weight of the model, without a mesh."""

    path: str
    names: tuple[str | None, ...]
    shape: tuple[int, ...]
    moments: float  # optimizer state, bytes per value
    trained: bool
    kept: float = 4.0  # stored parameter, bytes per value

    @property
    def part(self) -> str:
        return self.path.split("/")[0]

    @property
    def repeats(self) -> int:
        """Number of layers that are stacked in the weight."""
        return math.prod(size for name, size in zip(self.names, self.shape) if name in STACKED)

    @property
    def is_matrix(self) -> bool:
        """True for the weight of a matrix product other than the head."""
        return self.path.endswith("/w") and self.path not in VOCABULARY

    @property
    def of_experts(self) -> bool:
        return "expert" in self.names

    @property
    def block(self) -> str:
        """Path of the attention or feed-forward block that contains the weight."""
        return self.path.rsplit("/", 2)[0]

    def product(self) -> tuple[list[int], list[int]]:
        """Returns (contracted dimensions, output dimensions) of the matrix product with this weight."""
        inner = [n for n, name in enumerate(self.names) if name not in (*STACKED, "expert")]
        named = [n for n in inner if self.names[n] is not None]
        reads = named[:-1] if is_width(self.names[named[-1]]) else named[:1]
        return reads, [n for n in inner if n not in reads]


class ShardedWeight(NamedTuple):
    """A weight on a mesh."""

    weight: Weight
    axes: tuple[tuple[str, ...], ...]  # mesh axes larger than 1 that shard each dimension
    gathered: tuple[str, ...]  # axes among these over which it is all-gathered before use
    sizes: tuple[int, ...]  # shape of a device's stored shard
    used: tuple[int, ...]  # shape of a device's shard after the all-gather

    @property
    def values(self) -> int:
        return math.prod(self.sizes)

    @property
    def split(self) -> tuple[str, ...]:
        return tuple(axis for axes in self.axes for axis in axes)

    def kept(self, dimensions) -> tuple[str, ...]:
        """Returns the axes that shard these dimensions while the weight is used."""
        return tuple(axis for n in dimensions for axis in self.axes[n] if axis not in self.gathered)

    def sizes_of(self, dimensions) -> int:
        """Returns the number of values per row that an activation has along these dimensions on a device."""
        return math.prod(self.used[n] for n in dimensions)

    @property
    def layer(self) -> int:
        """Number of values of one layer's weight on a device while it is used."""
        return math.prod(self.used) // self.weight.repeats

    @property
    def met(self) -> float:
        """Number of values of one layer's weight that a row multiplies: for experts, the values of one expert."""
        return self.layer / (self.used[self.weight.names.index("expert")] if self.weight.of_experts else 1)


def read_weights(run: Run) -> tuple[Weight, ...]:
    """Returns all weights of a run's model. Raises ValueError if a pattern of the optimizer matches no weight."""
    tree, stored = abstract_boxed(in_full(run.model)), flatten(abstract_params(run.model))
    boxed = flatten(tree)
    params = meta.unbox(tree)
    tx, _ = make_optimizer(run.optim, params)
    trained = set(flatten(split(params, run.optim.freeze)[0]))
    moments = dict.fromkeys(boxed, 0.0)
    state = jax.eval_shape(lambda params: new_state(tx, params), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        # The path of a moment ends with the path of its weight, and the shapes are equal.
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        ends = ("/".join(names[start:]) for start in range(len(names)))
        owner = next((end for end in ends if end in boxed and boxed[end].value.shape == leaf.shape), None)
        if owner:
            moments[owner] += leaf.dtype.itemsize
    # A quantized weight is stored as several arrays, whose paths begin with the weight's path.
    arrays = {path: [x for name, x in stored.items() if name == path or name.startswith(f"{path}_")] for path in boxed}
    kept = {path: sum(x.size * x.dtype.itemsize for x in arrays[path]) / boxed[path].value.size for path in boxed}
    return tuple(
        Weight(path, box.names, box.value.shape, moments[path], path in trained, kept[path])
        for path, box in boxed.items()
    )


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Returns a mesh without devices. Missing axes get size 1."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def lay(weight: Weight, rules: Rules, mesh: AbstractMesh, rows: tuple[str, ...], known: Mapping) -> ShardedWeight:
    """Returns a weight sharded by rules.

    A weight is all-gathered over axes that shard its width or the rows that it multiplies. Experts are not: tokens are
    sent to them instead.

    Args:
      rows: mesh axes that shard the rows that the weight multiplies.
      known: {axis name: mesh axes that shard it}.
    Raises:
      ValueError: the mesh does not divide the weight.
    """
    axes = tuple(known[name] for name in weight.names)
    size = lambda split: math.prod(mesh.shape[axis] for axis in split)
    if any(whole % size(split) for whole, split in zip(weight.shape, axes)):
        partition_spec(weight.names, rules, mesh, weight.shape, f"weight {weight.path}")  # raises an error with a fix
    is_gathered = lambda name, axis: name != "expert" and (is_width(name) or axis in rows)
    gathered = tuple(axis for name, split in zip(weight.names, axes) for axis in split if is_gathered(name, axis))
    kept = [[axis for axis in split if axis not in gathered] for split in axes]
    shard = lambda axes: tuple(whole // size(split) for whole, split in zip(weight.shape, axes))
    return ShardedWeight(weight, axes, gathered, shard(axes), shard(kept))


def is_width(name: str | None) -> bool:
    """Returns whether an axis name is the width of a tower, which is never sharded while a weight is used."""
    return name is not None and name.endswith("embed")
