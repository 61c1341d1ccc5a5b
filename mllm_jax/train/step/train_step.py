"""Training and evaluation steps: pure functions of state and batch, compiled once for all batches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.model.vlm import VLM, ModelConfig, head_table
from mllm_jax.train.losses.cross_entropy import CHUNK, sum_segments, token_errors
from mllm_jax.train.losses.load_balance import imbalance, move_biases
from mllm_jax.train.step.batches import count
from mllm_jax.train.step.compiler import compiler_options
from mllm_jax.train.step.context import TrainContext
from mllm_jax.train.step.gradients import make_gradients
from mllm_jax.train.step.objective import Objective
from mllm_jax.train.step.optimizer import split
from mllm_jax.train.step.update import update
from mllm_jax.types import Batch, DualBatch


def make_train_step(context: TrainContext, objective: Objective) -> Callable:
    """Returns a jitted `step(state, batch, frozen=None) -> (state, metrics)`, which donates the state.

    A step with a non-finite loss or gradient changes only the counters.

    Args:
      objective: the objective to minimize. `frozen` holds its frozen models.
    Returns:
      metrics, f32 scalars: loss and the other means of the objective, weight (divisor of the means), grad_norm (before
      clipping), learning_rate, finite (1 or 0), tokens, targets, patches, images (counts without padding). With
      experts also balance (L without its weight; absent without a loss), z, imbalance (the busiest expert's load over
      the mean), dropped (fraction of choices over the capacity).
    """
    return compiled_step(make_pure_step(context, objective), context)


def make_pure_step(context: TrainContext, objective: Objective) -> Callable:
    """Returns the step of `make_train_step` as a pure function, for programs of several steps."""
    config, optim = context.model, context.optim
    grad_shardings, _ = split(context.state_shardings.params, optim.freeze)
    gradients = make_gradients(
        config, objective, optim.freeze, grad_shardings, context.grad_accum_steps, context.balance
    )

    def step(state, batch: Batch, frozen=None):
        key = jax.random.fold_in(jax.random.key(context.seed), state.step) if config.lora.drops else None
        grads, means, load = gradients(state, frozen, batch, key)
        weight = jnp.sum(objective.weights(batch))
        rewards = objective.remembered(state.rewards, means, weight)
        bias_update_rate = context.balance.bias_update_rate
        update_biases = lambda params: (
            params if load is None else move_biases(params, load, config.decoder, bias_update_rate)
        )
        state, update_metrics = update(state, grads, means, context.tx, optim, update_biases)
        state = state._replace(rewards=jnp.where(update_metrics["finite"], rewards, state.rewards))
        if load is not None:
            means["imbalance"] = imbalance(load)
        metrics = means | update_metrics | dict(weight=weight, **count(batch))
        return state, {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}

    return step


def compiled_step(step: Callable, context: TrainContext) -> Callable:
    """Jits a pure `step(state, batch, frozen=None) -> (state, metrics)` for a mesh. It donates the state."""
    mesh = context.mesh

    def on_mesh(state, batch: Batch | DualBatch, frozen=None):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(state, batch, frozen)

    out_shardings = (context.state_shardings, NamedSharding(mesh, PartitionSpec()))
    options = compiler_options(mesh.devices.flat[0].platform, context.async_gathers)
    return jax.jit(on_mesh, donate_argnums=0, out_shardings=out_shardings, compiler_options=options)


def make_eval_step(config: ModelConfig, mesh: Mesh, *, loss_chunk: int = CHUNK) -> Callable:
    """Returns a jitted `evaluate(params, batch) -> dict`, which measures predictions with teacher forcing.

    Greedy decoding reproduces the targets of a conversation if and only if none of them is wrong here.

    Returns:
      loss_sum, weight: f32[]. answered, wrong: i32[B T], number of targets, and of wrong predictions, of segment s in
      column s - 1. With experts also load: i32[Lm 3 E], choices per layer, modality (MODALITIES) and expert.
    """

    def evaluate(params, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, runtime = VLM(config).apply({"params": params}, batch, hidden=True), config.runtime
            options = (loss_chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
            loss, wrong = token_errors(out.hidden, head_table(params), batch.targets, batch.weight, *options)
            load = {} if out.routing is None else {"load": jnp.sum(out.routing.counts, axis=1)}
            return load | dict(
                loss_sum=loss,
                weight=jnp.sum(batch.weight),
                answered=sum_segments(batch.weight != 0, batch.segment),
                wrong=sum_segments(wrong, batch.segment),
            )

    return jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))
