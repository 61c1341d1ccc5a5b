"""All that a training run changes, and where it lives on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.common.trees import flatten
from mllm_jax.model.vlm import ModelConfig, abstract_boxed, abstract_params
from mllm_jax.sharding.logical_axes import Rules
from mllm_jax.sharding.weights import shardings


class TrainState(NamedTuple):
    step: jax.Array  # i32[] number of batches, including skipped ones
    params: Any  # fp32, frozen ones included
    opt_state: Any  # of the trainable parameters
    bad: jax.Array  # i32[] non-finite steps in a row, up to now
    skipped: jax.Array  # i32[] non-finite steps in all
    rewards: jax.Array  # f32[2] mean of the rewards of all answers so far, and how many: of runs on pairs of answers


def new_state(tx: optax.GradientTransformation, params) -> TrainState:
    """The state before the first step. Pure: jit it with the shardings of the state, or moments land on one device."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), zero, zero, jnp.zeros(2))


def abstract_state(config: ModelConfig, tx: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the state, without computing anything."""
    return jax.eval_shape(lambda params: new_state(tx, params), abstract_params(config))


def state_shardings(config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, rules: Rules) -> TrainState:
    """NamedSharding of every leaf: moments are sharded as their parameters, all else is replicated."""
    params = shardings(abstract_boxed(config), mesh, rules)
    shapes = flatten(abstract_params(config))
    known = {path: (shapes[path].shape, sharding) for path, sharding in flatten(params).items()}
    replicated = NamedSharding(mesh, PartitionSpec())

    def of(path, leaf):
        """A moment ends in the path of its parameter; what is factored or counted has another shape."""
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for start in range(len(names)):
            shape, sharding = known.get("/".join(names[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated

    opt_state = jax.tree_util.tree_map_with_path(of, abstract_state(config, tx).opt_state)
    return TrainState(replicated, params, opt_state, replicated, replicated, replicated)
