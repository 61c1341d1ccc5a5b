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

    rope_theta: base of the frequencies of rotary positions. None: no rotary positions.
    rope_sections: frequency slots that read the axes (t, h, w) of a position; they add up to half of the rotated
      values.
    rope_layout: order of those slots: "interleaved" (t h w t h w ...) or "chunked" (t ... h ... w ...).
    rope_dim: number of first values of a head that are rotated. 0: all.
    rope_scaling: extension of rotary positions beyond the length of pretraining, one of nn/rope.py. None: none.
    qk_norm: whether queries and keys are normalized before rotation (arXiv 2302.05442).
    scale: factor of the scores. None: 1 / sqrt(head_dim).
    softcap: c, where scores are c tanh(score / c). 0: no cap.
    qkv_bias, out_bias: whether the projections to queries, keys and values, and the one back, have biases.
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
            raise ValueError(f"attention.heads={self.heads} is not a multiple of attention.kv_heads={self.kv_heads}")
        turns = self.rope_dim or self.head_dim
        if self.rope_theta is not None and sum(self.rope_sections) * 2 != turns:
            name = "rope_dim" if self.rope_dim else "head_dim"
            raise ValueError(f"attention.rope_sections={self.rope_sections} must add up to {name} / 2 = {turns / 2}")

    @property
    def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, values) of what the cache keeps of a token as `k` and as `v`."""
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)

    @property
    def pair_flops(self) -> int:
        """FLOPs of attention, forward, for a query and a key."""
        return 4 * self.heads * self.head_dim

    def rope(self, position, segment):
        """Cosines and sines for rotary positions i32[B T 3] of conversations i32[B T]. None: there are no rotary
        positions."""
        if self.rope_theta is None:
            return None
        axes, stretch, turns = (
            LAYOUTS[self.rope_layout](self.rope_sections),
            self.rope_scaling,
            2 * sum(self.rope_sections),
        )
        if stretch is None:
            return rope_table(position, axes, frequencies(self.rope_theta, turns).astype(np.float32))
        length = (longest(position, segment),) if stretch.by_length else ()
        table = rope_table(position, axes, stretch.frequencies(self.rope_theta, turns, *length))
        return tuple(part * stretch.table_scale for part in table)

    def build(self, norm_eps: float, window: int, runtime: Runtime, name: str) -> nn.Module:
        """`window`: number of last tokens of its conversation that a token attends to, itself included. 0: all."""
        return Attention(self, norm_eps, window, runtime, name=name)


def write_cache(cache, new, segment):
    """Writes a layer's new tokens into a cache, and only these: a cache is large.

    Args:
      cache: ((k, v) [L B K S H] of all layers, this layer, segment of all slots, index of new ones), or None.
      new: keys and values of the new tokens, (k, v) [B T K H].
      segment: i32[B T] of the new tokens.
    Returns:
      ((k, v) of all layers, this layer's (k, v) [B S K H], their segment i32[B S], index of the new ones); without a
      cache (None, `new`, `segment`, None).
    """
    if cache is None:
        return None, new, segment, None
    kept, layer, kv_segment, offset = cache
    new = (rearrange(part, "B T K H -> 1 B K T H").astype(old.dtype) for old, part in zip(kept, new))
    kept = tuple(jax.lax.dynamic_update_slice(old, part, (layer, 0, 0, offset, 0)) for old, part in zip(kept, new))
    own = (jax.lax.dynamic_index_in_dim(part, layer, keepdims=False) for part in kept)
    return kept, tuple(rearrange(part, "B K S H -> B S K H") for part in own), kv_segment, offset


class Attention(nn.Module):
    config: AttentionConfig
    norm_eps: float
    window: int
    runtime: Runtime

    @nn.compact
    def __call__(self, x, rope, segment, cache, prefix=None):
        """x [B T D] -> ([B T D], the cache with the new tokens).

        Args:
          rope: cosines and sines of `AttentionConfig.rope`.
          segment: i32[B T].
          cache: None, or ((k, v) [L B K S H] of all layers, this layer, segment of all slots, index of new ones).
          prefix: bool[B T] first tokens of a conversation, which attend to each other. None: there are none.
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
        kept, (k, v), kv_segment, offset = write_cache(cache, (k, v), segment)
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
        return Einsum("...NH,NHD->...D", shape, axes, dtype, bias=config.out_bias, name="out")(out), kept

    def attend(self, q, k, v, **about):
        """`nn.attention.attend`, as a method: a listener can stand before it (model/attention_maps.py does)."""
        return attend(q, k, v, runtime=self.runtime, **about)
