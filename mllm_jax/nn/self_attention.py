"""Causal self-attention of a decoder with grouped key-value heads, rotary positions and a cache."""

from dataclasses import dataclass

import jax
import numpy as np
from einops import rearrange
from flax import linen as nn

from mllm_jax.nn.attention import attend
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.norm import RMSNorm
from mllm_jax.nn.rope import interleaved_axes, rope_table, rotate
from mllm_jax.nn.runtime import Runtime


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention (arXiv 2305.13245) with norms of queries and keys, as in Qwen3 (arXiv 2505.09388).

    rope_sections: frequency slots of (t, h, w) in interleaved M-RoPE; they add up to head_dim / 2.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 5e6
    rope_sections: tuple[int, int, int] = (24, 20, 20)

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"attention.heads={self.heads} is not a multiple of attention.kv_heads={self.kv_heads}")
        if sum(self.rope_sections) * 2 != self.head_dim:
            raise ValueError(
                f"attention.rope_sections={self.rope_sections} must add up to head_dim / 2 = {self.head_dim / 2}"
            )

    @property
    def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, values) of what the cache keeps of a token as `k` and as `v`."""
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)

    @property
    def pair_flops(self) -> int:
        """FLOPs of attention, forward, for a query and a key."""
        return 4 * self.heads * self.head_dim

    def rope(self, position):
        """Cosines and sines for rotary positions i32[B T 3]."""
        half = self.head_dim // 2
        frequencies = self.rope_theta ** (-np.arange(half, dtype=np.float32) / half)
        return rope_table(position, interleaved_axes(self.rope_sections), frequencies)

    def build(self, norm_eps: float, runtime: Runtime, name: str) -> nn.Module:
        return Attention(self, norm_eps, runtime, name=name)


def write_cache(cache, new):
    """Writes a layer's new tokens into a cache, and nothing else: a cache is large.

    Args:
      cache: ((k, v) [L B K S H] of all layers, this layer, ...).
      new: what to keep of the new tokens, (k, v) [B T K H].
    Returns:
      ((k, v) of all layers, this layer's (k, v) [B S K H]).
    """
    kept, layer, _, offset = cache
    new = (rearrange(part, "B T K H -> 1 B K T H").astype(old.dtype) for old, part in zip(kept, new))
    kept = tuple(jax.lax.dynamic_update_slice(old, part, (layer, 0, 0, offset, 0)) for old, part in zip(kept, new))
    own = (jax.lax.dynamic_index_in_dim(part, layer, keepdims=False) for part in kept)
    return kept, tuple(rearrange(part, "B K S H -> B S K H") for part in own)


class Attention(nn.Module):
    config: AttentionConfig
    norm_eps: float
    runtime: Runtime

    @nn.compact
    def __call__(self, x, rope, segment, cache):
        """x [B T D] -> ([B T D], the cache with the new tokens).

        Args:
          rope: of `AttentionConfig.rope`.
          segment: i32[B T].
          cache: None, or ((k, v) [L B K S H] of all layers, this layer, segment of all slots, index of new ones).
        """
        config, dtype = self.config, self.runtime.dtype
        width, head_dim = x.shape[-1], config.head_dim

        def project(name, heads, axis):
            return Einsum("...D,DNH->...NH", (width, heads, head_dim), ("embed", axis, "head_dim"), dtype, name=name)(x)

        q = RMSNorm(self.norm_eps, name="q_norm")(project("q", config.heads, "heads"))
        k = RMSNorm(self.norm_eps, name="k_norm")(project("k", config.kv_heads, "kv_heads"))
        v = project("v", config.kv_heads, "kv_heads")
        q, k = rotate(q, rope), rotate(k, rope)
        kv_segment, offset, kept = segment, None, None
        if cache is not None:
            kept, (k, v) = write_cache(cache, (k, v))
            _, _, kv_segment, offset = cache
        out = attend(
            q, k, v, q_segment=segment, kv_segment=kv_segment, causal=True, runtime=self.runtime, offset=offset
        )
        shape = (config.heads, head_dim, width)
        return Einsum("...NH,NHD->...D", shape, ("heads", "head_dim", "embed"), dtype, name="out")(out), kept
