"""Sharding of a run's weights on a mesh: the axes that shard each dimension, and those gathered before use."""

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

STACKED = ("layers", "deepstack_layers")  # axes over weights that are used one after the other
VOCABULARY = ("decoder/head/w", "decoder/embed")


class Weight(NamedTuple):
    path: str
    names: tuple[str | None, ...]
    shape: tuple[int, ...]
    moments: float  # bytes of the optimizer for each value
    trained: bool
    kept: float = 4.0  # bytes of each stored value

    @property
    def part(self) -> str:
        return self.path.split("/")[0]

    @property
    def repeats(self) -> int:
        """Layers that it is stacked over."""
        return math.prod(size for name, size in zip(self.names, self.shape) if name in STACKED)

    @property
    def is_matrix(self) -> bool:
        """True for the weight of a matrix product before the head."""
        return self.path.endswith("/w") and self.path not in VOCABULARY

    @property
    def of_experts(self) -> bool:
        return "expert" in self.names

    @property
    def block(self) -> str:
        """The path of the attention or feed-forward block that it belongs to."""
        return self.path.rsplit("/", 2)[0]

    def product(self) -> tuple[list[int], list[int]]:
        """The dimensions that a matrix product reads from an activation, and those that it writes."""
        inner = [n for n, name in enumerate(self.names) if name not in (*STACKED, "expert")]
        named = [n for n in inner if self.names[n] is not None]
        reads = named[:-1] if is_width(self.names[named[-1]]) else named[:1]
        return reads, [n for n in inner if n not in reads]


class ShardedWeight(NamedTuple):
    """A weight on a mesh."""

    weight: Weight
    axes: tuple[tuple[str, ...], ...]  # of the mesh, that split each dimension; without those of size 1
    gathered: tuple[str, ...]  # of these, over which it is gathered before it is used
    sizes: tuple[int, ...]  # of a device's shard, as stored
    used: tuple[int, ...]  # of a device's shard, once gathered

    @property
    def values(self) -> int:
        return math.prod(self.sizes)

    @property
    def split(self) -> tuple[str, ...]:
        return tuple(axis for axes in self.axes for axis in axes)

    def kept(self, dimensions) -> tuple[str, ...]:
        """The axes that split these dimensions while it is used."""
        return tuple(axis for n in dimensions for axis in self.axes[n] if axis not in self.gathered)

    def sizes_of(self, dimensions) -> int:
        """Values of an activation's row along these dimensions, on a device."""
        return math.prod(self.used[n] for n in dimensions)

    @property
    def layer(self) -> int:
        """Values of one layer's weight while it is used."""
        return math.prod(self.used) // self.weight.repeats

    @property
    def met(self) -> float:
        """Values of one layer's weight that a row meets: of experts, those of one."""
        return self.layer / (self.used[self.weight.names.index("expert")] if self.weight.of_experts else 1)


def read_weights(run: Run) -> tuple[Weight, ...]:
    """All weights of a run's model. Raises ValueError where the optimizer's patterns fit none."""
    tree, held = abstract_boxed(in_full(run.model)), flatten(abstract_params(run.model))
    boxed = flatten(tree)
    params = meta.unbox(tree)
    tx, _ = make_optimizer(run.optim, params)
    trained = set(flatten(split(params, run.optim.freeze)[0]))
    moments = dict.fromkeys(boxed, 0.0)
    state = jax.eval_shape(lambda params: new_state(tx, params), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        # A moment ends in the path of its weight and has its shape.
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        ends = ("/".join(names[start:]) for start in range(len(names)))
        owner = next((end for end in ends if end in boxed and boxed[end].value.shape == leaf.shape), None)
        if owner:
            moments[owner] += leaf.dtype.itemsize
    few = {path: [x for name, x in held.items() if name == path or name.startswith(f"{path}_")] for path in boxed}
    kept = {path: sum(x.size * x.dtype.itemsize for x in few[path]) / boxed[path].value.size for path in boxed}
    return tuple(
        Weight(path, box.names, box.value.shape, moments[path], path in trained, kept[path])
        for path, box in boxed.items()
    )


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices; absent axes have size 1."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def lay(weight: Weight, rules: Rules, mesh: AbstractMesh, rows: tuple[str, ...], known: Mapping) -> ShardedWeight:
    """Returns a weight as the rules shard it.

    Args:
      rows: axes that shard the activations of the weight. A weight sharded on one of these is gathered before use,
        except for experts, to which the rows are sent.
      known: axes that shard each logical axis.
    Raises:
      ValueError: the mesh does not divide it.
    """
    axes = tuple(known[name] for name in weight.names)
    size = lambda split: math.prod(mesh.shape[axis] for axis in split)
    if any(whole % size(split) for whole, split in zip(weight.shape, axes)):
        partition_spec(weight.names, rules, mesh, weight.shape, f"weight {weight.path}")  # raises with the fix
    apart = lambda name, axis: name != "expert" and (is_width(name) or axis in rows)
    gathered = tuple(axis for name, split in zip(weight.names, axes) for axis in split if apart(name, axis))
    kept = [[axis for axis in split if axis not in gathered] for split in axes]
    part = lambda axes: tuple(whole // size(split) for whole, split in zip(weight.shape, axes))
    return ShardedWeight(weight, axes, gathered, part(axes), part(kept))


def is_width(name: str | None) -> bool:
    """Returns whether a logical axis is the width of a tower, which is never sharded in a computation."""
    return name is not None and name.endswith("embed")
