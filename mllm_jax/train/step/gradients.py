"""Gradients of a batch, accumulated over parts, with balance losses over all parts."""

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
    """Returns `gradients(state, frozen, batch, key)` -> (gradients of trained weights, means by name, Load or None).

    Args:
      freeze: patterns of frozen weights.
      pinned: shardings of the gradients, without which XLA replicates some.
      grad_accum_steps, balance: see `TrainContext`.
    """
    pin = lambda grads: jax.lax.with_sharding_constraint(grads, pinned)
    moe = config.decoder.moe
    choices_of_token = 0 if moe is None else moe.top_k * len(config.decoder.expert_layers)
    counts_first = moe is not None and balance.counts_first(grad_accum_steps)

    def add_part(state, frozen, batch_totals: Totals, total, part: Batch, key, batch_load: Load | None):
        """Returns total + (gradients of a part, its contributions to the means of the whole batch, its load).

        batch_load: load of the whole batch, if it was counted beforehand.
        """
        trainable, frozen_params = split(state.params, freeze)

        def loss(trainable):
            sums, routing = objective.sums(join(trainable, frozen_params), part, key, frozen, state.rewards)
            means = {name: value / batch_totals.weight for name, value in sums.items()}
            if routing is None:
                return means["loss"], (means, None)
            part_load = Load.of(routing)
            load = batch_load or (part_load if total is None else jax.tree.map(jnp.add, total[2], part_load))
            means["z"] = z_loss(routing, batch_totals)
            means["dropped"] = jnp.sum(routing.dropped) / (batch_totals.tokens * choices_of_token)
            total_loss = means["loss"] + balance.z_loss_weight * means["z"]
            if balance.loss != "none":
                means["balance"] = balance_loss(routing, part.segment, load, batch_totals, balance.loss)
                total_loss += balance.aux_loss_weight * means["balance"]
            return total_loss, (means, part_load)

        (_, (means, part_load)), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        new = (pin(grads), means, part_load)
        return new if total is None else jax.tree.map(jnp.add, total, new)

    def load_of(params, parts: Batch, keys) -> Load:
        """Returns the load of all parts, from forward passes that compute only the routing."""

        def add(load, part_and_key):
            part, key = part_and_key
            routing = VLM(config).apply({"params": params}, part, hidden=True, rngs=dropout(key)).routing
            return jax.tree.map(jnp.add, load, Load.of(routing)), None

        return jax.lax.scan(add, Load.zeros(config.decoder), (parts, keys))[0]

    def gradients(state, frozen, batch: Batch, key):
        """Returns (gradients, means, load) of a batch."""
        batch_totals = totals(batch, objective.weights(batch))
        add = partial(add_part, state, frozen, batch_totals)
        if grad_accum_steps == 1:
            return add(None, batch, key, None)
        parts, keys = _parts(batch, grad_accum_steps), None if key is None else jax.random.split(key, grad_accum_steps)
        batch_load = load_of(state.params, parts, keys) if counts_first else None
        shapes = jax.eval_shape(lambda part: add(None, *part, None), jax.tree.map(lambda x: x[0], (parts, keys)))
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        zeros = (pin(zeros[0]), *zeros[1:])
        return jax.lax.scan(lambda total, part: (add(total, *part, batch_load), None), zeros, (parts, keys))[0]

    return gradients


def _parts(batch: Batch, grad_accum_steps: int) -> Batch:
    """[B*A ...] -> [A B ...]: part a takes the rows a, a + A, ..., so that rows stay on their device."""
    rows = batch.tokens.shape[0]
    if rows % grad_accum_steps:
        raise ValueError(f"grad_accum_steps={grad_accum_steps}: must divide the {rows} rows of a batch.")
    return jax.tree.map(lambda x: rearrange(x, "(B A) ... -> A B ...", A=grad_accum_steps), batch)
