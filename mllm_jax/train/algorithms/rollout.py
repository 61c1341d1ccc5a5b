"""Rollouts of PPO: samples answers to prompts, inserts them into the rows, and scores them. Pure functions.

A row of prompts has two segments: the prompt, and the verdict turn that the reward model reads after the answer (see
`mllm_jax.data.pipeline.reward.PpoPrompts`). `written` inserts the answer between them, as one conversation:

    before  p p p v v . .    p: prompt, v: verdict turn, a: answer, .: padding
    after   p p p a a v v . .
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
    """Frozen models that a PPO step takes after the state and the batch."""

    reward: Any  # parameters of the reward model
    stop: Array  # i32[n] tokens that end an answer
    first: Any = None  # parameters of the reference. None: those of the policy without its adapters
    model: ModelConfig = struct.field(pytree_node=False, default=None)  # config of the reward model


class Rollout(NamedTuple):
    """Rows with sampled answers."""

    judged: Batch  # rows as the reward model reads them
    policy: Batch  # rows up to the end of the answer, whose tokens are targets of weight 1
    ended: Array  # bool[B] answers that end with a stop token


def respond(config: ModelConfig, params, prompts: Batch, stop, count: int, key) -> Rollout:
    """Samples an answer of at most `count` tokens for every row. stop: i32[n] tokens that end an answer."""
    is_prompt = prompts.segment == 1
    prompts_only = prompts._replace(
        tokens=jnp.where(is_prompt, prompts.tokens, 0),
        segment=is_prompt.astype(jnp.int32),
        prefix=None if prompts.prefix is None else prompts.prefix & is_prompt,
        targets=None,
        weight=None,
    )
    tokens, in_answer = sample_ids(VLM(config), params, prompts_only, count, stop, key)
    return written(prompts, tokens, in_answer, jnp.any(in_answer & jnp.isin(tokens, stop), axis=1))


def written(prompts: Batch, tokens, own, ended) -> Rollout:
    """Inserts answers between the two segments of every row. Rows of T tokens become rows of T + count.

    Rotary positions continue as in generation.

    Args:
      tokens: i32[B count] answers. own: bool[B count] tokens that belong to the answer.
      ended: bool[B] answers that end with a stop token.
    """
    (rows, length), count = prompts.tokens.shape, tokens.shape[1]
    is_prompt, is_verdict = prompts.segment == 1, prompts.segment == 2
    start, size, verdict_size = (jnp.sum(x, axis=1)[:, None] for x in (is_prompt, own, is_verdict))
    columns, end = jnp.arange(length + count), start + size
    # Source column of each token in [prompts, answers]: of the prompt, of the answer, or of the verdict turn.
    source = jnp.where(columns < start, columns, jnp.where(columns < end, length + columns - start, columns - size))

    def arrange(prompt, answer):
        joined = jnp.concatenate([prompt, answer], axis=1)
        return jnp.take_along_axis(joined, jnp.expand_dims(source, range(2, joined.ndim)), axis=1, mode="clip")

    next_position = jnp.max(jnp.where(is_prompt[..., None], prompts.position + 1, 0), axis=(1, 2))[:, None, None]
    prompt_position = prompts.position + jnp.where(is_verdict[..., None], next_position + size[..., None], 0)
    answer_position = jnp.broadcast_to(next_position + jnp.arange(count)[:, None], (rows, count, 3))
    pad_columns = lambda x, fill=0: jnp.pad(x, ((0, 0), (0, count), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    segment = (columns < end + verdict_size).astype(jnp.int32)
    sequence = jnp.where(segment > 0, arrange(prompts.tokens, tokens), 0)
    judged = prompts._replace(
        tokens=sequence,
        targets=jnp.pad(sequence[:, 1:], ((0, 0), (0, 1))),
        weight=((columns >= start - 1) & (columns < end - 1) & (size > 0)).astype(jnp.float32),
        segment=segment,
        position=arrange(prompt_position, answer_position),
        vision_index=pad_columns(prompts.vision_index, -1),
        prefix=None if prompts.prefix is None else pad_columns(prompts.prefix & is_prompt),
        mix=prompts.mix and TokenBlend(pad_columns(prompts.mix.index, -1), pad_columns(prompts.mix.weight)),
    )
    return Rollout(judged, judged._replace(segment=jnp.where(columns < end, segment, 0)), ended)


def experience(
    config: ModelConfig, ppo: PpoConfig, params, judge: FrozenModels, prompts: Batch, key, chunk: int
) -> tuple[Batch, dict[str, Array]]:
    """Samples answers and returns them with their `Experience`, and means over answers: reward, kl, length, ended.

    reward: score of the reward model plus `length_bonus` and `missing_eos_penalty`. kl: sum over tokens of
    log p - log p_reference.
    """
    rollout = respond(config, params, prompts, judge.stop, ppo.response_length, key)
    batch, real = rollout.policy, rollout.policy.weight > 0
    log_probs, values, _ = log_probs_and_values(config, params, batch, chunk)
    reference_params = split_adapters(params)[0] if judge.first is None else judge.first
    reference = log_probs_and_values(config, reference_params, batch, chunk)[0]
    size = jnp.sum(real, axis=1)
    score = scores(judge.model, judge.reward, rollout.judged)[0][:, 0]
    score += jnp.where(rollout.ended, 0, ppo.missing_eos_penalty) + ppo.length_bonus * size / ppo.response_length
    rewards = token_rewards(score, log_probs, reference, real, ppo.kl_coef)
    advantage = advantages(rewards, values, real, ppo.gamma, ppo.gae_lambda)
    new_experience = Experience(log_probs, values, whitened(advantage, real), advantage + values)
    mean = lambda x: jnp.sum(jnp.where(size > 0, x, 0)) / jnp.maximum(jnp.sum(size > 0), 1)
    kl = jnp.sum(jnp.where(real, log_probs - reference, 0), axis=1)
    means = dict(reward=mean(score), kl=mean(kl), length=mean(size), ended=mean(rollout.ended))
    return batch._replace(experience=new_experience), means
