"""Formulas of PPO (arXiv 1707.06347) on answers with rewards of a reward model (arXiv 2203.02155, 2309.14525).

Arrays are f32[B T]; `real` bool[B T] marks the tokens of answers, which are contiguous in a row.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp

from mllm_jax.common.config import ConfigError
from mllm_jax.common.settings import Finite, Fraction, NonNegative, OneOf, Positive, PositiveInt, Range
from mllm_jax.train.losses.algorithm_config import BASE, FIRST, AlgorithmConfig, check_reference
from mllm_jax.types import Array


@dataclass(frozen=True)
class PpoConfig(AlgorithmConfig):
    """Trains on the model's own answers with rewards of a reward model.

    Defaults are those of LLaVA-RLHF unless noted.

    reward_model: folder of a run that trained a reward model (`RewardConfig`), or name of such a stage.
    response_length: largest number of tokens of an answer.
    epochs, num_mini_batches: passes over the answers to a batch, and parts of each pass; every part is an update.
    kl_coef: penalty per unit of log p(token) - log p_reference(token).
    reference: "first", a frozen copy of the weights that the run begins with, or "base", the model without adapters.
    cliprange: largest relative change of a token's probability with a gradient; cliprange_value: the same of values.
    vf_coef: weight of the critic's loss.
    gamma, gae_lambda: discount, and lambda of generalized advantage estimation.
    missing_eos_penalty: added to the reward of an answer that does not end within `response_length`.
    length_bonus: added to the reward of an answer of `response_length`, and in proportion to shorter ones. Default 0 is
      ours; LLaVA-RLHF has -10, for the scale of its rewards.
    """

    reward_model: str = ""
    response_length: PositiveInt = 64
    epochs: PositiveInt = 2
    num_mini_batches: PositiveInt = 2
    kl_coef: NonNegative = 0.1
    reference: Annotated[str, OneOf((FIRST, BASE))] = FIRST
    cliprange: Annotated[float, Range(above=0, below=1)] = 0.2
    cliprange_value: Positive = 0.2
    vf_coef: NonNegative = 0.1
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 1.0
    missing_eos_penalty: Finite = -8.0
    length_bonus: Finite = 0.0

    value_head: ClassVar[bool] = True
    runs: ClassVar[tuple[str, ...]] = ("reward_model",)

    @property
    def updates_per_step(self) -> int:
        return self.epochs * self.num_mini_batches

    def check(self, run: Any, path: str) -> None:
        if not self.reward_model:
            raise ConfigError(
                f"{path}.algorithm.reward_model is empty. Set it to the folder of a run that trained a reward model, "
                "or to "
                "the name of such a stage"
            )
        if run.data.batch % (self.num_mini_batches * run.train.grad_accum_steps):
            raise ConfigError(
                f"{path}.algorithm.num_mini_batches={self.num_mini_batches} times "
                f"{path}.train.grad_accum_steps={run.train.grad_accum_steps} "
                f"must divide {path}.data.batch={run.data.batch}"
            )
        if run.lora.drops:
            raise ConfigError(f"{path}.lora.dropout must be 0 for PPO, which compares a model with what it was before")
        check_reference(self.reference, run.lora, path)


def token_rewards(score, log_probs, reference, real, kl_coef: float) -> Array:
    """-kl_coef (log p - log p_reference) of every token, plus the score f32[B] of an answer at its last token."""
    last = real & ~jnp.pad(real[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(real, -kl_coef * (log_probs - reference), 0) + jnp.where(last, score[:, None], 0)


def advantages(rewards, values, real, gamma: float, gae_lambda: float) -> Array:
    """Generalized advantage estimation, arXiv 1506.02438, equation 16: sum_k (gamma lam)^k delta_(t+k).

    delta_t = r_t + gamma v_(t+1) - v_t; behind an answer's last token nothing is expected any more.
    """
    values = jnp.where(real, values, 0)
    delta = jnp.where(real, rewards + gamma * jnp.pad(values[:, 1:], ((0, 0), (0, 1))) - values, 0)

    def earlier(later, now):
        return (now + gamma * gae_lambda * later,) * 2

    return jnp.where(real, jax.lax.scan(earlier, jnp.zeros(len(delta)), delta.T, reverse=True)[1].T, 0)


def whitened(x, real, eps: float = 1e-8) -> Array:
    """(x - mean) / deviation over all that is real; 0 elsewhere."""
    count = jnp.maximum(jnp.sum(real), 1)
    mean = jnp.sum(jnp.where(real, x, 0)) / count
    variance = jnp.sum(jnp.where(real, jnp.square(x - mean), 0)) / count
    return jnp.where(real, (x - mean) * jax.lax.rsqrt(variance + eps), 0)


def policy_loss(log_probs, before, advantage, cliprange: float) -> tuple[Array, Array]:
    """-min(ratio A, clip(ratio, 1 - c, 1 + c) A), f32[...], and whether it is clipped, bool[...].

    arXiv 1707.06347, equation 7. ratio: p / p_before of a token. Where it has gone further than `cliprange`, the way A
    wants it, there is no gradient.
    """
    ratio = jnp.exp(log_probs - before)
    free, bounded = -ratio * advantage, -jnp.clip(ratio, 1 - cliprange, 1 + cliprange) * advantage
    return jnp.maximum(free, bounded), bounded > free


def value_loss(values, before, returns, cliprange_value: float) -> Array:
    """Half the larger square error of the value and of the value within `cliprange_value` of what it was before,
    f32[...]."""
    bounded = jnp.clip(values, before - cliprange_value, before + cliprange_value)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(bounded - returns))
