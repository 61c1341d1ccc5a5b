"""The language model: embedding, a stack of layers, and the head (Qwen3 arXiv 2505.09388, M-RoPE arXiv 2409.12191)."""

import itertools
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.common.settings import Config, NonNegative, NonNegativeInt, OneOf, Positive, PositiveInt
from mllm_jax.model.fusion import deepstack
from mllm_jax.nn.attention.masks import cap
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.mlp import ACTIVATIONS, GatedMlp, Mlp
from mllm_jax.nn.moe.layer import Moe, MoeConfig
from mllm_jax.nn.norm import NORMS
from mllm_jax.nn.precision import einsum
from mllm_jax.nn.runtime import Runtime, rematted
from mllm_jax.nn.stack import layers_of, scan_segment, segments
from mllm_jax.sharding.activations import shard
from mllm_jax.sharding.weights import partitioned
from mllm_jax.types import Cache


class LayerKind(NamedTuple):
    """Differences between layers; layers of one kind are compiled once."""

    experts: bool = False
    window: int = 0


@dataclass(frozen=True)
class DecoderConfig(Config):
    """A decoder of text, with or without visual tokens.

    attention: AttentionConfig or MlaConfig.
    mlp: width of the feed-forward block of layers without experts, which has `activation`, `mlp_gated` and `mlp_bias`.
    moe: experts in place of that block, in the layers that `num_dense_layers` and `moe_layer_freq` select. None: no
      experts.
    num_dense_layers: number of leading layers without experts.
    moe_layer_freq: every n-th layer has experts; with 2, the second is the first to have them.
    sliding_windows: attention window per layer in tokens, repeated cyclically over layers. 0: global attention. ():
      global attention in every layer.
    norm: norm of nn/norm.py: "rms", "rms_offset" or "layer", with `norm_eps`.
    use_post_norm: whether the output of a block is normalized before it is added.
    embed_scale: factor of embedded tokens, not of visual ones.
    logit_softcap: c, where logits are c tanh(logit / c). 0: no cap.
    positions: number of learned positions, added to all tokens by the first axis of their position. 0: none.
    position_offset: rows of the table of learned positions before that of position 0.
    prefix: whether the first tokens of a conversation (`Batch.prefix`) are attended to by all of it, as in PaliGemma.
    family: family whose tensor names its weights have in a model that takes any decoder
      (families/decoders/by_model_type.py), for reading and writing only. "": the first with such a decoder.
    """

    vocab: PositiveInt
    width: PositiveInt
    layers: PositiveInt
    attention: Any
    mlp: PositiveInt
    moe: MoeConfig | None = None
    num_dense_layers: NonNegativeInt = 0
    moe_layer_freq: PositiveInt = 1
    sliding_windows: tuple[NonNegativeInt, ...] = ()
    activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "silu"
    mlp_gated: bool = True
    mlp_bias: bool = False
    norm: Annotated[str, OneOf(tuple(NORMS))] = "rms"
    norm_eps: Positive = 1e-6
    use_post_norm: bool = False
    tie_embeddings: bool = False
    embed_scale: Positive = 1.0
    logit_softcap: NonNegative = 0.0
    positions: NonNegativeInt = 0
    position_offset: NonNegativeInt = 0
    prefix: bool = False
    family: str = field(default="", compare=False)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Kind of every layer."""
        has = lambda i: self.moe is not None and i >= self.num_dense_layers and (i + 1) % self.moe_layer_freq == 0
        windows = itertools.islice(itertools.cycle(self.sliding_windows or (0,)), self.layers)
        return tuple(LayerKind(has(i), window) for i, window in enumerate(windows))

    @property
    def window(self) -> int:
        """The widest window; 0 where no layer has one."""
        return max((0, *self.sliding_windows))

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts."""
        return tuple(number for number, kind in enumerate(self.kinds) if kind.experts)


class DecoderLayer(nn.Module):
    config: DecoderConfig
    runtime: Runtime
    kind: LayerKind

    @nn.compact
    def __call__(self, x, rope, segment, modality, cache, prefix):
        config, runtime = self.config, self.runtime
        norm = lambda name: NORMS[config.norm](config.norm_eps, name=name)
        after = norm if config.use_post_norm else lambda name: lambda x: x
        # Said on both sides of a block, of results before they are parted and so of their gradients, too: else the
        # partitioner gathers the weights rather than the tokens.
        whole = lambda x: shard(x, ("batch", "length", None), runtime.rules)
        parted = lambda x: shard(whole(x), ("batch", "residual", None), runtime.rules)
        attention = config.attention.build(config.norm_eps, self.kind.window, runtime, name="attention")
        y, kept = attention(whole(norm("norm1")(x)), rope, segment, cache, prefix)
        x, routing = x + after("post_norm1")(parted(y)), None
        y, sizes = whole(norm("norm2")(x)), (config.mlp, config.width, config.activation, runtime.dtype)
        if self.kind.experts:
            y, routing = Moe(config.moe, runtime, name="mlp")(y, segment, modality)
        elif config.mlp_gated:
            y = GatedMlp(*sizes, bias=config.mlp_bias, name="mlp")(y)
        else:
            y = Mlp(*sizes, bias=config.mlp_bias, name="mlp")(y)
        return x + after("post_norm2")(parted(y)), kept, routing


class Decoder(nn.Module):
    config: DecoderConfig
    runtime: Runtime

    def setup(self):
        config, runtime = self.config, self.runtime
        init = nn.initializers.normal(config.width**-0.5)
        self.table = self.param("embed", partitioned(init, "vocab", "embed"), (config.vocab, config.width))
        for part in segments(config.kinds):
            setattr(self, part.name, layers_of(partial(rematted(DecoderLayer, runtime), config, runtime), part))
        self.norm = NORMS[config.norm](config.norm_eps)
        if config.positions:
            shape = (config.positions + config.position_offset, config.width)
            self.position_table = self.param("position_embed", partitioned(init, "position", "embed"), shape)
        if not config.tie_embeddings:
            self.head = Einsum("...D,VD->...V", (config.vocab, config.width), ("vocab", "embed"), runtime.dtype)

    def embed(self, tokens):
        """i32[B T] -> [B T D]. The table is gathered first: a lookup in a sharded one makes XLA rematerialize it."""
        x = self._look_up(self.table, tokens)
        return x if self.config.embed_scale == 1 else x * jnp.asarray(self.config.embed_scale, x.dtype)

    def _look_up(self, table, rows):
        table = shard(table.astype(self.runtime.dtype), ("vocab", "embed"), self.runtime.rules)  # see `_Head`
        table = shard(table, (None, None), self.runtime.rules)
        return shard(jnp.take(table, rows, axis=0), ("batch", "residual", None), self.runtime.rules)

    def __call__(
        self,
        x,
        position,
        segment,
        modality,
        *,
        cache: Cache | None = None,
        deep=None,
        vision_index=None,
        prefix=None,
        mix=None,
    ):
        """Embedded tokens -> hidden states after the last norm.

        Args:
          x: [B T D]; position: i32[B T 3]; segment: i32[B T].
          modality: i32[B T] index into MODALITIES.
          deep, vision_index, mix: what DeepStack adds to the first layers, see `fusion.deepstack`.
          prefix: bool[B T] tokens that all tokens of their conversation see; None = causal throughout.
        Returns:
          ([B T D], the cache with these tokens, Routing of all layers with experts or None).
        """
        config = self.config
        slots = kept = None
        if cache is not None:
            known = jax.lax.dynamic_update_slice_in_dim(cache.segment, segment, cache.index, axis=1)
            slots, kept = (known, cache.index), (cache.k, cache.v)
        rope = config.attention.rope(position, segment)
        if config.positions:
            x = x + self._look_up(self.position_table, position[..., 0] + config.position_offset)

        def step(layer, carry, number):
            """Runs a layer and adds DeepStack's features. The full cache is carried and updated in place."""
            x, kept = carry
            own = None if kept is None else (kept, number, *slots)
            x, kept, routing = layer(x, rope, segment, modality, own, prefix)
            if deep is not None:
                x = deepstack(x, deep, vision_index, number, mix)
            return (shard(x, ("batch", "residual", None), self.runtime.rules), kept), routing

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
            y = einsum("...D,VD->...V", x, self.table.astype(self.runtime.dtype))
        else:
            y = self.head(x)
        return cap(y.astype(jnp.float32), self.config.logit_softcap)
