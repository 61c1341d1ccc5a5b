"""Tokens from prompts: one compiled pass over the prompts, then a compiled loop that adds a token to every row.

All rows write the same slots of the cache, from the end of the padded prompt on; a row's own length shows only in its
rotary positions and in the segments of its slots.
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
    """Between two tokens."""

    cache: Cache  # of all but the latest tokens
    token: Array  # i32[B] the latest
    done: Array  # bool[B] rows that have stopped
    count: Array  # i32[] how many tokens were chosen


class Choice(NamedTuple):
    """Selection of tokens, and the end of a row."""

    sampling: Sampling
    key: Array
    stop: Array  # i32[n] tokens that end a row
    fill: Array  # i32[] what follows in a row that has ended


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
    """Continues every row of a batch.

    Shapes are bucketed, so that prompts of similar sizes share their compiled programs.

    Args:
      vlm: anything with `model` and `params` (`mllm_jax.load_pretrained`).
      batch: one prompt per row, padded on any side (`from_hf_inputs`, `collate`); a row without tokens gets none.
      max_new_tokens: that many, unless every row stops before.
      temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
      top_k: draws among the k likeliest only; 0 = all.
      top_p: draws among the fewest likeliest tokens that reach this probability; 1 = all.
        All three: one number, or one per row.
      stop: tokens that end a row. They are returned; after one the row is filled with `stop[0]`.
      key: of the random draws, `jax.random.key(seed)`; None = seed 0.
      on_token: is called with i32[B] for every token as soon as it is known; slower, since each is waited for.
    Returns:
      i32[B max_new_tokens].
    Raises:
      ValueError: a setting is out of range, a row holds several conversations, or learned positions do not suffice.
    """
    check(PositiveInt, max_new_tokens, "max_new_tokens")
    if np.max(batch.segment, initial=0) > 1:
        raise ValueError("a row holds several conversations; generation continues one per row")
    longest = int(np.max(batch.position[..., 0], initial=-1)) + max_new_tokens
    if 0 < vlm.config.decoder.positions < longest:
        raise ValueError(
            f"the prompts and max_new_tokens={max_new_tokens} need {longest} positions; the model has learned "
            f"{vlm.config.decoder.positions}. Shorten the one or the other"
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
    """Draws a continuation of every row as likely as the model finds it: `generate_ids` as a part of other programs.

    Args:
      batch: one prompt per row, padded on the right; a row without tokens gets none.
      count: tokens of the longest continuation.
      stop: i32[n] tokens that end a row.
    Returns:
      (i32[B count], bool[B count] which of these belong to the continuation, the token that ends it among them).
    """
    rows, length = batch.tokens.shape
    choice = Choice(Sampling(jnp.ones(rows)), key, stop, stop[0])
    state = _prefill(model, params, batch, choice, length + count)
    reader, weights = lay_out(model, params, rows)
    _, tokens = _decode(reader, weights, state, choice, jnp.int32(count), count)
    ends = jnp.isin(tokens, stop)
    own = (jnp.cumsum(ends, axis=1) - ends == 0) & jnp.any(batch.segment > 0, axis=1)[:, None]
    return tokens, own


@functools.partial(jax.jit, static_argnames=("model", "slots"))
def _prefill(model: VLM, params, batch: Batch, choice: Choice, slots: int) -> State:
    """Reads the prompts and chooses the first token. Logits are computed where a prompt ends, nowhere else."""
    rows, length = batch.tokens.shape
    cache = init_cache(model.config, rows, slots)
    out = model.apply({"params": params}, batch, cache, hidden=True)
    real = batch.segment > 0
    last = jnp.max(jnp.where(real, jnp.arange(length), 0), axis=1)
    hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
    logits = model.apply({"params": params}, hidden, method="logits")
    return _chosen(logits, out.cache, ~jnp.any(real, axis=1), jnp.int32(0), choice)


def _chosen(logits, cache: Cache, done, count, choice: Choice) -> State:
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
    return _chosen(logits, out.cache, state.done, state.count, choice)


_step = jax.jit(_next, static_argnames="model", donate_argnames="state")


@functools.partial(jax.jit, static_argnames=("model", "room"), donate_argnames="state")
def _decode(model: VLM, weights: Weights, state: State, choice: Choice, limit, room: int):
    """(last state, all tokens i32[B room]); the first is chosen already. Stops at `limit`, or when every row has.

    The state is returned so that its donated cache is the one that the loop writes.
    """
    tokens = jnp.full((len(state.token), room), choice.fill).at[:, 0].set(state.token)

    def unfinished(carry):
        state, _ = carry
        return (state.count < limit) & ~jnp.all(state.done)

    def add(carry):
        state, tokens = carry
        new = _next(model, weights, state, choice)
        return new, jax.lax.dynamic_update_slice_in_dim(tokens, new.token[:, None], state.count, axis=1)

    return jax.lax.while_loop(unfinished, add, (state, tokens))
