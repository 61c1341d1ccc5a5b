"""Reward models: a number for an answer, the larger the better (arXiv 2203.02155; with facts arXiv 2309.14525).

It is the value head's of the last token of a conversation that ends with the answer, or with the turn that asks for a
verdict and says the facts (see `mllm_jax.data.pipeline.reward`).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mllm_jax.common.settings import Config, NonNegative
from mllm_jax.model.vlm import VLM, ModelConfig
from mllm_jax.train.algorithms.preference import in_pairs
from mllm_jax.train.algorithms.supervised import dropout
from mllm_jax.train.losses.cross_entropy import sum_segments
from mllm_jax.types import Array, Batch, Routing

PROMPT = "Is this answer true of what is shown? Is it helpful, and short? These facts are known:\n{facts}"


@dataclass(frozen=True)
class RewardConfig(Config):
    """
    learn: whether the run trains a reward model, from pairs of a chosen and a rejected answer.
    centre: weight of the square of the sum of a pair's rewards, which holds them around zero (arXiv 2312.09244).
    prompt: what the user says after an answer; {facts} stands for the "facts" of a record. Empty = nothing is said, and
      the answer's own end is judged.
    """

    learn: bool = False
    centre: NonNegative = 0.001
    prompt: str = PROMPT


def pairwise_loss(reward, centre: float = 0.0) -> Array:
    """-log sigmoid(r_w - r_l) + centre * (r_w + r_l)^2, f32[...], of rewards f32[... 2].

    The chosen answer's comes first. The first term is equation 1 of arXiv 2203.02155, for two answers.
    """
    chosen, rejected = reward[..., 0], reward[..., 1]
    return -jax.nn.log_sigmoid(chosen - rejected) + centre * jnp.square(chosen + rejected)


def scores(config: ModelConfig, params, batch: Batch, key=None) -> tuple[Array, Routing | None]:
    """f32[B T], in column s - 1 the number of the last token of segment s, and what the routers did."""
    model = VLM(config)
    out = model.apply({"params": params}, batch, hidden=True, rngs=dropout(key))
    values = model.apply({"params": params}, out.hidden, method="values")
    following = jnp.pad(batch.segment[:, 1:], ((0, 0), (0, 1)))
    return sum_segments(jnp.where(batch.segment != following, values, 0.0), batch.segment), out.routing


@dataclass(frozen=True)
class RewardObjective:
    """What a step minimises, see `mllm_jax.train.algorithms.supervised`: pairs in segments 2k - 1 (chosen) and 2k of
    rows.

    Summed over pairs are loss, reward_chosen, reward_rejected, and accuracy: the chosen one has the larger reward.
    """

    config: ModelConfig
    reward: RewardConfig

    def weights(self, batch: Batch) -> Array:
        present = sum_segments(batch.segment > 0, batch.segment) > 0
        return jnp.all(in_pairs(present), axis=-1).astype(jnp.float32)

    def sums(self, params, batch: Batch, key, reference=None, rewards=None) -> tuple[dict[str, Array], Routing | None]:
        found, routing = scores(self.config, params, batch, key)
        reward, real = in_pairs(found), self.weights(batch) > 0
        total = lambda x: jnp.sum(jnp.where(real, x, 0))
        sums = dict(
            loss=total(pairwise_loss(reward, self.reward.centre)),
            reward_chosen=total(reward[..., 0]),
            reward_rejected=total(reward[..., 1]),
            accuracy=total(reward[..., 0] > reward[..., 1]),
        )
        return sums, routing

    def remembered(self, rewards, means: dict[str, Array], weight) -> Array:
        return rewards
