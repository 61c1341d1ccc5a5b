"""Attention masks as bounds: a query attends to the keys of its own segment between a first and a last place.

Causality, windows and prefixes are all such ranges, so that masks, skipped blocks and sharded tokens need only the
bounds. For example, six tokens of two conversations, causal with a window of 2:

    segment  1 1 1 2 2 2
    place    0 1 2 3 4 5
    first   -1 0 1 2 3 4     the first token of segment 2 may reach place 2, but that is in another segment
    last     0 1 2 3 4 5
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mllm_jax.types import Array


class AttentionSpec(NamedTuple):
    """Scores and static mask of attention.

    causal: whether queries attend to nothing after themselves.
    scale: factor of q k^T.
    softcap: c, where scores are c tanh(score / c). 0: no cap.
    window: with `causal`, number of last tokens that a query attends to, itself included. 0: all.
    prefix: whether some tokens attend to each other regardless of `causal` and `window`, see `mask_bounds`.
    """

    causal: bool
    scale: float
    softcap: float = 0.0
    window: int = 0
    prefix: bool = False


class QueryBounds(NamedTuple):
    segment: Array  # i32[B T]
    first: Array | None  # i32[B T] the first place that it attends to. None: the beginning
    last: Array | None  # i32[B T] the last place that it attends to. None: the end


class KeyBounds(NamedTuple):
    segment: Array  # i32[B S]
    place: Array  # i32[B S] numbers that grow along a conversation, by one from token to token


def mask_bounds(spec: AttentionSpec, q_segment, kv_segment, offset=None, prefix=None) -> tuple[QueryBounds, KeyBounds]:
    """Returns the keys that each query attends to, as bounds.

    Args:
      q_segment: i32[B T]; kv_segment: i32[B S]; 0: padding.
      offset: i32[] the queries' first slot among the keys. None: both are the same tokens.
      prefix: bool[B T] first tokens of a conversation, which attend to each other; needs `spec.causal`.
    """
    slots = jnp.broadcast_to(jnp.arange(kv_segment.shape[1]), kv_segment.shape)
    # A cache may have padding between a prompt and its continuation.
    place = jnp.cumsum(kv_segment > 0, axis=1) if spec.window and offset is not None else slots
    if not spec.causal:
        return QueryBounds(q_segment, None, None), KeyBounds(kv_segment, place)
    own = place if offset is None else jax.lax.dynamic_slice_in_dim(place, offset, q_segment.shape[1], axis=1)
    first, last = own - (spec.window - 1) if spec.window else None, own
    if prefix is not None:
        last = jnp.where(prefix, jnp.take_along_axis(own, _end_of_run(prefix), axis=1), own)
        first = None if first is None else jnp.where(prefix, jnp.minimum(first, 0), first)
    return QueryBounds(q_segment, first, last), KeyBounds(kv_segment, place)


def _end_of_run(flags):
    """bool[B T] -> i32[B T]: the last of the consecutive flags from each place on; the place itself if there is no
    flag."""
    length = flags.shape[1]
    here = jnp.broadcast_to(jnp.arange(length), flags.shape)
    without = jax.lax.cummin(jnp.where(flags, length, here), axis=1, reverse=True)
    return jnp.where(flags, without - 1, here)


def attention_mask(query: QueryBounds, key: KeyBounds):
    """bool[... T S] from [... T] and [... S]. Padding attends to padding."""
    seen = query.segment[..., :, None] == key.segment[..., None, :]
    if query.first is not None:
        seen &= query.first[..., :, None] <= key.place[..., None, :]
    if query.last is not None:
        seen &= query.last[..., :, None] >= key.place[..., None, :]
    return seen


def cap(scores, softcap: float):
    """c tanh(score / c); as they are where c is 0."""
    return softcap * jnp.tanh(scores / softcap) if softcap else scores
