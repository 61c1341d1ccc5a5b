"""Causal self-attention of a decoder with grouped key-value heads, rotary positions and a cache."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np
from einops import rearrange
from flax import linen as nn

from mllm_jax.common.settings import Config, NonNegative, NonNegativeInt, OneOf, Positive, PositiveInt
from mllm_jax.nn.attention.attend import attend
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.norm import RMSNorm
from mllm_jax.nn.rope import LAYOUTS, frequencies, longest, rope_table, rotate
from mllm_jax.nn.runtime import Runtime


@dataclass(frozen=True)
class AttentionConfig(Config):
    """Grouped-query attention (arXiv 2305.13245).

    rope_theta: base of the rotary frequencies. None: no rotary positions.
    rope_sections: number of frequency slots for the axes (t, h, w) of a position. Their sum is half of the rotated
      values.
    rope_layout: order of those slots: "interleaved" (t h w t h w ...) or "chunked" (t ... h ... w ...).
    rope_dim: number of leading values of a head that are rotated. 0: all.
    rope_scaling: extension of rotary positions beyond the pretraining length, one of nn/rope.py. None: no extension.
    qk_norm: whether queries and keys are normalized before rotation (arXiv 2302.05442).
    scale: factor of the scores. None: 1 / sqrt(head_dim).
    softcap: bound c of the scores: c tanh(score / c). 0: no cap.
    qkv_bias, out_bias: whether the projections to queries, keys and values, and the output projection, have biases.
    """

    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    rope_theta: Positive | None = 5e6
    rope_sections: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] = (24, 20, 20)
    rope_layout: Annotated[str, OneOf(tuple(LAYOUTS))] = "interleaved"
    rope_dim: NonNegativeInt = 0
    rope_scaling: Any = None
    qk_norm: bool = True
    scale: Positive | None = None
    softcap: NonNegative = 0.0
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.heads % self.kv_heads:
            raise ValueError(f"attention.heads={self.heads}: must be a multiple of attention.kv_heads={self.kv_heads}.")
        rope_dim = self.rope_dim or self.head_dim
        if self.rope_theta is not None and sum(self.rope_sections) * 2 != rope_dim:
            name = "rope_dim" if self.rope_dim else "head_dim"
            raise ValueError(f"attention.rope_sections={self.rope_sections}: must sum to {name} / 2 = {rope_dim / 2}.")

    @property
    def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes (heads, values) of a token's `k` and `v` in the cache."""
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)

    @property
    def pair_flops(self) -> int:
        """FLOPs of attention per pair of query and key, forward only."""
        return 4 * self.heads * self.head_dim

    def rope(self, position, segment):
        """Returns cosines and sines, each f32[B T rope_dim/2], or None without rotary positions.

        Args:
          position: i32[B T 3] rotary positions.
          segment: i32[B T], for scalings that depend on the length of a conversation.
        """
        if self.rope_theta is None:
            return None
        axes, scaling, rope_dim = (
            LAYOUTS[self.rope_layout](self.rope_sections),
            self.rope_scaling,
            2 * sum(self.rope_sections),
        )
        if scaling is None:
            return rope_table(position, axes, frequencies(self.rope_theta, rope_dim).astype(np.float32))
        length = (longest(position, segment),) if scaling.by_length else ()
        table = rope_table(position, axes, scaling.frequencies(self.rope_theta, rope_dim, *length))
        return tuple(part * scaling.table_scale for part in table)

    def build(self, norm_eps: float, window: int, runtime: Runtime, name: str) -> nn.Module:
        """Returns the layer's module. `window`: number of last tokens that a token attends to, with itself. 0: all."""
        return Attention(self, norm_eps, window, runtime, name=name)


def write_cache(cache, new, segment):
    """Writes a layer's new tokens into the cache of all layers. Updates only their slots, because a cache is large.

    Args:
      cache: ((k, v) [L B K S H] of all layers, index of this layer, segment i32[B S] of all slots, index of the first
        new slot), or None.
      new: keys and values (k, v) of the new tokens, each [B T K H].
      segment: i32[B T] of the new tokens.
    Returns:
      ((k, v) of all layers, this layer's (k, v) [B S K H], their segment i32[B S], index of the first new slot), or
      (None, `new`, `segment`, None) without a cache.
    """
    if cache is None:
        return None, new, segment, None
    arrays, layer, kv_segment, offset = cache
    new = (rearrange(part, "B T K H -> 1 B K T H").astype(old.dtype) for old, part in zip(arrays, new))
    arrays = tuple(jax.lax.dynamic_update_slice(old, part, (layer, 0, 0, offset, 0)) for old, part in zip(arrays, new))
    layer_kv = (jax.lax.dynamic_index_in_dim(part, layer, keepdims=False) for part in arrays)
    return arrays, tuple(rearrange(part, "B K S H -> B S K H") for part in layer_kv), kv_segment, offset


class Attention(nn.Module):
    config: AttentionConfig
    norm_eps: float
    window: int
    runtime: Runtime

    @nn.compact
    def __call__(self, x, rope, segment, cache, prefix=None):
        """Returns attention [B T D] and the (k, v) of the cache with the new tokens.

        Args:
          x: [B T D].
          rope: cosines and sines from `AttentionConfig.rope`.
          segment: i32[B T].
          cache: cache of `write_cache`, or None.
          prefix: bool[B T] first tokens of a conversation, which attend to each other. None: no prefix.
        """
        config, dtype = self.config, self.runtime.dtype
        width, head_dim = x.shape[-1], config.head_dim

        def project(name, heads, axis):
            shape, axes = (width, heads, head_dim), ("embed", axis, "head_dim")
            return Einsum("...D,DNH->...NH", shape, axes, dtype, bias=config.qkv_bias, name=name)(x)

        q = project("q", config.heads, "heads")
        k, v = (project(name, config.kv_heads, "kv_heads") for name in ("k", "v"))
        if config.qk_norm:
            q, k = (RMSNorm(self.norm_eps, name=f"{name}_norm")(part) for name, part in (("q", q), ("k", k)))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        new_cache, (k, v), kv_segment, offset = write_cache(cache, (k, v), segment)
        out = self.attend(
            q,
            k,
            v,
            q_segment=segment,
            kv_segment=kv_segment,
            causal=True,
            offset=offset,
            scale=config.scale,
            softcap=config.softcap,
            window=self.window,
            prefix=prefix,
        )
        shape, axes = (config.heads, head_dim, width), ("heads", "head_dim", "embed")
        return Einsum("...NH,NHD->...D", shape, axes, dtype, bias=config.out_bias, name="out")(out), new_cache

    def attend(self, q, k, v, **options):
        """Calls `attend` as a method, which an interceptor can observe (model/attention_maps.py does)."""
        return attend(q, k, v, runtime=self.runtime, **options)
