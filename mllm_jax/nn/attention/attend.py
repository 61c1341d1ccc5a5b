"""Attention over packed rows on every platform: causal or full, with windows, prefixes and grouped heads."""

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.nn.attention.context_parallel import exchange_for, ring, ulysses
from mllm_jax.nn.attention.flash import flash
from mllm_jax.nn.attention.kernels import KERNELS, kernel_for, over_mesh
from mllm_jax.nn.attention.masks import AttentionSpec, KeyBounds, QueryBounds, attention_mask, cap, mask_bounds
from mllm_jax.nn.precision import einsum
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.logical_axes import divisible_axes

SCORES = 2**18  # largest T x S of a head and batch row that is computed at once; larger ones are computed in blocks


def attend(
    q,
    k,
    v,
    *,
    q_segment,
    kv_segment,
    causal: bool,
    runtime: Runtime,
    offset=None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    prefix=None,
):
    """Returns softmax(scale q k^T) v. A query attends to keys of its own segment, and to no later ones if causal.

    Segment 0 is padding; its results are finite but meaningless.

    Args:
      q: [B T N H]; k, v: [B S K H] with N a multiple of K (head n reads key-value head n // (N / K)).
      q_segment: i32[B T]; kv_segment: i32[B S].
      causal: whether query t, at key slot offset + t, attends only to slots up to its own.
      runtime: `attention` selects the implementation, `rules` its sharding over the mesh, and `context` the exchange of
        tokens that are sharded over devices.
      offset: i32[] slot of the first query in a cache. None: queries and keys are the same tokens.
      scale: factor of the scores. None: 1 / sqrt(H).
      softcap: bound c of the scores: c tanh(score / c). 0: no cap.
      window: number of last tokens of the conversation that a causal query attends to, itself included. 0: all.
      prefix: bool[B T] first tokens of a conversation that attend to each other, regardless of causality and window.
    Returns:
      [B T N H] in the dtype of q.
    Raises:
      ValueError: the implementation that `runtime` names does not support this attention, or attention that is not
        causal has a window or a prefix.
    """
    if not causal and (window or prefix is not None):
        raise ValueError("causal=False: a window or a prefix needs causal attention. Set causal=True or remove them.")
    spec = _spec(q, causal, scale, softcap, window, prefix)
    query, key = mask_bounds(spec, q_segment, kv_segment, offset, prefix)
    tokens = () if offset is not None else _context(q.shape[1], runtime)
    if tokens:
        kernel = partial(_attend_across, tokens=tokens, spec=spec, runtime=runtime)
    else:
        name = "xla" if offset is not None else kernel_for(q, k, spec, runtime.attention)
        if name == "xla" and q.shape[1] * k.shape[1] <= SCORES:
            return _attend_dense(q, k, v, query, key, spec)  # XLA can shard it over a mesh
        kernel = partial(_attend_on_device, name=name, spec=spec)
    return over_mesh(kernel, q, k, v, query, key, runtime.rules, tokens)


def probabilities(
    q,
    k,
    at,
    *,
    q_segment,
    kv_segment,
    causal: bool,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    prefix=None,
):
    """Returns the attention weights of `attend` for a few queries. Other arguments are those of `attend`.

    Args:
      at: i32[B Q] indices of the queries.
    Returns:
      f32[B N Q S]; each row sums to 1.
    """
    spec = _spec(q, causal, scale, softcap, window, prefix)
    query, key = mask_bounds(spec, q_segment, kv_segment, prefix=prefix)
    query = jax.tree.map(lambda x: jnp.take_along_axis(x, at, axis=1), query)
    weights = _weights(jnp.take_along_axis(q, at[..., None, None], axis=1), k, query, key, spec)
    return rearrange(weights, "B K G T S -> B (K G) T S")


def _spec(q, causal: bool, scale: float | None, softcap: float, window: int, prefix) -> AttentionSpec:
    return AttentionSpec(causal, q.shape[-1] ** -0.5 if scale is None else scale, softcap, window, prefix is not None)


def _context(length: int, runtime: Runtime) -> tuple[str, ...]:
    """Returns the axes of the ambient mesh that shard the tokens of a row."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if mesh.empty else divisible_axes("length", length, runtime.rules, mesh)


def _attend_across(q, k, v, query: QueryBounds, key: KeyBounds, tokens, spec: AttentionSpec, runtime: Runtime):
    """Returns attention of a device's queries to the keys of all devices along the mesh axes `tokens`."""
    devices = jax.lax.axis_size(tokens)
    if exchange_for(q.shape[2], k.shape[2], devices, runtime.context) == "ring":
        return ring(q, k, v, query, key, tokens, spec)

    def kernel(q, k, *args):
        return _attend_on_device(q, k, *args, kernel_for(q, k, spec, runtime.attention), spec)

    return ulysses(q, k, v, query, key, tokens, kernel)


def _attend_on_device(q, k, v, query: QueryBounds, key: KeyBounds, name: str, spec: AttentionSpec):
    if name != "xla":
        return KERNELS[name](q, k, v, query, key, spec)
    attend = _attend_dense if q.shape[1] * k.shape[1] <= SCORES else flash
    return attend(q, k, v, query, key, spec)


def _attend_dense(q, k, v, query: QueryBounds, key: KeyBounds, spec: AttentionSpec):
    weights = _weights(q, k, query, key, spec).astype(v.dtype)
    out = einsum("BKGTS,BSKH->BKGTH", weights, v)
    return rearrange(out, "B K G T H -> B T (K G) H")


def _weights(q, k, query: QueryBounds, key: KeyBounds, spec: AttentionSpec):
    """Returns attention weights f32[B K G T S]."""
    q = rearrange(q, "B T (K G) H -> B K G T H", K=k.shape[2])
    scores = einsum("BKGTH,BSKH->BKGTS", q * spec.scale, k, jnp.float32)
    mask = attention_mask(query, key)[:, None, None]
    scores = jnp.where(mask, cap(scores, spec.softcap), jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)
