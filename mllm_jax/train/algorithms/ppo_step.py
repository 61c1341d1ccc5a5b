"""A PPO step: samples answers to a batch of prompts, then updates on minibatches of them, in one program.

The critic is a value head on the policy, not a second model as in LLaVA-RLHF: one pass serves both, and a run has one
state, which is saved, sharded and resumed like any other. The value loss has a small weight because it also trains the
shared layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mllm_jax.model.vlm import ModelConfig
from mllm_jax.sharding.activations import shard
from mllm_jax.train.algorithms.rollout import FrozenModels, experience
from mllm_jax.train.losses.cross_entropy import CHUNK
from mllm_jax.train.losses.ppo import PpoConfig, policy_loss, value_loss
from mllm_jax.train.step.batches import count
from mllm_jax.train.step.context import TrainContext
from mllm_jax.train.step.forward import log_probs_and_values
from mllm_jax.train.step.objective import Objective, Sums
from mllm_jax.train.step.train_step import compiled_step, make_pure_step
from mllm_jax.types import Array, Batch


@dataclass(frozen=True)
class PpoObjective(Objective):
    """The PPO loss of answers with their `Batch.experience`.

    Sums over answer tokens: loss, policy_loss, value_loss, clipped (tokens whose policy loss is clipped) and moved,
    (log p - log p_old)^2 / 2, an estimate of the KL divergence from the policy that sampled the answers.
    """

    config: ModelConfig
    ppo: PpoConfig
    chunk: int = CHUNK

    def weights(self, batch: Batch) -> Array:
        return batch.weight

    def sums(self, params, batch: Batch, key=None, frozen=None, rewards=None) -> Sums:
        old, ppo = batch.experience, self.ppo
        log_probs, values, routing = log_probs_and_values(self.config, params, batch, self.chunk)
        loss, clipped = policy_loss(log_probs, old.log_probs, old.advantages, ppo.cliprange)
        critic_loss = value_loss(values, old.values, old.returns, ppo.cliprange_value)
        total = lambda x: jnp.sum(jnp.where(batch.weight > 0, x, 0))
        sums = dict(
            loss=total(loss + ppo.vf_coef * critic_loss),
            policy_loss=total(loss),
            value_loss=total(critic_loss),
            clipped=total(clipped),
            moved=total(0.5 * jnp.square(log_probs - old.log_probs)),
        )
        return sums, routing


def make_ppo_step(context: TrainContext, ppo: PpoConfig, chunk: int = CHUNK) -> Callable:
    """Returns a jitted `step(state, prompts, judge) -> (state, metrics)`, which donates the state.

    Args:
      context: its model has a value head; `optim` and `grad_accum_steps` are those of one update. `seed` and the step
        number determine the answers and their minibatches.
    Returns:
      metrics, f32 scalars: means over updates of the metrics of `PpoObjective` and of grad_norm, the last
      learning_rate, finite (1 if all updates were, else 0), statistics of the answers from `experience`, and counts of
      the rows with answers.
    """
    config = context.model
    objective = PpoObjective(config, ppo, chunk)
    update = make_pure_step(context, objective)

    def step(state, prompts: Batch, judge: FrozenModels):
        sample_key, order_key = jax.random.split(jax.random.fold_in(jax.random.key(context.seed), state.step))
        answers, statistics = experience(config, ppo, state.params, judge, prompts, sample_key, chunk)
        step_number = state.step

        def update_on(state, rows):
            minibatch = jax.tree.map(
                lambda x: shard(x[rows], ("batch",) + (None,) * (x.ndim - 1), config.runtime.rules), answers
            )
            return update(state, minibatch)

        row_indices = minibatches(len(prompts.tokens), ppo, order_key)
        state, update_metrics = jax.lax.scan(
            update_on, state._replace(step=step_number * ppo.updates_per_step), row_indices
        )
        metrics = {name: jnp.mean(values) for name, values in update_metrics.items()}
        metrics |= {
            "learning_rate": update_metrics["learning_rate"][-1],
            "finite": jnp.min(update_metrics["finite"]),
        } | statistics
        metrics |= count(answers) | {"weight": jnp.sum(objective.weights(answers))}
        return state._replace(step=step_number + 1), {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}

    return compiled_step(step, context)


def minibatches(rows: int, ppo: PpoConfig, key) -> Array:
    """Returns i32[updates rows/num_mini_batches] row indices, a new permutation in every epoch."""
    orders = [jax.random.permutation(epoch_key, rows) for epoch_key in jax.random.split(key, ppo.epochs)]
    return jnp.reshape(jnp.stack(orders), (ppo.updates_per_step, rows // ppo.num_mini_batches))
