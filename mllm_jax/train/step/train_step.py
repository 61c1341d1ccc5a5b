"""One step of training and of evaluation: pure functions of state and batch, compiled once for any mix of examples."""

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
    """Returns a jitted `step(state, batch, frozen=None) -> (state, metrics)`; the state is donated.

    A step whose loss or gradient is not finite changes only the counters.

    Args:
      objective: the objective to minimize. `frozen` holds the models that it needs beside state and batch.
    Returns:
      metrics, f32 scalars: loss (the mean of the objective's sums) and its other means, weight (the divisor of the
      means), grad_norm (before clipping), learning_rate, finite (1 or 0), tokens, targets, patches, images (counts
      without padding). With experts also balance (L without its weight; absent without a loss), z, imbalance (the
      busiest expert's load over the mean), dropped (fraction of choices over the capacity).
    """
    return compiled_step(make_pure_step(context, objective), context)


def make_pure_step(context: TrainContext, objective: Objective) -> Callable:
    """The step of `make_train_step` as a pure function, for programs of several steps."""
    config, optim = context.model, context.optim
    pinned, _ = split(context.state_shardings.params, optim.freeze)
    gradients = make_gradients(config, objective, optim.freeze, pinned, context.grad_accum_steps, context.balance)

    def step(state, batch: Batch, frozen=None):
        key = jax.random.fold_in(jax.random.key(context.seed), state.step) if config.lora.drops else None
        grads, found, load = gradients(state, frozen, batch, key)
        weight = jnp.sum(objective.weights(batch))
        rewards = objective.remembered(state.rewards, found, weight)
        rate = context.balance.bias_update_rate
        adjust = lambda params: params if load is None else move_biases(params, load, config.decoder, rate)
        state, about = update(state, grads, found, context.tx, optim, adjust)
        state = state._replace(rewards=jnp.where(about["finite"], rewards, state.rewards))
        if load is not None:
            found["imbalance"] = imbalance(load)
        metrics = found | about | dict(weight=weight, **count(batch))
        return state, {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}

    return step


def compiled_step(step: Callable, context: TrainContext) -> Callable:
    """A pure `step(state, batch, frozen=None) -> (state, metrics)`, jitted for a mesh; the state is donated."""
    mesh = context.mesh

    def on_mesh(state, batch: Batch | DualBatch, frozen=None):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(state, batch, frozen)

    layout = (context.state_shardings, NamedSharding(mesh, PartitionSpec()))
    options = compiler_options(mesh.devices.flat[0].platform, context.async_gathers)
    return jax.jit(on_mesh, donate_argnums=0, out_shardings=layout, compiler_options=options)


def make_eval_step(config: ModelConfig, mesh: Mesh, *, loss_chunk: int = CHUNK) -> Callable:
    """Jitted `evaluate(params, batch) -> dict`: how well the model predicts each conversation, given the truth so far.

    Greedy decoding repeats a conversation's targets exactly if and only if none of them is wrong here.

    Returns:
      loss_sum, weight: f32[]; answered, wrong: i32[B T], in column s - 1 the number of targets, and of wrong ones, of
      segment s of the row (a row of T tokens has at most T). With experts also load: i32[Lm 3 E], how often each was
      chosen, by layer and MODALITIES.
    """

    def evaluate(params, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out, runtime = VLM(config).apply({"params": params}, batch, hidden=True), config.runtime
            about = (loss_chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
            loss, wrong = token_errors(out.hidden, head_table(params), batch.targets, batch.weight, *about)
            load = {} if out.routing is None else {"load": jnp.sum(out.routing.counts, axis=1)}
            return load | dict(
                loss_sum=loss,
                weight=jnp.sum(batch.weight),
                answered=sum_segments(batch.weight != 0, batch.segment),
                wrong=sum_segments(wrong, batch.segment),
            )

    return jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))
