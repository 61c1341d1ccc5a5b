"""The training state and its shardings."""

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
    """Everything that a training step changes."""

    step: jax.Array  # i32[] number of processed batches, including skipped ones
    params: Any  # parameters, including frozen ones, fp32
    opt_state: Any  # optimizer state of the trainable parameters
    bad: jax.Array  # i32[] number of consecutive non-finite steps up to now
    skipped: jax.Array  # i32[] total number of non-finite steps
    rewards: jax.Array  # f32[2] running mean and count of the rewards, in preference training


def new_state(tx: optax.GradientTransformation, params) -> TrainState:
    """Returns the initial state. Jit it with the shardings of the state, or all moments are placed on one device."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), zero, zero, jnp.zeros(2))


def abstract_state(config: ModelConfig, tx: optax.GradientTransformation) -> TrainState:
    """Returns shapes and dtypes of the state, without computing it."""
    return jax.eval_shape(lambda params: new_state(tx, params), abstract_params(config))


def state_shardings(config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, rules: Rules) -> TrainState:
    """Returns a NamedSharding per leaf. Moments are sharded like their parameters, other leaves are replicated."""
    params = shardings(abstract_boxed(config), mesh, rules)
    shapes = flatten(abstract_params(config))
    params_by_path = {path: (shapes[path].shape, sharding) for path, sharding in flatten(params).items()}
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding_of(path, leaf):
        """Returns the sharding of the parameter with this shape whose path ends the leaf's path, else replicated."""
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for start in range(len(names)):
            shape, sharding = params_by_path.get("/".join(names[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated

    opt_state = jax.tree_util.tree_map_with_path(sharding_of, abstract_state(config, tx).opt_state)
    return TrainState(replicated, params, opt_state, replicated, replicated, replicated)
