"""Flash attention in plain XLA (arXiv 2205.14135): exact, without storing all scores, skipping masked blocks.

Tokens are processed in blocks. A block of queries visits only the blocks of keys between the first and the last that
any of its queries attends to. This range is computed at run time from the bounds of nn/attention/masks.py, so that most
blocks of packed rows, and those outside windows, are skipped.

The sum over keys may pass around a ring of devices, each with a shard of the keys (Ring Attention, arXiv 2310.01889).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from mllm_jax.nn.attention.masks import AttentionSpec, KeyBounds, QueryBounds, attention_mask, cap
from mllm_jax.nn.precision import einsum
from mllm_jax.nn.runtime import expect_runs
from mllm_jax.types import Array

BLOCK = 256  # tokens
UNSEEN = -1e30  # score of masked keys; finite, so that a query without keys yields no NaN
_product = partial(einsum, out=jnp.float32)


class _Queries(NamedTuple):
    """n blocks of t queries in each of B rows."""

    q: Array  # [B*n K G*t H], scaled
    bounds: QueryBounds  # each [B*n t]


class _Keys(NamedTuple):
    """n blocks of s keys in each of B rows."""

    k: Array  # [B*n K s H]
    v: Array  # [B*n K s H]
    bounds: KeyBounds  # each [B*n s]


class _Sums(NamedTuple):
    """Partial sums of each query's softmax, over the keys visited so far."""

    value: Array  # f32[B*n K G*t H] sum of exp(score - peak) * v
    total: Array  # f32[B*n K G*t] sum of exp(score - peak)
    peak: Array  # f32[B*n K G*t] largest score


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def flash(q, k, v, query: QueryBounds, key: KeyBounds, spec: AttentionSpec, ring: tuple[str, ...] = ()):
    """Returns softmax(scale q k^T) v over the keys that each query attends to.

    Args:
      q: [B T N H]; k, v: [B S K H] with N a multiple of K; the values may have another H.
      query, key: bounds from `mask_bounds`. Padding attends to nothing, and its result is 0.
      ring: mesh axes (inside `shard_map`) that shard the keys. (): the keys are not sharded.
    Returns:
      [B T N H] in the dtype of q.
    """
    return _forward(q, k, v, query, key, spec, ring)[0]


def _forward(q, k, v, query, key, spec, ring):
    queries, keys = _queries(q, query, k.shape[2], spec.scale), _keys(k, v, key)
    query_shape = queries.q.shape[:-1]
    zeros = _Sums(
        value=jnp.zeros((*query_shape, v.shape[-1]), jnp.float32),
        total=jnp.zeros(query_shape, jnp.float32),
        peak=jnp.full(query_shape, UNSEEN, jnp.float32),
    )
    sums, _ = around(ring, lambda sums, keys: (_add(sums, queries, keys, len(q), spec), keys), zeros, keys)
    total = jnp.where(sums.total > 0, sums.total, 1)
    out = _tokens(sums.value / total[..., None], q.shape).astype(q.dtype)
    return out, (q, k, v, query, key, out, sums.peak + jnp.log(total))


def _backward(spec, ring, saved, d_out):
    """Returns the gradients. Recomputes the weights of a block from the saved logarithms of the softmax denominators.

    The gradient of a score is weight * (d_out v - delta), where delta is the sum of out * d_out over a head.
    """
    q, k, v, query, key, out, log_total = saved
    kv_heads = k.shape[2]
    queries, keys = _queries(q, query, kv_heads, spec.scale), _keys(k, v, key)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
    out_terms = (_by_head(d_out, kv_heads), _by_head(delta, kv_heads)[..., 0], log_total)

    def step(d_q, blocks):
        keys, *d_keys = blocks
        d_q, d_keys = _add_gradients(d_q, d_keys, queries, keys, out_terms, len(q), spec)
        return d_q, (keys, *d_keys)

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    d_q, (_, d_k, d_v) = around(ring, step, zeros(queries.q), (keys, zeros(keys.k), zeros(keys.v)))
    d_q = _tokens(d_q, q.shape) * spec.scale
    d_k, d_v = (_tokens(gradient, x.shape).astype(x.dtype) for gradient, x in ((d_k, k), (d_v, v)))
    return d_q.astype(q.dtype), d_k, d_v, None, None


flash.defvjp(_forward, _backward)


def around(ring, step, carry, guests):
    """Applies `carry, guests = step(carry, guests)` on every device of a ring, as often as there are devices.

    After each step the guests move to the next device; at the end they are back on their own. XLA can overlap the
    transfer of guests that a step does not change with its computation. Without a ring, applies `step` once.
    """
    if not ring:
        return step(carry, guests)
    devices = jax.lax.axis_size(ring)
    to_next = [(i, (i + 1) % devices) for i in range(devices)]

    def visit(state, _):
        carry, guests = step(*state)
        return (carry, jax.tree.map(lambda x: jax.lax.ppermute(x, ring, to_next), guests)), None

    return jax.lax.scan(visit, (carry, guests), length=devices)[0]


def _add(sums: _Sums, queries: _Queries, keys: _Keys, rows: int, spec: AttentionSpec) -> _Sums:
    """Returns the partial sums with these keys added (online softmax)."""

    def block(_, args):
        sums, query, first, last = args

        def add_block(i, sums):
            key = _at(keys, i)
            scores, mask, _ = _scores(query, key, spec)
            peak = jnp.maximum(sums.peak, jnp.max(scores, axis=-1))
            weights = jnp.where(mask, jnp.exp(scores - peak[..., None]), 0)
            rescale = jnp.exp(sums.peak - peak)
            value = sums.value * rescale[..., None] + _product("Kqs,KsH->KqH", weights.astype(key.v.dtype), key.v)
            return _Sums(value, sums.total * rescale + jnp.sum(weights, axis=-1), peak)

        with _expected(keys, rows, spec):
            return None, jax.lax.fori_loop(first, last, add_block, sums)

    return jax.lax.scan(block, None, (sums, queries, *_bounds(queries, keys, rows)))[1]


def _add_gradients(d_q, d_keys, queries: _Queries, keys: _Keys, out_terms, rows: int, spec: AttentionSpec):
    """Returns the gradients (d_q, (d_k, d_v)) with the contributions of these keys added.

    `out_terms`: (d_out, delta, log_total) of the queries.
    """

    def block(d_keys, args):
        d_q, query, (d_out, delta, log_total), first, last = args

        def add_block(i, carry):
            d_q, d_k, d_v = carry
            key = _at(keys, i)
            scores, mask, slope = _scores(query, key, spec)
            weights = jnp.where(mask, jnp.exp(scores - log_total[..., None]), 0)
            d_weights = _product("KqH,KsH->Kqs", d_out, key.v)
            d_scores = (slope * weights * (d_weights - delta[..., None])).astype(key.k.dtype)
            d_k = _add_at(d_k, i, _product("Kqs,KqH->KsH", d_scores, query.q))
            d_v = _add_at(d_v, i, _product("Kqs,KqH->KsH", weights.astype(key.v.dtype), d_out))
            return d_q + _product("Kqs,KsH->KqH", d_scores, key.k), d_k, d_v

        with _expected(keys, rows, spec):
            d_q, *d_keys = jax.lax.fori_loop(first, last, add_block, (d_q, *d_keys))
        return d_keys, d_q

    d_keys, d_q = jax.lax.scan(block, d_keys, (d_q, queries, out_terms, *_bounds(queries, keys, rows)))
    return d_q, d_keys


def _expected(keys: _Keys, rows: int, spec: AttentionSpec):
    """Returns a scope with the mean number of key blocks that a block of queries visits in full rows."""
    count, size = len(keys.bounds.segment) // rows, keys.bounds.segment.shape[1]
    if not spec.causal:
        return expect_runs(count)
    before = math.ceil((spec.window - 1) / size) if spec.window else count
    return expect_runs(sum(min(block, before) + 1 for block in range(count)) / count)


def _scores(query: _Queries, key: _Keys, spec: AttentionSpec):
    """Returns (scores, mask, slope) of one block of queries and one of keys, each [K G*t s].

    Scores are f32 and capped; slope is their derivative by the uncapped scores.
    """
    scores = cap(_product("KqH,KsH->Kqs", query.q, key.k), spec.softcap)
    slope = 1 - (scores / spec.softcap) ** 2 if spec.softcap else 1.0
    mask = attention_mask(query.bounds, key.bounds) & (key.bounds.segment > 0)
    mask = repeat(mask, "t s -> (G t) s", G=scores.shape[1] // len(mask))
    return jnp.where(mask, scores, UNSEEN), mask, slope


def _at(tree, i):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _add_at(total, i, new):
    return jax.lax.dynamic_update_index_in_dim(total, _at(total, i) + new, i, 0)


def _bounds(queries: _Queries, keys: _Keys, rows: int):
    """Returns (first, last) i32[B*n] key block that each block of queries visits, `last` exclusive.

    Key blocks are numbered across rows: those of row 1 follow those of row 0.
    """
    query, key = queries.bounds, keys.bounds

    def ends(values, segment):
        """Returns (least, largest) [B n] value of each block without padding; an empty range for a block of padding."""
        limit = jnp.iinfo(jnp.int32)
        least = jnp.min(jnp.where(segment > 0, values, limit.max), axis=-1)
        largest = jnp.max(jnp.where(segment > 0, values, limit.min), axis=-1)
        return [rearrange(x, "(B n) -> B n", B=rows) for x in (least, largest)]

    (q_low, q_high), (k_low, k_high) = (ends(x.segment, x.segment) for x in (query, key))
    mask = (q_low[..., None] <= k_high[:, None]) & (k_low[:, None] <= q_high[..., None])
    earliest, latest = ends(key.place, key.segment)
    if query.last is not None:
        mask &= ends(query.last, query.segment)[1][..., None] >= earliest[:, None]
    if query.first is not None:
        mask &= ends(query.first, query.segment)[0][..., None] <= latest[:, None]
    count = mask.shape[-1]
    row = jnp.arange(rows)[:, None] * count
    first = row + jnp.argmax(mask, axis=-1)
    last = row + count - jnp.argmax(mask[..., ::-1], axis=-1)
    return rearrange(first, "B n -> (B n)"), rearrange(jnp.where(jnp.any(mask, axis=-1), last, first), "B n -> (B n)")


def _blocks(length: int) -> tuple[int, int]:
    """Returns (number, size) of the blocks of a row."""
    count = math.ceil(length / BLOCK)
    return count, math.ceil(length / count)


def _split(x):
    """Splits tokens [B T ...] into blocks [B*n t ...], padded with zeros."""
    count, size = _blocks(x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return rearrange(x, "B (n t) ... -> (B n) t ...", n=count)


def _queries(q, query: QueryBounds, kv_heads: int, scale: float) -> _Queries:
    return _Queries(_by_head(q * scale, kv_heads), jax.tree.map(_split, query))


def _keys(k, v, key: KeyBounds) -> _Keys:
    return _Keys(*(_by_head(x, k.shape[2]) for x in (k, v)), jax.tree.map(_split, key))


def _by_head(x, kv_heads: int):
    """Splits [B T N H] into blocks [B*n K G*t H], with the G query heads of a key head side by side."""
    return rearrange(_split(x), "X t (K G) H -> X K (G t) H", K=kv_heads)


def _tokens(x, shape):
    """Inverts `_by_head`; `shape` is [B T ...]."""
    rows, length = shape[:2]
    return rearrange(x, "(B n) K (G t) H -> B (n t) (K G) H", B=rows, t=_blocks(length)[1])[:, :length]
