"""Selection of the next token from logits: greedy, or sampled with temperature, top-k and top-p, per row."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.common.settings import Range, check
from mllm_jax.types import Array

Temperature = Annotated[float, Range(least=0, hint="Set 0 for the likeliest token.")]
TopK = Annotated[int, Range(least=0, most=2**31 - 1, hint="Set 0 for all tokens.")]
TopP = Annotated[float, Range(above=0, most=1, hint="Set 1 for all tokens.")]


class Sampling(NamedTuple):
    """Sampling settings of rows. A field that is None for all rows costs nothing; others have one value per row."""

    temperature: Array | None = None  # f32[B] 0 = greedy; None = all greedy
    top_k: Array | None = None  # i32[B] only the k likeliest tokens; 0 = all
    top_p: Array | None = None  # f32[B] only the likeliest tokens that together reach this probability; 1 = all


def make_sampling(rows: int, temperature=0.0, top_k=0, top_p=1.0) -> Sampling:
    """Checked settings for `rows` rows, from numbers or from sequences of one number per row. Raises ValueError."""
    temperature = _per_row("temperature", temperature, rows, Temperature, np.float32)
    top_k = _per_row("top_k", top_k, rows, TopK, np.int32)
    top_p = _per_row("top_p", top_p, rows, TopP, np.float32)
    if not temperature.any():
        return Sampling()
    return Sampling(temperature, top_k if top_k.any() else None, top_p if (top_p < 1).any() else None)


def _per_row(name: str, value, rows: int, hint, dtype) -> np.ndarray:
    values = np.asarray(value)
    if values.shape not in ((), (rows,)):
        raise ValueError(f"{name} must be one number or one per row ({rows}), not of shape {values.shape}")
    for number in values.reshape(-1).tolist():
        check(hint, number, name)
    return np.broadcast_to(values.astype(dtype), rows)


def sample(logits, sampling: Sampling, key):
    """The next token of every row. logits f32[B V] -> i32[B]; `key` is used only where something is drawn."""
    likeliest = greedy(logits)
    if sampling.temperature is None:
        return likeliest
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
    drawn = jax.random.categorical(key, truncated(scaled, sampling.top_k, sampling.top_p))
    return jnp.where(sampling.temperature > 0, drawn, likeliest).astype(jnp.int32)


def greedy(logits):
    """The likeliest token, the first of equals. f32[B V] -> i32[B].

    Two plain reductions: XLA computes an argmax on CPU one element at a time.
    """
    vocab = logits.shape[-1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(logits == best, jnp.arange(vocab), vocab), axis=-1)
    return jnp.minimum(first, vocab - 1).astype(jnp.int32)  # no logit equals a NaN


def truncated(logits, top_k=None, top_p=None):
    """Logits [B V] with -inf for tokens that top-k, then top-p of what is left, exclude (nucleus: arXiv 1904.09751).

    Top-p keeps the fewest likeliest tokens whose probabilities reach top_p; the likeliest always stays.
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
        before = jnp.cumsum(probability, axis=-1) - probability
        ranked = jnp.where((before >= top_p[:, None]) & (top_p[:, None] < 1), -jnp.inf, ranked)
    return jnp.put_along_axis(logits, order, ranked, axis=-1, inplace=False)
