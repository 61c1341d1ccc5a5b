"""Selects the next token from logits: greedily, or sampled with temperature, top-k and top-p per row."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.common.settings import Range, check
from mllm_jax.types import Array

Temperature = Annotated[float, Range(least=0, hint="Set 0 for greedy decoding.")]
TopK = Annotated[int, Range(least=0, most=2**31 - 1, hint="Set 0 for all tokens.")]
TopP = Annotated[float, Range(above=0, most=1, hint="Set 1 for all tokens.")]


class Sampling(NamedTuple):
    """Sampling settings, one value per row. A field that is None adds no computation."""

    temperature: Array | None = None  # f32[B] divisor of the logits. 0: greedy. None: all rows greedy
    top_k: Array | None = None  # i32[B] number of most likely tokens that are sampled. 0 or None: all
    top_p: Array | None = None  # f32[B] total probability of the most likely tokens that are sampled. 1 or None: all


def make_sampling(rows: int, temperature=0.0, top_k=0, top_p=1.0) -> Sampling:
    """Returns settings for `rows` rows from numbers, or sequences of one number per row.

    Raises:
      ValueError: a number is out of range, or a sequence has another length.
    """
    temperature = _per_row("temperature", temperature, rows, Temperature, np.float32)
    top_k = _per_row("top_k", top_k, rows, TopK, np.int32)
    top_p = _per_row("top_p", top_p, rows, TopP, np.float32)
    if not temperature.any():
        return Sampling()
    return Sampling(temperature, top_k if top_k.any() else None, top_p if (top_p < 1).any() else None)


def _per_row(name: str, value, rows: int, hint, dtype) -> np.ndarray:
    values = np.asarray(value)
    if values.shape not in ((), (rows,)):
        raise ValueError(f"{name}: has shape {values.shape}. Set one number, or one per row ({rows}).")
    for number in values.reshape(-1).tolist():
        check(hint, number, name)
    return np.broadcast_to(values.astype(dtype), rows)


def sample(logits, sampling: Sampling, key):
    """Returns the next token i32[B] of every row, from logits f32[B V]. `key`: random key, unused if all are greedy."""
    greedy_tokens = greedy(logits)
    if sampling.temperature is None:
        return greedy_tokens
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
    sampled_tokens = jax.random.categorical(key, truncated(scaled, sampling.top_k, sampling.top_p))
    return jnp.where(sampling.temperature > 0, sampled_tokens, greedy_tokens).astype(jnp.int32)


def greedy(logits):
    """Returns the most likely token i32[B] of logits f32[B V]; among equal logits, the lowest id.

    Uses two plain reductions, because XLA on CPU computes an argmax one element at a time.
    """
    vocab = logits.shape[-1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(logits == best, jnp.arange(vocab), vocab), axis=-1)
    return jnp.minimum(first, vocab - 1).astype(jnp.int32)  # if the maximum is NaN, no logit equals it


def truncated(logits, top_k=None, top_p=None):
    """Returns logits f32[B V] with -inf for the tokens that top-k and then top-p exclude.

    Top-p (nucleus sampling, arXiv 1904.09751) keeps the smallest set of most likely tokens whose probabilities reach
    top_p. The most likely token is always kept.

    Example: probabilities [0.5 0.3 0.15 0.05] with top_p=0.7 keep the first two tokens.

    Args:
      logits: f32[B V].
      top_k: i32[B] number of tokens to keep. 0: all. None: all in every row.
      top_p: f32[B] total probability to keep. 1: all. None: all in every row.
    """
    if top_k is None and top_p is None:
        return logits
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k is not None:
        excluded = (top_k[:, None] > 0) & (jnp.arange(logits.shape[-1]) >= top_k[:, None])
        ranked = jnp.where(excluded, -jnp.inf, ranked)
    if top_p is not None:
        probability = jax.nn.softmax(ranked, axis=-1)
        preceding = jnp.cumsum(probability, axis=-1) - probability  # total probability of more likely tokens
        ranked = jnp.where((preceding >= top_p[:, None]) & (top_p[:, None] < 1), -jnp.inf, ranked)
    return jnp.put_along_axis(logits, order, ranked, axis=-1, inplace=False)
