"""Token generation: a compiled pass over the prompts, then a compiled loop that adds one token per row and step.

All rows write the same cache slots, starting behind the padded prompts. Only rotary positions and the segments of the
slots depend on the length of a row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.common.settings import PositiveInt, check
from mllm_jax.generate.buckets import TOKENS, bucket, pad_prompts
from mllm_jax.generate.cpu_weights import Weights, for_hidden, for_logits, lay_out
from mllm_jax.generate.sampling import Sampling, make_sampling, sample
from mllm_jax.model.vlm import VLM, init_cache
from mllm_jax.types import Array, Batch, Cache


class State(NamedTuple):
    """State of the decoding loop between two steps."""

    cache: Cache  # keys and values of all tokens but the newest
    token: Array  # i32[B] newest tokens
    done: Array  # bool[B] rows that have stopped
    count: Array  # i32[] number of generated tokens per row


class Choice(NamedTuple):
    """Settings of token selection."""

    sampling: Sampling
    key: Array  # random key; step i uses `fold_in(key, i)`
    stop: Array  # i32[n] tokens that end a row
    fill: Array  # i32[] token that fills a row after its end


def generate_ids(
    vlm: Any,
    batch: Batch,
    max_new_tokens: int,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    stop: Sequence[int] = (),
    key: Array | None = None,
    on_token: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """Generates a continuation of every row of a batch.

    Shapes are bucketed, so that prompts of similar sizes share compiled programs.

    Args:
      vlm: object with `config`, `model` and `params`, such as the result of `mllm_jax.load_pretrained`.
      batch: one prompt per row, padded on any side (`from_hf_inputs`, `collate`). Rows without tokens stay empty.
      max_new_tokens: number of new tokens per row. Generation ends earlier when every row has stopped.
      temperature: divisor of the logits, one number or one per row. 0: greedy.
      top_k: number of most likely tokens that are sampled, one number or one per row. 0: all.
      top_p: total probability of the most likely tokens that are sampled, one number or one per row. 1: all.
      stop: ids of tokens that end a row. They are returned; the rest of the row is filled with `stop[0]`.
      key: random key, `jax.random.key(seed)`. None: seed 0.
      on_token: function that is called with i32[B] after every step. This is slower, because the host waits for each.
    Returns:
      i32[B max_new_tokens].
    Raises:
      ValueError: a setting is out of range, a row has several conversations, or there are too few learned positions.
    """
    check(PositiveInt, max_new_tokens, "max_new_tokens")
    if np.max(batch.segment, initial=0) > 1:
        raise ValueError("batch: a row has several conversations. Put one prompt in each row.")
    longest = int(np.max(batch.position[..., 0], initial=-1)) + max_new_tokens
    if 0 < vlm.config.decoder.positions < longest:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: needs {longest} positions with the longest prompt, but the model has "
            f"learned {vlm.config.decoder.positions}. Shorten the prompts or reduce max_new_tokens."
        )
    batch = pad_prompts(batch, vlm.config.merge, vlm.config.queries)
    rows, length = batch.tokens.shape
    slots = bucket(length + max_new_tokens, TOKENS)
    choice = Choice(
        make_sampling(rows, temperature, top_k, top_p),
        jax.random.key(0) if key is None else key,
        jnp.asarray(stop, jnp.int32).reshape(-1),
        jnp.int32(stop[0] if len(stop) else 0),
    )
    state = _prefill(vlm.model, vlm.params, batch, choice, slots)
    model, weights = lay_out(vlm.model, vlm.params, rows)
    if on_token is None:
        _, tokens = _decode(model, weights, state, choice, jnp.int32(max_new_tokens), slots - length)
        return np.asarray(tokens)[:, :max_new_tokens]
    tokens = np.full((rows, max_new_tokens), np.asarray(choice.fill))
    for i in range(max_new_tokens):
        tokens[:, i] = state.token
        on_token(tokens[:, i].copy())
        if i + 1 == max_new_tokens or np.all(state.done):
            break
        state = _step(model, weights, state, choice)
    return tokens


def sample_ids(model: VLM, params, batch: Batch, count: int, stop, key: Array) -> tuple[Array, Array]:
    """Samples a continuation of every row at temperature 1. Unlike `generate_ids`, it can be traced in other programs.

    Args:
      model: module of the model.
      params: its parameters.
      batch: one prompt per row, padded on the right. A row without tokens is not continued.
      count: maximum number of tokens of a continuation.
      stop: i32[n] tokens that end a row.
      key: random key.
    Returns:
      (i32[B count] tokens, bool[B count] True at tokens of the continuation, including the one that ends it).
    """
    rows, length = batch.tokens.shape
    choice = Choice(Sampling(jnp.ones(rows)), key, stop, stop[0])
    state = _prefill(model, params, batch, choice, length + count)
    decode_model, weights = lay_out(model, params, rows)
    _, tokens = _decode(decode_model, weights, state, choice, jnp.int32(count), count)
    ends = jnp.isin(tokens, stop)
    mask = (jnp.cumsum(ends, axis=1) - ends == 0) & jnp.any(batch.segment > 0, axis=1)[:, None]
    return tokens, mask


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def _prefill(model: VLM, params, batch: Batch, choice: Choice, slots: int) -> State:
    """Computes the cache of the prompts and selects the first token. Logits are computed at the last token only."""
    rows, length = batch.tokens.shape
    cache = init_cache(model.config, rows, slots)
    out = model.apply({"params": params}, batch, cache, hidden=True)
    mask = batch.segment > 0
    last = jnp.max(jnp.where(mask, jnp.arange(length), 0), axis=1)
    hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
    logits = model.apply({"params": params}, hidden, method="logits")
    return _select(logits, out.cache, ~jnp.any(mask, axis=1), jnp.int32(0), choice)


def _select(logits, cache: Cache, done, count, choice: Choice) -> State:
    token = sample(logits, choice.sampling, jax.random.fold_in(choice.key, count))
    token = jnp.where(done, choice.fill, token)
    return State(cache, token, done | jnp.isin(token, choice.stop), count + 1)


def _next(model: VLM, weights: Weights, state: State, choice: Choice) -> State:
    rows = len(state.token)
    batch = Batch(
        tokens=state.token[:, None],
        targets=None,
        weight=None,
        segment=jnp.ones((rows, 1), jnp.int32),
        position=jnp.broadcast_to(state.cache.position[:, None, None], (rows, 1, 3)),
        vision_index=jnp.full((rows, 1), -1, jnp.int32),
    )
    out = model.apply({"params": for_hidden(weights)}, batch, state.cache, hidden=True)
    logits = model.apply({"params": for_logits(weights)}, out.hidden[:, 0], method="logits")
    return _select(logits, out.cache, state.done, state.count, choice)


_step = jax.jit(_next, static_argnames="model", donate_argnames="state")


@functools.partial(jax.jit, static_argnames=("model", "max_tokens"), donate_argnames="state")
def _decode(model: VLM, weights: Weights, state: State, choice: Choice, limit, max_tokens: int):
    """Returns the last state and all tokens i32[B max_tokens], including the first, which `state` contains.

    Stops after `limit` tokens, or when every row has stopped. The state is returned so that the loop updates the
    donated cache in place.
    """
    tokens = jnp.full((len(state.token), max_tokens), choice.fill).at[:, 0].set(state.token)

    def unfinished(carry):
        state, _ = carry
        return (state.count < limit) & ~jnp.all(state.done)

    def add(carry):
        state, tokens = carry
        next_state = _next(model, weights, state, choice)
        return next_state, jax.lax.dynamic_update_slice_in_dim(tokens, next_state.token[:, None], state.count, axis=1)

    return jax.lax.while_loop(unfinished, add, (state, tokens))
