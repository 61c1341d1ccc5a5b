"""Losses and advantages of PPO (arXiv 1707.06347) with rewards of a reward model (arXiv 2203.02155, 2309.14525).

Arrays are f32[B T]. `real`, bool[B T], marks the tokens of answers, which are contiguous in a row.
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
    """Trains on the model's own answers, with rewards of a reward model. Defaults are LLaVA-RLHF's unless noted.

    reward_model: folder of a run that trained a reward model (`RewardConfig`), or name of such a stage.
    response_length: maximum length of an answer, tokens.
    epochs, num_mini_batches: passes over the answers of a batch, and minibatches per pass. Each minibatch is an update.
    kl_coef: penalty per unit of log p - log p_reference of a token.
    reference: "first", a frozen copy of the initial weights, or "base", the model without its adapters.
    cliprange: bound on the relative change of a token's probability.
    cliprange_value: bound on the change of a value.
    vf_coef: weight of the value loss.
    gamma, gae_lambda: discount and lambda of generalized advantage estimation.
    missing_eos_penalty: added to the reward of answers that do not end within `response_length`.
    length_bonus: added to the reward, times the answer's length / `response_length`. LLaVA-RLHF: -10, for the scale of
      its rewards.
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
                "the name of such a stage."
            )
        if run.data.batch % (self.num_mini_batches * run.train.grad_accum_steps):
            raise ConfigError(
                f"{path}.algorithm.num_mini_batches={self.num_mini_batches} times "
                f"{path}.train.grad_accum_steps={run.train.grad_accum_steps} "
                f"must divide {path}.data.batch={run.data.batch}."
            )
        if run.lora.drops:
            raise ConfigError(f"{path}.lora.dropout={run.lora.dropout}: PPO has no dropout. Set it to 0.")
        check_reference(self.reference, run.lora, path)


def token_rewards(score, log_probs, reference, real, kl_coef: float) -> Array:
    """Returns -kl_coef (log p - log p_reference) per token, plus the answer's score, f32[B], at its last token."""
    last = real & ~jnp.pad(real[:, 1:], ((0, 0), (0, 1)))
    return jnp.where(real, -kl_coef * (log_probs - reference), 0) + jnp.where(last, score[:, None], 0)


def advantages(rewards, values, real, gamma: float, gae_lambda: float) -> Array:
    """Returns generalized advantage estimates, sum_k (gamma lambda)^k delta_(t+k) (arXiv 1506.02438, equation 16).

    delta_t = r_t + gamma v_(t+1) - v_t; the value after an answer's last token is 0.
    """
    values = jnp.where(real, values, 0)
    delta = jnp.where(real, rewards + gamma * jnp.pad(values[:, 1:], ((0, 0), (0, 1))) - values, 0)

    def backward(next_advantage, delta_t):
        return (delta_t + gamma * gae_lambda * next_advantage,) * 2

    return jnp.where(real, jax.lax.scan(backward, jnp.zeros(len(delta)), delta.T, reverse=True)[1].T, 0)


def whitened(x, real, eps: float = 1e-8) -> Array:
    """Returns (x - mean) / standard deviation over all real tokens; 0 elsewhere."""
    count = jnp.maximum(jnp.sum(real), 1)
    mean = jnp.sum(jnp.where(real, x, 0)) / count
    variance = jnp.sum(jnp.where(real, jnp.square(x - mean), 0)) / count
    return jnp.where(real, (x - mean) * jax.lax.rsqrt(variance + eps), 0)


def policy_loss(log_probs, before, advantage, cliprange: float) -> tuple[Array, Array]:
    """Returns -min(ratio A, clip(ratio, 1 - c, 1 + c) A), f32[...], and where it is clipped, bool[...].

    arXiv 1707.06347, equation 7. ratio: p / p_before of a token. Clipped tokens have no gradient.
    """
    ratio = jnp.exp(log_probs - before)
    unclipped, clipped = -ratio * advantage, -jnp.clip(ratio, 1 - cliprange, 1 + cliprange) * advantage
    return jnp.maximum(unclipped, clipped), clipped > unclipped


def value_loss(values, before, returns, cliprange_value: float) -> Array:
    """Returns half the larger squared error of value and value clipped to `before` +- `cliprange_value`, f32[...]."""
    clipped = jnp.clip(values, before - cliprange_value, before + cliprange_value)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))
