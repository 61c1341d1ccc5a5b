"""Flash attention in plain XLA (arXiv 2205.14135): exact, without all scores at once, and without masked blocks.

Tokens are processed in blocks. A block of queries meets only the blocks of keys between the first and the last that any
of its queries attends to, which is computed at run time (nn/attention/masks.py): in packed rows, and outside windows,
most of the square is skipped.
The sum over keys may go around a ring of devices that hold a shard of the keys each (Ring Attention, arXiv 2310.01889).
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
UNSEEN = -1e30  # a finite score, so that a query without keys yields no NaN
_product = partial(einsum, out=jnp.float32)


class _Queries(NamedTuple):
    """n blocks of t queries in each of B rows."""

    q: Array  # [B*n K G*t H], scaled
    bounds: QueryBounds  # of [B*n t]


class _Keys(NamedTuple):
    """n blocks of s keys in each of B rows."""

    k: Array  # [B*n K s H]
    v: Array  # [B*n K s H]
    bounds: KeyBounds  # of [B*n s]


class _Sums(NamedTuple):
    """Partial sums of the softmax over the keys so far, for each query."""

    value: Array  # f32[B*n K G*t H] sum of exp(score - peak) * v
    total: Array  # f32[B*n K G*t] sum of exp(score - peak)
    peak: Array  # f32[B*n K G*t] largest score


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def flash(q, k, v, query: QueryBounds, key: KeyBounds, spec: AttentionSpec, ring: tuple[str, ...] = ()):
    """softmax(scale q k^T) v over the keys that each query attends to.

    Args:
      q: [B T N H]; k, v: [B S K H] with N a multiple of K; the values may have another H.
      query, key: bounds from `mask_bounds`. Padding attends to nothing and has zeros as its result.
      ring: names of the mesh axes (inside `shard_map`) that shard the keys.
    Returns:
      [B T N H] in the dtype of q.
    """
    return _forward(q, k, v, query, key, spec, ring)[0]


def _forward(q, k, v, query, key, spec, ring):
    queries, keys = _queries(q, query, k.shape[2], spec.scale), _keys(k, v, key)
    of_query = queries.q.shape[:-1]
    zeros = _Sums(
        value=jnp.zeros((*of_query, v.shape[-1]), jnp.float32),
        total=jnp.zeros(of_query, jnp.float32),
        peak=jnp.full(of_query, UNSEEN, jnp.float32),
    )
    sums, _ = around(ring, lambda sums, keys: (_add(sums, queries, keys, len(q), spec), keys), zeros, keys)
    total = jnp.where(sums.total > 0, sums.total, 1)
    out = _tokens(sums.value / total[..., None], q.shape).astype(q.dtype)
    return out, (q, k, v, query, key, out, sums.peak + jnp.log(total))


def _backward(spec, ring, saved, d_out):
    """Recomputes the scores of a block from the saved logarithms of the softmax's denominators."""
    q, k, v, query, key, out, log_total = saved
    kv_heads = k.shape[2]
    queries, keys = _queries(q, query, kv_heads, spec.scale), _keys(k, v, key)
    along = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
    about = (_by_head(d_out, kv_heads), _by_head(along, kv_heads)[..., 0], log_total)

    def step(d_q, guests):
        keys, *d_keys = guests
        d_q, d_keys = _add_gradients(d_q, d_keys, queries, keys, about, len(q), spec)
        return d_q, (keys, *d_keys)

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    d_q, (_, d_k, d_v) = around(ring, step, zeros(queries.q), (keys, zeros(keys.k), zeros(keys.v)))
    d_q = _tokens(d_q, q.shape) * spec.scale
    d_k, d_v = (_tokens(gradient, x.shape).astype(x.dtype) for gradient, x in ((d_k, k), (d_v, v)))
    return d_q.astype(q.dtype), d_k, d_v, None, None


flash.defvjp(_forward, _backward)


def around(ring, step, carry, guests):
    """`carry, guests = step(carry, guests)` on every device of a ring; the guests move on after each step and end where
    they began. Those that a step does not change are already on their way while it computes."""
    if not ring:
        return step(carry, guests)
    devices = jax.lax.axis_size(ring)
    onward = [(i, (i + 1) % devices) for i in range(devices)]

    def turn(state, _):
        carry, guests = step(*state)
        return (carry, jax.tree.map(lambda x: jax.lax.ppermute(x, ring, onward), guests)), None

    return jax.lax.scan(turn, (carry, guests), length=devices)[0]


def _add(sums: _Sums, queries: _Queries, keys: _Keys, rows: int, spec: AttentionSpec) -> _Sums:
    """The sums with these keys in them (online softmax)."""

    def block(_, args):
        sums, query, first, last = args

        def meet(i, sums):
            key = _at(keys, i)
            scores, seen, _ = _scores(query, key, spec)
            peak = jnp.maximum(sums.peak, jnp.max(scores, axis=-1))
            weights = jnp.where(seen, jnp.exp(scores - peak[..., None]), 0)
            fade = jnp.exp(sums.peak - peak)
            value = sums.value * fade[..., None] + _product("Kqs,KsH->KqH", weights.astype(key.v.dtype), key.v)
            return _Sums(value, sums.total * fade + jnp.sum(weights, axis=-1), peak)

        with _expected(keys, rows, spec):
            return None, jax.lax.fori_loop(first, last, meet, sums)

    return jax.lax.scan(block, None, (sums, queries, *_bounds(queries, keys, rows)))[1]


def _add_gradients(d_q, d_keys, queries: _Queries, keys: _Keys, about, rows: int, spec: AttentionSpec):
    """The gradients with what meets these keys in them: d_q, (d_k, d_v)."""

    def block(d_keys, args):
        d_q, query, (d_out, along, log_total), first, last = args

        def meet(i, carry):
            d_q, d_k, d_v = carry
            key = _at(keys, i)
            scores, seen, slope = _scores(query, key, spec)
            weights = jnp.where(seen, jnp.exp(scores - log_total[..., None]), 0)
            d_weights = _product("KqH,KsH->Kqs", d_out, key.v)
            d_scores = (slope * weights * (d_weights - along[..., None])).astype(key.k.dtype)
            d_k = _add_at(d_k, i, _product("Kqs,KqH->KsH", d_scores, query.q))
            d_v = _add_at(d_v, i, _product("Kqs,KqH->KsH", weights.astype(key.v.dtype), d_out))
            return d_q + _product("Kqs,KsH->KqH", d_scores, key.k), d_k, d_v

        with _expected(keys, rows, spec):
            d_q, *d_keys = jax.lax.fori_loop(first, last, meet, (d_q, *d_keys))
        return d_keys, d_q

    d_keys, d_q = jax.lax.scan(block, d_keys, (d_q, queries, about, *_bounds(queries, keys, rows)))
    return d_q, d_keys


def _expected(keys: _Keys, rows: int, spec: AttentionSpec):
    """The scope of a loop over the blocks of keys that a block of queries meets."""
    count, size = len(keys.bounds.segment) // rows, keys.bounds.segment.shape[1]
    if not spec.causal:
        return expect_runs(count)
    before = math.ceil((spec.window - 1) / size) if spec.window else count
    return expect_runs(sum(min(block, before) + 1 for block in range(count)) / count)


def _scores(query: _Queries, key: _Keys, spec: AttentionSpec):
    """f32[K G*t s], which of them count, and their derivative by what they were before they were capped; for one block
    of queries and one of keys."""
    scores = cap(_product("KqH,KsH->Kqs", query.q, key.k), spec.softcap)
    slope = 1 - (scores / spec.softcap) ** 2 if spec.softcap else 1.0
    seen = attention_mask(query.bounds, key.bounds) & (key.bounds.segment > 0)
    seen = repeat(seen, "t s -> (G t) s", G=scores.shape[1] // len(seen))
    return jnp.where(seen, scores, UNSEEN), seen, slope


def _at(tree, i):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _add_at(total, i, new):
    return jax.lax.dynamic_update_index_in_dim(total, _at(total, i) + new, i, 0)


def _bounds(queries: _Queries, keys: _Keys, rows: int):
    """i32[B*n], i32[B*n]: the first block of keys that a block of queries may see, and one past the last."""

    query, key = queries.bounds, keys.bounds

    def ends(values, segment):
        """(least, largest) [B n] of each block without its padding; an empty range for a block of padding."""
        limit = jnp.iinfo(jnp.int32)
        least = jnp.min(jnp.where(segment > 0, values, limit.max), axis=-1)
        largest = jnp.max(jnp.where(segment > 0, values, limit.min), axis=-1)
        return [rearrange(x, "(B n) -> B n", B=rows) for x in (least, largest)]

    (q_low, q_high), (k_low, k_high) = (ends(x.segment, x.segment) for x in (query, key))
    meet = (q_low[..., None] <= k_high[:, None]) & (k_low[:, None] <= q_high[..., None])
    earliest, latest = ends(key.place, key.segment)
    if query.last is not None:
        meet &= ends(query.last, query.segment)[1][..., None] >= earliest[:, None]
    if query.first is not None:
        meet &= ends(query.first, query.segment)[0][..., None] <= latest[:, None]
    count = meet.shape[-1]
    row = jnp.arange(rows)[:, None] * count
    first = row + jnp.argmax(meet, axis=-1)
    last = row + count - jnp.argmax(meet[..., ::-1], axis=-1)
    return rearrange(first, "B n -> (B n)"), rearrange(jnp.where(jnp.any(meet, axis=-1), last, first), "B n -> (B n)")


def _blocks(length: int) -> tuple[int, int]:
    """(number, size) of the blocks of a row."""
    count = math.ceil(length / BLOCK)
    return count, math.ceil(length / count)


def _split(x):
    """[B T ...] -> [B*n t ...], padded with zeros."""
    count, size = _blocks(x.shape[1])
    x = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return rearrange(x, "B (n t) ... -> (B n) t ...", n=count)


def _queries(q, query: QueryBounds, kv_heads: int, scale: float) -> _Queries:
    return _Queries(_by_head(q * scale, kv_heads), jax.tree.map(_split, query))


def _keys(k, v, key: KeyBounds) -> _Keys:
    return _Keys(*(_by_head(x, k.shape[2]) for x in (k, v)), jax.tree.map(_split, key))


def _by_head(x, kv_heads: int):
    """[B T N H] -> [B*n K G*t H]: queries that read the same keys stand together."""
    return rearrange(_split(x), "X t (K G) H -> X K (G t) H", K=kv_heads)


def _tokens(x, shape):
    """The inverse of `_by_head`; `shape` is [B T ...]."""
    rows, length = shape[:2]
    return rearrange(x, "(B n) K (G t) H -> B (n t) (K G) H", B=rows, t=_blocks(length)[1])[:, :length]
