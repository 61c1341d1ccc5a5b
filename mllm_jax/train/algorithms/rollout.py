"""Answers that a model gives, written into rows and judged: from prompts to what PPO learns from. Pure functions.

A row of prompts has two segments: the prompt, and what a reward model reads after the answer (see
`mllm_jax.data.pipeline.reward.PpoPrompts`). With an answer it has the prompt, the answer and then the rest, as one
conversation.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct

from mllm_jax.generate.decode import sample_ids
from mllm_jax.model.vlm import VLM, ModelConfig
from mllm_jax.nn.lora import split_adapters
from mllm_jax.train.losses.ppo import PpoConfig, advantages, token_rewards, whitened
from mllm_jax.train.step.forward import log_probs_and_values, scores
from mllm_jax.types import Array, Batch, Experience, TokenBlend


@struct.dataclass
class FrozenModels:
    """Frozen models that a step of PPO takes beside the state and a batch."""

    reward: Any  # parameters of the reward model
    stop: Array  # i32[n] tokens that end an answer
    first: Any = None  # parameters that the run began with; None = the reference is the model without its adapters
    model: ModelConfig = struct.field(pytree_node=False, default=None)  # of the reward model


class Rollout(NamedTuple):
    """Rows with answers."""

    judged: Batch  # as the reward model reads them
    policy: Batch  # as the model reads them: up to the end of the answer, whose tokens are the targets of weight 1
    ended: Array  # bool[B] whether it ended with a stop token, not by its length


def respond(config: ModelConfig, params, prompts: Batch, stop, count: int, key) -> Rollout:
    """Draws an answer of at most `count` tokens for every row."""
    asked = prompts.segment == 1
    first = prompts._replace(
        tokens=jnp.where(asked, prompts.tokens, 0),
        segment=asked.astype(jnp.int32),
        prefix=None if prompts.prefix is None else prompts.prefix & asked,
        targets=None,
        weight=None,
    )
    tokens, own = sample_ids(VLM(config), params, first, count, stop, key)
    return written(prompts, tokens, own, jnp.any(own & jnp.isin(tokens, stop), axis=1))


def written(prompts: Batch, tokens, own, ended) -> Rollout:
    """Inserts answers i32[B count], where bool[B count] `own` is set, between the two segments of every row.

    Rows of T tokens become rows of T + count. Rotary positions continue as in generation.
    """
    (rows, length), count = prompts.tokens.shape, tokens.shape[1]
    asked, rest = prompts.segment == 1, prompts.segment == 2
    start, size, left = (jnp.sum(x, axis=1)[:, None] for x in (asked, own, rest))
    column, end = jnp.arange(length + count), start + size
    # Source of each column's token: the prompt, the answer after all prompts, or the rest after the prompt.
    source = jnp.where(column < start, column, jnp.where(column < end, length + column - start, column - size))

    def laid(prompt, answer):
        both = jnp.concatenate([prompt, answer], axis=1)
        return jnp.take_along_axis(both, jnp.expand_dims(source, range(2, both.ndim)), axis=1, mode="clip")

    following = jnp.max(jnp.where(asked[..., None], prompts.position + 1, 0), axis=(1, 2))[:, None, None]
    later = prompts.position + jnp.where(rest[..., None], following + size[..., None], 0)
    after = jnp.broadcast_to(following + jnp.arange(count)[:, None], (rows, count, 3))
    wide = lambda x, fill=0: jnp.pad(x, ((0, 0), (0, count), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    segment = (column < end + left).astype(jnp.int32)
    placed = jnp.where(segment > 0, laid(prompts.tokens, tokens), 0)
    judged = prompts._replace(
        tokens=placed,
        targets=jnp.pad(placed[:, 1:], ((0, 0), (0, 1))),
        weight=((column >= start - 1) & (column < end - 1) & (size > 0)).astype(jnp.float32),
        segment=segment,
        position=laid(later, after),
        vision_index=wide(prompts.vision_index, -1),
        prefix=None if prompts.prefix is None else wide(prompts.prefix & asked),
        mix=prompts.mix and TokenBlend(wide(prompts.mix.index, -1), wide(prompts.mix.weight)),
    )
    return Rollout(judged, judged._replace(segment=jnp.where(column < end, segment, 0)), ended)


def experience(
    config: ModelConfig, ppo: PpoConfig, params, judge: FrozenModels, prompts: Batch, key, chunk: int
) -> tuple[Batch, dict[str, Array]]:
    """Answers to prompts with all that PPO learns from, and means over answers: reward, kl, length, ended.

    reward is the reward model's, with what is added for length and where an answer does not end; kl is the sum over
    tokens of log p - log p_reference.
    """
    answered = respond(config, params, prompts, judge.stop, ppo.response_length, key)
    batch, real = answered.policy, answered.policy.weight > 0
    log_probs, values, _ = log_probs_and_values(config, params, batch, chunk)
    known = split_adapters(params)[0] if judge.first is None else judge.first
    reference = log_probs_and_values(config, known, batch, chunk)[0]
    size = jnp.sum(real, axis=1)
    score = scores(judge.model, judge.reward, answered.judged)[0][:, 0]
    score += jnp.where(answered.ended, 0, ppo.missing_eos_penalty) + ppo.length_bonus * size / ppo.response_length
    rewards = token_rewards(score, log_probs, reference, real, ppo.kl_coef)
    advantage = advantages(rewards, values, real, ppo.gamma, ppo.gae_lambda)
    learned = Experience(log_probs, values, whitened(advantage, real), advantage + values)
    mean = lambda x: jnp.sum(jnp.where(size > 0, x, 0)) / jnp.maximum(jnp.sum(size > 0), 1)
    kl = jnp.sum(jnp.where(real, log_probs - reference, 0), axis=1)
    about = dict(reward=mean(score), kl=mean(kl), length=mean(size), ended=mean(answered.ended))
    return batch._replace(experience=learned), about
