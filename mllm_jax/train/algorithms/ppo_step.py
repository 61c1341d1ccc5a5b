"""A step of PPO: answers to a batch of prompts, then updates on parts of them, as one program.

The critic is a head on the model that is trained, and not a second model as in LLaVA-RLHF: both read the same images
and tokens, so that one pass serves both, and a run has one state, which is saved, spread and resumed like any other.
Its loss has a small weight, since it moves the layers that they share.
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
    """The loss of answers with their `Batch.experience`.

    Summed over the tokens of answers are loss, policy_loss, value_loss, clipped (the policy's is), and moved: half the
    square of log p - log p_before, which is about the KL divergence from the model that gave the answers.
    """

    config: ModelConfig
    ppo: PpoConfig
    chunk: int = CHUNK

    def weights(self, batch: Batch) -> Array:
        return batch.weight

    def sums(self, params, batch: Batch, key=None, frozen=None, rewards=None) -> Sums:
        before, ppo = batch.experience, self.ppo
        log_probs, values, routing = log_probs_and_values(self.config, params, batch, self.chunk)
        policy, clipped = policy_loss(log_probs, before.log_probs, before.advantages, ppo.cliprange)
        value = value_loss(values, before.values, before.returns, ppo.cliprange_value)
        total = lambda x: jnp.sum(jnp.where(batch.weight > 0, x, 0))
        sums = dict(
            loss=total(policy + ppo.vf_coef * value),
            policy_loss=total(policy),
            value_loss=total(value),
            clipped=total(clipped),
            moved=total(0.5 * jnp.square(log_probs - before.log_probs)),
        )
        return sums, routing


def make_ppo_step(context: TrainContext, ppo: PpoConfig, chunk: int = CHUNK) -> Callable:
    """Returns a jitted `step(state, prompts, judge) -> (state, metrics)`; the state is donated. A call is one step.

    Args:
      context: its model has a value head; `optim` counts updates; `grad_accum_steps` is of an update. `seed` and the
        number of the step determine the answers and their minibatches.
    Returns:
      metrics, f32 scalars: means over updates of the sums of `PpoObjective` and of grad_norm, the last learning_rate,
      finite (1 or 0: all updates were), statistics of the answers from `experience`, and counts of the rows with
      answers.
    """
    config = context.model
    objective = PpoObjective(config, ppo, chunk)
    update = make_pure_step(context, objective)

    def step(state, prompts: Batch, judge: FrozenModels):
        draw, order = jax.random.split(jax.random.fold_in(jax.random.key(context.seed), state.step))
        answers, about = experience(config, ppo, state.params, judge, prompts, draw, chunk)
        began = state.step

        def learn(state, rows):
            part = jax.tree.map(
                lambda x: shard(x[rows], ("batch",) + (None,) * (x.ndim - 1), config.runtime.rules), answers
            )
            return update(state, part)

        parts = minibatches(len(prompts.tokens), ppo, order)
        state, found = jax.lax.scan(learn, state._replace(step=began * ppo.updates_per_step), parts)
        metrics = {name: jnp.mean(values) for name, values in found.items()}
        metrics |= {"learning_rate": found["learning_rate"][-1], "finite": jnp.min(found["finite"])} | about
        metrics |= count(answers) | {"weight": jnp.sum(objective.weights(answers))}
        return state._replace(step=began + 1), {name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()}

    return compiled_step(step, context)


def minibatches(rows: int, ppo: PpoConfig, key) -> Array:
    """i32[updates rows/minibatches] indices of rows: a new permutation in every epoch."""
    orders = [jax.random.permutation(each, rows) for each in jax.random.split(key, ppo.epochs)]
    return jnp.reshape(jnp.stack(orders), (ppo.updates_per_step, rows // ppo.num_mini_batches))
