"""Attention masks as bounds: a query attends to the keys of its own segment between a first and a last place.

Causality, windows and prefixes are such ranges. Masks, the skipping of blocks and sharded tokens need only the bounds.
Example: six tokens of two conversations, causal with a window of 2:

    segment  1 1 1 2 2 2
    place    0 1 2 3 4 5
    first   -1 0 1 2 3 4     place 2 is within the bounds of the token at place 3, but in another segment
    last     0 1 2 3 4 5
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mllm_jax.types import Array


class AttentionSpec(NamedTuple):
    """Scores and static mask of attention.

    causal: whether a query attends only to keys up to its own place.
    scale: factor of q k^T.
    softcap: bound c of the scores: c tanh(score / c). 0: no cap.
    window: number of last tokens that a causal query attends to, itself included. 0: all.
    prefix: whether some tokens attend to each other regardless of `causal` and `window`, see `mask_bounds`.
    """

    causal: bool
    scale: float
    softcap: float = 0.0
    window: int = 0
    prefix: bool = False


class QueryBounds(NamedTuple):
    segment: Array  # i32[B T]
    first: Array | None  # i32[B T] first place that the query attends to. None: the beginning
    last: Array | None  # i32[B T] last place that the query attends to. None: the end


class KeyBounds(NamedTuple):
    segment: Array  # i32[B S]
    place: Array  # i32[B S] numbers that increase by one per token of a conversation


def mask_bounds(spec: AttentionSpec, q_segment, kv_segment, offset=None, prefix=None) -> tuple[QueryBounds, KeyBounds]:
    """Returns bounds of the keys that each query attends to.

    Example: a prefix [1 1 1 0 0] of one conversation, causal without a window, gives `last` [2 2 2 3 4].

    Args:
      q_segment: i32[B T]; kv_segment: i32[B S]; 0: padding.
      offset: i32[] slot of the first query among the keys. None: queries and keys are the same tokens.
      prefix: bool[B T] first tokens of a conversation, which attend to each other; needs `spec.causal`.
    """
    slots = jnp.broadcast_to(jnp.arange(kv_segment.shape[1]), kv_segment.shape)
    # A cache may have padding between a prompt and its continuation.
    place = jnp.cumsum(kv_segment > 0, axis=1) if spec.window and offset is not None else slots
    if not spec.causal:
        return QueryBounds(q_segment, None, None), KeyBounds(kv_segment, place)
    q_place = place if offset is None else jax.lax.dynamic_slice_in_dim(place, offset, q_segment.shape[1], axis=1)
    first, last = q_place - (spec.window - 1) if spec.window else None, q_place
    if prefix is not None:
        last = jnp.where(prefix, jnp.take_along_axis(q_place, _end_of_run(prefix), axis=1), q_place)
        first = None if first is None else jnp.where(prefix, jnp.minimum(first, 0), first)
    return QueryBounds(q_segment, first, last), KeyBounds(kv_segment, place)


def _end_of_run(flags):
    """Returns i32[B T], the last index of the run of flags (bool[B T]) at each index; without a flag, the index itself.

    Example: [1 1 0 1] -> [1 1 2 3].
    """
    length = flags.shape[1]
    index = jnp.broadcast_to(jnp.arange(length), flags.shape)
    next_unset = jax.lax.cummin(jnp.where(flags, length, index), axis=1, reverse=True)
    return jnp.where(flags, next_unset - 1, index)


def attention_mask(query: QueryBounds, key: KeyBounds):
    """Returns the mask bool[... T S] of query bounds [... T] and key bounds [... S]. Padding attends to padding."""
    mask = query.segment[..., :, None] == key.segment[..., None, :]
    if query.first is not None:
        mask &= query.first[..., :, None] <= key.place[..., None, :]
    if query.last is not None:
        mask &= query.last[..., :, None] >= key.place[..., None, :]
    return mask


def cap(scores, softcap: float):
    """Returns scores capped to c tanh(score / c) for c = `softcap`; unchanged if c is 0."""
    return softcap * jnp.tanh(scores / softcap) if softcap else scores
