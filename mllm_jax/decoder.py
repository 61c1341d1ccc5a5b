"""The language model: embedding, a stack of layers, and the head (Qwen3 arXiv 2505.09388, M-RoPE arXiv 2409.12191)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from mllm_jax.fusion import deepstack
from mllm_jax.nn.attention import attend
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.mlp import GatedMlp
from mllm_jax.nn.norm import RMSNorm
from mllm_jax.nn.rope import interleaved_axes, rope_table, rotate
from mllm_jax.nn.runtime import Runtime, rematted, scan_layers
from mllm_jax.sharding import named, shard
from mllm_jax.types import Cache


@dataclass(frozen=True)
class DecoderConfig:
    """rope_sections: frequency slots of (t, h, w) in interleaved M-RoPE; they add up to head_dim / 2."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 5e6
    rope_sections: tuple[int, int, int] = (24, 20, 20)
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"decoder.heads={self.heads} is not a multiple of decoder.kv_heads={self.kv_heads}")
        if sum(self.rope_sections) * 2 != self.head_dim:
            raise ValueError(
                f"decoder.rope_sections={self.rope_sections} must add up to head_dim / 2 = {self.head_dim / 2}"
            )


class Attention(nn.Module):
    config: DecoderConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x, rope, segment, cache):
        """`cache` is None, or ((k, v) [L B K S H] of all layers, this layer, segment of all slots, index of new ones).

        Only the new slots are written. A cache is large: taking a layer's part out and putting it back would cost more.
        """
        config, dtype = self.config, self.runtime.dtype
        width, head_dim = config.width, config.head_dim

        def project(name, heads, axis):
            return Einsum("...D,DNH->...NH", (width, heads, head_dim), ("embed", axis, "head_dim"), dtype, name=name)(x)

        q = RMSNorm(config.norm_eps, name="q_norm")(project("q", config.heads, "heads"))
        k = RMSNorm(config.norm_eps, name="k_norm")(project("k", config.kv_heads, "kv_heads"))
        v = project("v", config.kv_heads, "kv_heads")
        q, k = rotate(q, rope), rotate(k, rope)
        kv_segment, offset, kept = segment, None, None
        if cache is not None:
            kept, layer, kv_segment, offset = cache
            new = (rearrange(part, "B T K H -> 1 B K T H").astype(kept[0].dtype) for part in (k, v))
            at = (layer, 0, 0, offset, 0)
            kept = tuple(jax.lax.dynamic_update_slice(old, part, at) for old, part in zip(kept, new))
            own = (jax.lax.dynamic_index_in_dim(part, layer, keepdims=False) for part in kept)
            k, v = (rearrange(part, "B K S H -> B S K H") for part in own)
        out = attend(
            q, k, v, q_segment=segment, kv_segment=kv_segment, causal=True, runtime=self.runtime, offset=offset
        )
        shape = (config.heads, head_dim, width)
        return Einsum("...NH,NHD->...D", shape, ("heads", "head_dim", "embed"), dtype, name="out")(out), kept


class DecoderLayer(nn.Module):
    config: DecoderConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x, rope, segment, cache):
        config = self.config
        attended, kept = Attention(config, self.runtime, name="attention")(
            RMSNorm(config.norm_eps, name="norm1")(x), rope, segment, cache
        )
        x = x + attended
        mlp = GatedMlp(config.mlp, "silu", self.runtime.dtype, name="mlp")
        return x + mlp(RMSNorm(config.norm_eps, name="norm2")(x)), kept


class Decoder(nn.Module):
    config: DecoderConfig
    runtime: Runtime

    def setup(self):
        config = self.config
        init = nn.initializers.normal(config.width**-0.5)
        self.table = self.param("embed", named(init, "vocab", "embed"), (config.vocab, config.width))
        self.layers = rematted(DecoderLayer, self.runtime)(config, self.runtime)
        self.norm = RMSNorm(config.norm_eps)
        if not config.tie_embeddings:
            self.head = Einsum("...D,VD->...V", (config.vocab, config.width), ("vocab", "embed"), self.runtime.dtype)

    def embed(self, tokens):
        """i32[B T] -> [B T D]. The table is gathered first: a lookup in a sharded one makes XLA rematerialise it."""
        table = shard(self.table.astype(self.runtime.dtype), (None, None), self.runtime.rules)
        return shard(jnp.take(table, tokens, axis=0), ("batch", "length", None), self.runtime.rules)

    def __call__(self, x, position, segment, cache: Cache | None = None, deep=None, vision_index=None):
        """Embedded tokens [B T D] -> (hidden states [B T D] after the last norm, the cache with them)."""
        config = self.config
        slots = kept = None
        if cache is not None:
            known = jax.lax.dynamic_update_slice_in_dim(cache.segment, segment, cache.index, axis=1)
            slots, kept = (known, cache.index), (cache.k, cache.v)
        half = config.head_dim // 2
        frequencies = config.rope_theta ** (-np.arange(half, dtype=np.float32) / half)
        rope = rope_table(position, interleaved_axes(config.rope_sections), frequencies)

        def body(layer, carry, index):
            """A layer and what DeepStack adds to it. The whole cache is carried, so that it is updated in place."""
            x, kept = carry
            x, kept = layer(x, rope, segment, None if kept is None else (kept, index, *slots))
            if deep is not None:
                x = deepstack(x, deep, vision_index, index)
            return shard(x, ("batch", "length", None), self.runtime.rules), kept

        x, kept = scan_layers(body, self.layers, (x, kept), jnp.arange(config.layers), config.layers, self.runtime)
        if cache is not None:
            following = jnp.max(jnp.where(segment > 0, jnp.max(position, axis=-1) + 1, 0), axis=1)
            cache = Cache(*kept, slots[0], cache.index + x.shape[1], jnp.maximum(cache.position, following))
        return self.norm(x), cache

    def logits(self, x):
        """Hidden states [... D] -> f32[... V]."""
        if self.config.tie_embeddings:
            precision = jax.lax.Precision.HIGHEST if self.runtime.dtype == "float32" else None
            y = jnp.einsum("...D,VD->...V", x, self.table.astype(self.runtime.dtype), precision=precision)
        else:
            y = self.head(x)
        return y.astype(jnp.float32)
