"""The language model: embedding, a stack of layers, and the head (Qwen3 arXiv 2505.09388, M-RoPE arXiv 2409.12191)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.fusion import deepstack
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.mlp import GatedMlp
from mllm_jax.nn.moe import Moe, MoeConfig
from mllm_jax.nn.norm import RMSNorm
from mllm_jax.nn.runtime import Runtime, rematted
from mllm_jax.nn.stack import scan_segment, segments
from mllm_jax.sharding import named, shard
from mllm_jax.types import Cache

DENSE, EXPERTS = "dense", "experts"  # kinds of layers


@dataclass(frozen=True)
class DecoderConfig:
    """
    attention: AttentionConfig or MlaConfig.
    mlp: width of the feed-forward block of layers without experts.
    moe: experts in place of that block, in the layers that `dense_first` and `moe_every` leave them; None = nowhere.
    dense_first: so many layers at the beginning have none.
    moe_every: every n-th layer has them, counted so that with 2 the second is the first to have them.
    """

    vocab: int
    width: int
    layers: int
    attention: Any
    mlp: int
    moe: MoeConfig | None = None
    dense_first: int = 0
    moe_every: int = 1
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of every layer, whether it has experts."""
        has = lambda i: self.moe is not None and i >= self.dense_first and (i + 1) % self.moe_every == 0
        return tuple(EXPERTS if has(i) else DENSE for i in range(self.layers))


class DecoderLayer(nn.Module):
    config: DecoderConfig
    runtime: Runtime
    kind: str

    @nn.compact
    def __call__(self, x, rope, segment, modality, cache):
        config, runtime = self.config, self.runtime
        attended, kept = config.attention.build(config.norm_eps, runtime, name="attention")(
            RMSNorm(config.norm_eps, name="norm1")(x), rope, segment, cache
        )
        x = x + attended
        y = RMSNorm(config.norm_eps, name="norm2")(x)
        if self.kind == DENSE:
            return x + GatedMlp(config.mlp, "silu", runtime.dtype, name="mlp")(y), kept, None
        y, routing = Moe(config.moe, runtime, name="mlp")(y, segment, modality)
        return x + y, kept, routing


class Pattern(nn.Module):
    """Layers of several kinds that repeat together."""

    config: DecoderConfig
    runtime: Runtime
    kinds: tuple[str, ...]

    def setup(self):
        self.slots = [_layer(self.config, self.runtime, kind) for kind in self.kinds]


def _layer(config: DecoderConfig, runtime: Runtime, kind: str) -> nn.Module:
    return rematted(DecoderLayer, runtime)(config, runtime, kind)


class Decoder(nn.Module):
    config: DecoderConfig
    runtime: Runtime

    def setup(self):
        config, runtime = self.config, self.runtime
        init = nn.initializers.normal(config.width**-0.5)
        self.table = self.param("embed", named(init, "vocab", "embed"), (config.vocab, config.width))
        for part in segments(config.kinds):
            one = len(part.pattern) == 1
            layers = _layer(config, runtime, *part.pattern) if one else Pattern(config, runtime, part.pattern)
            setattr(self, part.name, layers)
        self.norm = RMSNorm(config.norm_eps)
        if not config.tie_embeddings:
            self.head = Einsum("...D,VD->...V", (config.vocab, config.width), ("vocab", "embed"), runtime.dtype)

    def embed(self, tokens):
        """i32[B T] -> [B T D]. The table is gathered first: a lookup in a sharded one makes XLA rematerialise it."""
        table = shard(self.table.astype(self.runtime.dtype), (None, None), self.runtime.rules)
        return shard(jnp.take(table, tokens, axis=0), ("batch", "length", None), self.runtime.rules)

    def __call__(self, x, position, segment, modality, cache: Cache | None = None, deep=None, vision_index=None):
        """Embedded tokens -> hidden states after the last norm.

        Args:
          x: [B T D]; position: i32[B T 3]; segment: i32[B T].
          modality: i32[B T] index into MODALITIES.
          deep, vision_index: what DeepStack adds to the first layers, see `fusion.deepstack`.
        Returns:
          ([B T D], the cache with these tokens, Routing of all layers with experts or None).
        """
        config = self.config
        slots = kept = None
        if cache is not None:
            known = jax.lax.dynamic_update_slice_in_dim(cache.segment, segment, cache.index, axis=1)
            slots, kept = (known, cache.index), (cache.k, cache.v)
        rope = config.attention.rope(position)

        def step(layer, carry, number):
            """A layer and what DeepStack adds to it. The whole cache is carried, so that it is updated in place."""
            x, kept = carry
            own = None if kept is None else (kept, number, *slots)
            x, kept, routing = layer(x, rope, segment, modality, own)
            if deep is not None:
                x = deepstack(x, deep, vision_index, number)
            return (shard(x, ("batch", "length", None), self.runtime.rules), kept), routing

        carry, routings = (x, kept), []
        for part in segments(config.kinds):
            carry, routing = scan_segment(step, getattr(self, part.name), carry, part, self.runtime)
            routings += [] if routing is None else [routing]
        x, kept = carry
        if cache is not None:
            following = jnp.max(jnp.where(segment > 0, jnp.max(position, axis=-1) + 1, 0), axis=1)
            cache = Cache(*kept, slots[0], cache.index + x.shape[1], jnp.maximum(cache.position, following))
        routing = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routings) if routings else None
        return self.norm(x), cache, routing

    def logits(self, x):
        """Hidden states [... D] -> f32[... V]."""
        if self.config.tie_embeddings:
            precision = jax.lax.Precision.HIGHEST if self.runtime.dtype == "float32" else None
            y = jnp.einsum("...D,VD->...V", x, self.table.astype(self.runtime.dtype), precision=precision)
        else:
            y = self.head(x)
        return y.astype(jnp.float32)
