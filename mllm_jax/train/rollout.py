"""Answers that a model gives, written into rows and judged: from prompts to what PPO learns from. Pure functions.

A row of prompts has two segments: the prompt, and what a reward model reads after the answer (see
`mllm_jax.data.judging.Prompts`). With an answer it has the prompt, the answer and then the rest, as one conversation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from mllm_jax.generate.decode import sample_ids
from mllm_jax.model import VLM, ModelConfig, head_table
from mllm_jax.nn.lora import split_adapters
from mllm_jax.train.loss import token_log_probs
from mllm_jax.train.ppo import PpoConfig, advantages, token_rewards, whitened
from mllm_jax.train.reward import scores
from mllm_jax.types import Array, Batch, Experience, Mix


@struct.dataclass
class Judge:
    """What a step of PPO takes beside the state and a batch."""

    reward: Any  # parameters of the reward model
    stop: Array  # i32[n] tokens that end an answer
    first: Any = None  # parameters that the run began with; None = the reference is the model without its adapters
    model: ModelConfig = struct.field(pytree_node=False, default=None)  # of the reward model


class Answered(NamedTuple):
    """Rows with answers."""

    judged: Batch  # as the reward model reads them
    policy: Batch  # as the model reads them: up to the end of the answer, whose tokens are the targets of weight 1
    ended: Array  # bool[B] by itself, not for want of room


def respond(config: ModelConfig, params, prompts: Batch, stop, count: int, key) -> Answered:
    """Draws an answer of at most `count` tokens for every row."""
    asked = prompts.segment == 1
    first = prompts._replace(
        tokens=jnp.where(asked, prompts.tokens, 0),
        segment=asked.astype(jnp.int32),
        prefix=None if prompts.prefix is None else prompts.prefix & asked,
        **dict.fromkeys(("targets", "weight")),
    )
    tokens, own = sample_ids(VLM(config), params, first, count, stop, key)
    return written(prompts, tokens, own, jnp.any(own & jnp.isin(tokens, stop), axis=1))


def written(prompts: Batch, tokens, own, ended) -> Answered:
    """Puts answers i32[B count], as far as bool[B count] `own` says, between the two segments of every row.

    Rows of T tokens become rows of T + count. Rotary positions go on as in generation.
    """
    length, count = prompts.tokens.shape[1], tokens.shape[1]
    wide = lambda x, fill=0: jnp.pad(x, ((0, 0), (0, count), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
    asked, rest = prompts.segment == 1, prompts.segment == 2
    start, size = jnp.sum(asked, axis=1), jnp.sum(own, axis=1)
    following = jnp.max(jnp.where(asked[..., None], prompts.position + 1, 0), axis=(1, 2))
    # Where every token of the answer and of the rest goes; what is none falls off the end.
    off, columns = length + count, jnp.arange(length)
    answer = jnp.where(own, start[:, None] + jnp.arange(count), off)
    behind = jnp.where(rest, columns + size[:, None], off)
    later = prompts.position + (following + size)[:, None, None]
    put = jax.vmap(lambda x, place, values: x.at[place].set(values, mode="drop"))

    def filled(x, answers, rests):
        """The prompts' own values, then those of the answers, then those of the rests."""
        kept = jnp.where(jnp.reshape(wide(asked), asked.shape[:1] + (off,) + (1,) * (x.ndim - 2)), wide(x), 0)
        return put(put(kept, answer, answers), behind, rests)

    where = jnp.broadcast_to((following[:, None] + jnp.arange(count))[..., None], (*tokens.shape, 3))
    all_tokens = filled(prompts.tokens, tokens, prompts.tokens)
    segment = filled(asked.astype(jnp.int32), own.astype(jnp.int32), rest.astype(jnp.int32))
    places = jnp.arange(off)
    end = (start + size)[:, None]
    targets = (places >= start[:, None] - 1) & (places < end - 1) & (size > 0)[:, None]
    judged = prompts._replace(
        tokens=all_tokens,
        targets=jnp.pad(all_tokens[:, 1:], ((0, 0), (0, 1))),
        weight=targets.astype(jnp.float32),
        segment=segment,
        position=filled(prompts.position, where, later),
        vision_index=wide(prompts.vision_index, -1),
        prefix=None if prompts.prefix is None else wide(prompts.prefix & asked),
        mix=prompts.mix and Mix(wide(prompts.mix.index, -1), wide(prompts.mix.share)),
    )
    policy = judged._replace(segment=jnp.where(places < end, segment, 0))
    return Answered(judged, policy, ended)


def log_probs_and_values(config: ModelConfig, params, batch: Batch, chunk: int):
    """f32[B T] of every target of weight, 0 elsewhere; f32[B T] of the value head, None without one; routing."""
    model, runtime = VLM(config), config.runtime
    out = model.apply({"params": params}, batch, hidden=True)
    about = (chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
    found = token_log_probs(out.hidden, head_table(params), batch.targets, batch.weight, *about)
    values = model.apply({"params": params}, out.hidden, method="values") if config.value else None
    return found, values, out.routing


def experience(
    config: ModelConfig, ppo: PpoConfig, params, judge: Judge, prompts: Batch, key, chunk: int
) -> tuple[Batch, dict[str, Array]]:
    """Answers to prompts with all that PPO learns from, and means over answers: reward, kl, length, ended.

    reward is the reward model's, with what is added for length and where an answer does not end; kl is the sum over
    tokens of log p - log p_reference.
    """
    answered = respond(config, params, prompts, judge.stop, ppo.new_tokens, key)
    batch, real = answered.policy, answered.policy.weight > 0
    log_probs, values, _ = log_probs_and_values(config, params, batch, chunk)
    known = split_adapters(params)[0] if judge.first is None else judge.first
    reference = log_probs_and_values(config, known, batch, chunk)[0]
    size = jnp.sum(real, axis=1)
    score = scores(judge.model, judge.reward, answered.judged)[0][:, 0]
    score += jnp.where(answered.ended, 0, ppo.unfinished) + ppo.length * size / ppo.new_tokens
    rewards = token_rewards(score, log_probs, reference, real, ppo.kl)
    advantage = advantages(rewards, values, real, ppo.gamma, ppo.lam)
    learned = Experience(log_probs, values, whitened(advantage, real), advantage + values)
    mean = lambda x: jnp.sum(jnp.where(size > 0, x, 0)) / jnp.maximum(jnp.sum(size > 0), 1)
    kl = jnp.sum(jnp.where(real, log_probs - reference, 0), axis=1)
    about = dict(reward=mean(score), kl=mean(kl), length=mean(size), ended=mean(answered.ended))
    return batch._replace(experience=learned), about
