"""Preference losses on pairs of a chosen and a rejected answer: pure functions of their log-probabilities.

Arrays have a last axis of two, [chosen, rejected]; losses are elementwise over the other axes. An answer's
log-probability is sum_i w_i log p_i over its tokens, with w = 1, or more where the two answers differ (dense DPO of
RLHF-V, arXiv 2312.00849). Its ratio is that log-probability minus the reference's.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.common.settings import Finite, NonNegative, Positive, Range
from mllm_jax.train.losses.algorithm_config import (
    FIRST,
    REFERENCES,
    AlgorithmConfig,
    check_reference,
)
from mllm_jax.types import Array


@dataclass(frozen=True)
class PreferenceConfig(AlgorithmConfig):
    """Trains on pairs of a chosen and a rejected answer.

    dpo, ipo, bco, sft: weights of the losses in the sum. DPO: dpo=1. MPO of InternVL: dpo=0.8, bco=0.2, sft=1 (arXiv
      2411.10442).
    beta: strength of the pull to the reference: a smaller value lets answers move further from it.
    label_smoothing: assumed share of pairs with the wrong preference (cDPO).
    simpo_gamma: margin by which `dpo` wants the chosen reward to exceed the rejected one (SimPO's gamma).
    length_normalize: divide log-probabilities by the sum of the token weights (the length, if these are 1).
    diff_token_weight: weight of the tokens in which the answers of a pair differ (RLHF-V's gamma, with
      `length_normalize`).
    reference: "base", the model without its adapters; "first", a frozen copy of the initial weights; "none" (as in
      SimPO); or a file of `python -m mllm_jax.train.algorithms.reference`.
    """

    dpo: NonNegative = 0.0
    ipo: NonNegative = 0.0
    bco: NonNegative = 0.0
    sft: NonNegative = 0.0
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Range(least=0, below=0.5)] = 0.0
    simpo_gamma: Finite = 0.0
    length_normalize: bool = False
    diff_token_weight: Positive = 1.0
    reference: str = FIRST

    def __post_init__(self):
        super().__post_init__()
        if not self.reference:
            raise ValueError(f"reference is empty. Set one of {', '.join(REFERENCES)}, or a file.")
        if not any((self.dpo, self.ipo, self.bco, self.sft)):
            raise ValueError("no loss has a weight. Set one of dpo, ipo, bco and sft, such as dpo=1.")

    @property
    def stored(self) -> bool:
        """True if the reference's log-probabilities are read from a file."""
        return self.reference not in REFERENCES

    @property
    def files(self) -> dict[str, str]:
        return {"reference": self.reference} if self.stored else {}

    def check(self, run: Any, path: str) -> None:
        check_reference(self.reference, run.lora, path)


def dpo(ratio, beta: float, label_smoothing: float = 0.0, simpo_gamma: float = 0.0) -> Array:
    """Returns -(1 - s) log sigmoid(x) - s log sigmoid(-x) with x = beta (ratio_w - ratio_l) - simpo_gamma, f32[...].

    arXiv 2305.18290, equation 7. s = label_smoothing: conservative DPO (ericmitchell.ai/cdpo.pdf). simpo_gamma: margin
    of SimPO (arXiv 2405.14734, equation 6), whose ratio is a mean log-probability without a reference.
    """
    x = beta * (ratio[..., 0] - ratio[..., 1]) - simpo_gamma
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(x) - label_smoothing * jax.nn.log_sigmoid(-x)


def ipo(ratio, beta: float) -> Array:
    """Returns (ratio_w - ratio_l - 1 / (2 beta))^2, f32[...]: arXiv 2310.12036, equation 17, with tau = beta.

    Its authors use mean log-probabilities (`length_normalize`); with sums the loss grows with the answers' lengths.
    """
    return jnp.square(ratio[..., 0] - ratio[..., 1] - 1 / (2 * beta))


def bco(ratio, beta: float, shift) -> Array:
    """Returns -log sigmoid(beta ratio_w - shift) - log sigmoid(-(beta ratio_l - shift)), f32[...].

    Binary classifier optimization, arXiv 2404.04656, and the quality loss of MPO (arXiv 2411.10442).

    shift: f32[], delta: running mean of the rewards, without gradient.
    """
    reward = beta * ratio - jax.lax.stop_gradient(shift)
    return -jax.nn.log_sigmoid(reward[..., 0]) - jax.nn.log_sigmoid(-reward[..., 1])


def sft(policy, size) -> Array:
    """Returns -log p(chosen) / |chosen|, f32[...]: the generation loss of MPO (arXiv 2411.10442)."""
    return -policy[..., 0] / size[..., 0]


def preference_loss(config: PreferenceConfig, policy, reference, size, shift) -> tuple[Array, Array]:
    """Returns the weighted sum of the losses, f32[...], and the rewards beta * ratio without gradient, f32[... 2].

    Args:
      policy, reference: f32[... 2] log-probabilities; the reference is 0 if the run has none.
      size: f32[... 2] sums of the token weights, more than 0.
      shift: f32[], see `bco`.
    """
    ratio = policy - jax.lax.stop_gradient(reference)
    if config.length_normalize:
        ratio = ratio / size
    losses = (
        (config.dpo, lambda: dpo(ratio, config.beta, config.label_smoothing, config.simpo_gamma)),
        (config.ipo, lambda: ipo(ratio, config.beta)),
        (config.bco, lambda: bco(ratio, config.beta, shift)),
        (config.sft, lambda: sft(policy, size)),
    )
    loss = sum(weight * loss() for weight, loss in losses if weight)
    return loss, config.beta * jax.lax.stop_gradient(ratio)


def running_mean(mean_and_count, mean, count) -> Array:
    """Returns a running (mean, count), f32[2], updated with `count` more numbers of mean `mean`."""
    old_mean, old_count = mean_and_count
    total = old_count + count
    return jnp.stack([old_mean + (mean - old_mean) * count / jnp.maximum(total, 1), total])


def in_pairs(x):
    """[B T] values of segments -> [B T/2 2] values of pairs. An odd last column is dropped."""
    return rearrange(x[:, : x.shape[1] // 2 * 2], "B (k two) -> B k two", two=2)
