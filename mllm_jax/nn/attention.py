"""The one door to attention: segments, causal or full, grouped heads, on every platform."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.nn.kernels import KERNELS, kernel_for
from mllm_jax.nn.runtime import Runtime

SCORES = 2**22  # scores of one head and batch row that are held at once before queries are taken in chunks


def attend(q, k, v, *, q_segment, kv_segment, causal: bool, runtime: Runtime, offset=None):
    """softmax(q k^T / sqrt(H)) v, where a query sees the keys of its own segment, and none after itself if causal.

    Padding has a segment of its own (0), so that no row of scores is ever empty.

    Args:
      q: [B T N H]; k, v: [B S K H] with N a multiple of K (head n reads key-value head n // (N / K)).
      q_segment: i32[B T]; kv_segment: i32[B S].
      causal: query t stands at key slot offset + t and sees slots up to its own.
      runtime: `attention` picks the implementation, `rules` how a kernel is split over the mesh.
      offset: i32[] first slot of the queries when reading a cache; None where queries and keys are the same tokens.
    Returns:
      [B T N H] in the dtype of q.
    Raises:
      ValueError: an implementation was asked for by name that cannot take these shapes.
    """
    if offset is None:
        name = kernel_for(q, k, runtime.attention)
        if name != "xla":
            return KERNELS[name](q, k, v, q_segment, kv_segment, causal, runtime.rules)
        offset = 0
    return _attend_xla(q, k, v, q_segment, kv_segment, causal, offset)


def _attend_xla(q, k, v, q_segment, kv_segment, causal, offset):
    """Plain attention, in chunks of queries where all scores at once would be too many; backward recomputes a chunk."""
    length = q.shape[1]
    chunks = math.ceil(length * k.shape[1] / SCORES)
    if chunks <= 1:
        return _attend_dense(q, k, v, q_segment, kv_segment, offset + jnp.arange(length), causal)
    size = math.ceil(length / chunks)
    pad = chunks * size - length

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
        return rearrange(x, "B (chunk size) ... -> chunk B size ...", size=size)

    @jax.checkpoint
    def chunk(args):
        q, segment, start = args
        return _attend_dense(q, k, v, segment, kv_segment, offset + start + jnp.arange(size), causal)

    out = jax.lax.map(chunk, (split(q), split(q_segment), jnp.arange(chunks) * size))
    return rearrange(out, "chunk B size N H -> B (chunk size) N H")[:, :length]


def _attend_dense(q, k, v, q_segment, kv_segment, q_slot, causal):
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    q = rearrange(q, "B T (K G) H -> B K G T H", K=k.shape[2])
    scores = jnp.einsum(
        "BKGTH,BSKH->BKGTS", q * q.shape[-1] ** -0.5, k, precision=precision, preferred_element_type=jnp.float32
    )
    mask = q_segment[:, :, None] == kv_segment[:, None, :]
    if causal:
        mask &= q_slot[:, None] >= jnp.arange(k.shape[1])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKH->BKGTH", weights, v, precision=precision)
    return rearrange(out, "B K G T H -> B T (K G) H")
