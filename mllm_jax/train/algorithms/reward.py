"""Training of reward models on pairs of a chosen and a rejected answer (arXiv 2203.02155, 2309.14525).

The reward is the output of the value head at the last token of a conversation, which ends with the answer, or with a
turn that states the facts and asks for a verdict (see `mllm_jax.data.pipeline.reward`).
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from mllm_jax.data.pipeline.reward import RewardPairs
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.train.algorithms.base import Algorithm
from mllm_jax.train.evaluators.base import Evaluator
from mllm_jax.train.evaluators.reward import RewardEvaluator
from mllm_jax.train.losses.cross_entropy import sum_segments
from mllm_jax.train.losses.preference import in_pairs
from mllm_jax.train.losses.reward import RewardConfig, pairwise_loss
from mllm_jax.train.step.forward import scores
from mllm_jax.train.step.objective import Objective, Sums
from mllm_jax.types import Array, Batch


@dataclass(frozen=True)
class RewardObjective(Objective):
    """The pairwise loss of pairs in segments 2k - 1 (chosen) and 2k (rejected) of a row.

    Sums over pairs: loss, reward_chosen, reward_rejected, and accuracy (pairs whose chosen answer has the larger
    reward).
    """

    config: ModelConfig
    reward: RewardConfig

    def weights(self, batch: Batch) -> Array:
        present = sum_segments(batch.segment > 0, batch.segment) > 0
        return jnp.all(in_pairs(present), axis=-1).astype(jnp.float32)

    def sums(self, params, batch: Batch, key=None, frozen=None, rewards=None) -> Sums:
        segment_scores, routing = scores(self.config, params, batch, key)
        reward, real = in_pairs(segment_scores), self.weights(batch) > 0
        total = lambda x: jnp.sum(jnp.where(real, x, 0))
        sums = dict(
            loss=total(pairwise_loss(reward, self.reward.center)),
            reward_chosen=total(reward[..., 0]),
            reward_rejected=total(reward[..., 1]),
            accuracy=total(reward[..., 0] > reward[..., 1]),
        )
        return sums, routing


class Reward(Algorithm):
    """Trains a reward model, see `RewardConfig`."""

    def reading(self) -> RewardPairs:
        return RewardPairs(self.config.prompt)

    def objective(self) -> RewardObjective:
        return RewardObjective(self.run.model, self.config)

    def evaluator(self, mesh: Mesh, processor: Any, source: Any) -> Evaluator:
        return RewardEvaluator(self.run, processor, mesh, source)
