"""Gradients of a whole batch, accumulated over parts, with balance losses of all parts together."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.common.trees import join
from mllm_jax.model.vlm import VLM, ModelConfig
from mllm_jax.train.losses.load_balance import BalanceConfig, Load, Totals, balance_loss, totals, z_loss
from mllm_jax.train.step.forward import dropout
from mllm_jax.train.step.objective import Objective
from mllm_jax.train.step.optimizer import split
from mllm_jax.types import Batch


def make_gradients(
    config: ModelConfig,
    objective: Objective,
    freeze: tuple[str, ...],
    pinned: Any,
    grad_accum_steps: int,
    balance: BalanceConfig,
) -> Callable:
    """`gradients(state, frozen, batch, key)` -> (gradients of trained weights, means by name, Load or None).

    Args:
      grad_accum_steps, balance: see `TrainContext`.
      freeze: patterns of frozen weights. pinned: shardings of the gradients; without them XLA replicates some.
    """
    pin = lambda grads: jax.lax.with_sharding_constraint(grads, pinned)
    moe = config.decoder.moe
    choices_of_token = 0 if moe is None else moe.top_k * len(config.decoder.expert_layers)
    ahead = moe is not None and balance.counts_first(grad_accum_steps)

    def add_part(state, frozen, whole: Totals, total, part: Batch, key, known: Load | None):
        """total + (gradients, contributions of a part to the means of the whole batch, its load).

        known: the load of the whole batch, if it was counted beforehand.
        """
        trainable, fixed = split(state.params, freeze)

        def loss(trainable):
            sums, routing = objective.sums(join(trainable, fixed), part, key, frozen, state.rewards)
            found = {name: value / whole.weight for name, value in sums.items()}
            if routing is None:
                return found["loss"], (found, None)
            own = Load.of(routing)
            load = known or (own if total is None else jax.tree.map(jnp.add, total[2], own))
            found["z"] = z_loss(routing, whole)
            found["dropped"] = jnp.sum(routing.dropped) / (whole.tokens * choices_of_token)
            value = found["loss"] + balance.z_loss_weight * found["z"]
            if balance.loss != "none":
                found["balance"] = balance_loss(routing, part.segment, load, whole, balance.loss)
                value += balance.aux_loss_weight * found["balance"]
            return value, (found, own)

        (_, (found, own)), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        new = (pin(grads), found, own)
        return new if total is None else jax.tree.map(jnp.add, total, new)

    def load_of(params, parts: Batch, keys) -> Load:
        """The load of all parts, by forward passes that compute only the routing."""

        def add(load, part_and_key):
            part, key = part_and_key
            routing = VLM(config).apply({"params": params}, part, hidden=True, rngs=dropout(key)).routing
            return jax.tree.map(jnp.add, load, Load.of(routing)), None

        return jax.lax.scan(add, Load.zeros(config.decoder), (parts, keys))[0]

    def gradients(state, frozen, batch: Batch, key):
        """(gradients, means, load) of a batch."""
        whole = totals(batch, objective.weights(batch))
        add = partial(add_part, state, frozen, whole)
        if grad_accum_steps == 1:
            return add(None, batch, key, None)
        parts, keys = _parts(batch, grad_accum_steps), None if key is None else jax.random.split(key, grad_accum_steps)
        known = load_of(state.params, parts, keys) if ahead else None
        shapes = jax.eval_shape(lambda part: add(None, *part, None), jax.tree.map(lambda x: x[0], (parts, keys)))
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        zeros = (pin(zeros[0]), *zeros[1:])
        return jax.lax.scan(lambda total, part: (add(total, *part, known), None), zeros, (parts, keys))[0]

    return gradients


def _parts(batch: Batch, grad_accum_steps: int) -> Batch:
    """[B*A ...] -> [A B ...], every A-th row: each device's rows stay on it."""
    rows = batch.tokens.shape[0]
    if rows % grad_accum_steps:
        raise ValueError(f"a batch of {rows} rows does not split into grad_accum_steps={grad_accum_steps} parts")
    return jax.tree.map(lambda x: rearrange(x, "(B A) ... -> A B ...", A=grad_accum_steps), batch)
