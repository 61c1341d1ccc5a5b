"""Pairwise loss of reward models, which score an answer with a number (arXiv 2203.02155)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mllm_jax.common.settings import NonNegative
from mllm_jax.train.losses.algorithm_config import AlgorithmConfig
from mllm_jax.types import Array

PROMPT = "Is this answer true of what is shown? Is it helpful, and short? These facts are known:\n{facts}"


@dataclass(frozen=True)
class RewardConfig(AlgorithmConfig):
    """Trains a reward model on pairs of a chosen and a rejected answer.

    center: weight of the squared sum of a pair's rewards, which keeps them near zero (arXiv 2312.09244).
    prompt: user turn after an answer, with {facts} for the "facts" of a record. "": no turn; the reward is read at the
      end of the answer.
    """

    center: NonNegative = 0.001
    prompt: str = PROMPT

    value_head: ClassVar[bool] = True


def pairwise_loss(reward, center: float = 0.0) -> Array:
    """Returns -log sigmoid(r_w - r_l) + center * (r_w + r_l)^2, f32[...].

    The first term is equation 1 of arXiv 2203.02155 for two answers.

    Args:
      reward: f32[... 2] rewards [chosen, rejected].
    """
    chosen, rejected = reward[..., 0], reward[..., 1]
    return -jax.nn.log_sigmoid(chosen - rejected) + center * jnp.square(chosen + rejected)
