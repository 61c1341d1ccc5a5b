"""Language model: token embedding, a stack of layers and the head (Qwen3 arXiv 2505.09388, M-RoPE arXiv 2409.12191)."""

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
    """Properties in which layers differ; equal layers are compiled once.

    experts: whether the layer has experts.
    window: attention window in tokens. 0: global attention.
    """

    experts: bool = False
    window: int = 0


@dataclass(frozen=True)
class DecoderConfig(Config):
    """A decoder-only language model.

    vocab: rows of the embedding table.
    width: size of hidden states.
    layers: number of layers.
    attention: AttentionConfig or MlaConfig.
    mlp: width of the feed-forward block in layers without experts.
    moe: experts in the layers that `num_dense_layers` and `moe_layer_freq` select. None: no experts.
    num_dense_layers: number of leading layers without experts.
    moe_layer_freq: every n-th layer has experts. 2: layers 1, 3, 5, ... (0-based).
    sliding_windows: attention window per layer in tokens, repeated cyclically over layers. 0: global attention. ():
      global attention in every layer.
    activation: activation of the feed-forward block.
    mlp_gated: whether the feed-forward block has a gate (SwiGLU, GeGLU).
    mlp_bias: whether its linear layers have biases.
    norm: norm of nn/norm.py: "rms", "rms_offset" or "layer".
    norm_eps: epsilon of all norms.
    use_post_norm: whether the output of a block is normalized before it is added.
    tie_embeddings: whether the embedding table is also the head.
    embed_scale: factor of text embeddings; visual tokens are not scaled.
    logit_softcap: c in logits = c tanh(logits / c). 0: no cap.
    positions: number of learned positions, read at axis t of a token's position. 0: none.
    position_offset: row of position 0 in the table of learned positions.
    prefix: whether all tokens of a conversation attend to its first tokens (`Batch.prefix`), as in PaliGemma.
    family: family that names the weights in a model with any decoder (families/decoders/by_model_type.py). "": the
      first with such a decoder.
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
        is_moe = lambda i: self.moe is not None and i >= self.num_dense_layers and (i + 1) % self.moe_layer_freq == 0
        windows = itertools.islice(itertools.cycle(self.sliding_windows or (0,)), self.layers)
        return tuple(LayerKind(is_moe(i), window) for i, window in enumerate(windows))

    @property
    def window(self) -> int:
        """Widest attention window of all layers. 0: no layer has one."""
        return max((0, *self.sliding_windows))

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts."""
        return tuple(index for index, kind in enumerate(self.kinds) if kind.experts)


class DecoderLayer(nn.Module):
    config: DecoderConfig
    runtime: Runtime
    kind: LayerKind

    @nn.compact
    def __call__(self, x, rope, segment, modality, cache, prefix):
        config, runtime = self.config, self.runtime
        norm = lambda name: NORMS[config.norm](config.norm_eps, name=name)
        post_norm = norm if config.use_post_norm else lambda name: lambda x: x
        # Constrain both input and output of a block (and so their gradients). Otherwise the partitioner all-gathers the
        # weights instead of the tokens.
        shard_input = lambda x: shard(x, ("batch", "length", None), runtime.rules)
        shard_output = lambda x: shard(shard_input(x), ("batch", "residual", None), runtime.rules)
        attention = config.attention.build(config.norm_eps, self.kind.window, runtime, name="attention")
        y, cache_kv = attention(shard_input(norm("norm1")(x)), rope, segment, cache, prefix)
        x, routing = x + post_norm("post_norm1")(shard_output(y)), None
        y, sizes = shard_input(norm("norm2")(x)), (config.mlp, config.width, config.activation, runtime.dtype)
        if self.kind.experts:
            y, routing = Moe(config.moe, runtime, name="mlp")(y, segment, modality)
        elif config.mlp_gated:
            y = GatedMlp(*sizes, bias=config.mlp_bias, name="mlp")(y)
        else:
            y = Mlp(*sizes, bias=config.mlp_bias, name="mlp")(y)
        return x + post_norm("post_norm2")(shard_output(y)), cache_kv, routing


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
        """Returns the embeddings [B T D] of tokens i32[B T]."""
        x = self._look_up(self.table, tokens)
        return x if self.config.embed_scale == 1 else x * jnp.asarray(self.config.embed_scale, x.dtype)

    def _look_up(self, table, rows):
        # Cast while the table is sharded, then all-gather it: XLA rematerializes a sharded table that it looks up.
        table = shard(table.astype(self.runtime.dtype), ("vocab", "embed"), self.runtime.rules)
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
        """Returns hidden states after the last norm.

        Args:
          x: [B T D] embedded tokens.
          position: i32[B T 3] rotary positions (t, y, x).
          segment: i32[B T] conversation of each token. 0: padding.
          modality: i32[B T] index into MODALITIES.
          cache: keys and values of the previous tokens. None: no cache.
          deep, vision_index, mix: DeepStack features and their places, see `fusion.deepstack`. None: no features.
          prefix: bool[B T] tokens that all tokens of their conversation attend to. None: causal attention.
        Returns:
          ([B T D], the cache with the new tokens or None, Routing of all layers with experts or None).
        """
        config = self.config
        slots = cache_kv = None
        if cache is not None:
            cache_segment = jax.lax.dynamic_update_slice_in_dim(cache.segment, segment, cache.index, axis=1)
            slots, cache_kv = (cache_segment, cache.index), (cache.k, cache.v)
        rope = config.attention.rope(position, segment)
        if config.positions:
            x = x + self._look_up(self.position_table, position[..., 0] + config.position_offset)

        def step(layer, carry, index):
            """Runs a layer and adds DeepStack features. The scan carries the full cache and updates it in place."""
            x, cache_kv = carry
            layer_cache = None if cache_kv is None else (cache_kv, index, *slots)
            x, cache_kv, routing = layer(x, rope, segment, modality, layer_cache, prefix)
            if deep is not None:
                x = deepstack(x, deep, vision_index, index, mix)
            return (shard(x, ("batch", "residual", None), self.runtime.rules), cache_kv), routing

        carry, routings = (x, cache_kv), []
        for part in segments(config.kinds):
            carry, routing = scan_segment(step, getattr(self, part.name), carry, part, self.runtime)
            routings += [] if routing is None else [routing]
        x, cache_kv = carry
        if cache is not None:
            next_position = jnp.max(jnp.where(segment > 0, jnp.max(position, axis=-1) + 1, 0), axis=1)
            cache = Cache(*cache_kv, slots[0], cache.index + x.shape[1], jnp.maximum(cache.position, next_position))
        routing = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routings) if routings else None
        return self.norm(x), cache, routing

    def logits(self, x):
        """Returns the logits f32[... V] of hidden states [... D]."""
        if self.config.tie_embeddings:
            y = einsum("...D,VD->...V", x, self.table.astype(self.runtime.dtype))
        else:
            y = self.head(x)
        return cap(y.astype(jnp.float32), self.config.logit_softcap)
