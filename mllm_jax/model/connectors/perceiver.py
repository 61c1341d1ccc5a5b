"""Perceiver resampler: queries that attend to an image's patches and to each other (Flamingo, arXiv 2204.14198)."""

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.common.settings import NonNegativeInt, OneOf, Positive, PositiveInt
from mllm_jax.model.connectors.base import ConnectorConfig, ImageCounts
from mllm_jax.model.connectors.queries import Queries, fitted, to_query_tokens
from mllm_jax.nn.attention.cross import CrossAttention
from mllm_jax.nn.mlp import ACTIVATIONS, GatedMlp, Mlp
from mllm_jax.nn.norm import NORMS
from mllm_jax.nn.runtime import Runtime, rematted, scan_layers
from mllm_jax.types import Vision, VisionTokens


@dataclass(frozen=True)
class PerceiverConfig(ConnectorConfig):
    """A perceiver resampler, as in Flamingo, IDEFICS and IDEFICS2 (arXiv 2405.02246).

    queries: visual tokens of an image.
    width: width of the queries. A linear layer brings patches to it, and visual tokens to the decoder's, where those
      differ.
    layers, heads, kv_heads, head_dim: sizes of the attention blocks, which have no biases.
    mlp: width of the feed-forward blocks, which have `activation`, `gated` and no biases.
    norm: norm of nn/norm.py before every block and after the last, with `norm_eps`.
    qk_norm: whether queries and keys of a head are normalized.
    input_mlp: width of a gated MLP that brings patches to `width`, with `activation`. 0: none.
    prefix_tokens: whether queries attend to the class token and the registers of an image, too.
    """

    queries: PositiveInt = 64
    width: PositiveInt = 1024
    layers: PositiveInt = 6
    heads: PositiveInt = 8
    kv_heads: PositiveInt = 8
    head_dim: PositiveInt = 64
    mlp: PositiveInt = 4096
    activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "gelu"
    gated: bool = False
    norm: Annotated[str, OneOf(tuple(NORMS))] = "layer"
    norm_eps: Positive = 1e-5
    qk_norm: bool = False
    input_mlp: NonNegativeInt = 0
    prefix_tokens: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.heads % self.kv_heads:
            raise ValueError(f"connector.heads={self.heads} is not a multiple of connector.kv_heads={self.kv_heads}")

    def weight_rows(self, path: str, counts: ImageCounts) -> float:
        if path.startswith("input/"):
            return counts.patches
        keys = path.startswith(("layers/attention/k/", "layers/attention/v/"))
        return counts.images * self.queries + counts.patches * keys

    def attention_flops(self, counts: ImageCounts) -> float:
        pairs = self.queries * (counts.patches + counts.images * self.queries)
        return 4 * self.layers * self.heads * self.head_dim * pairs

    def build(self, out: int, runtime: Runtime, name: str | None) -> nn.Module:
        return Perceiver(self, out, runtime, name=name)


class PerceiverLayer(nn.Module):
    config: PerceiverConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x, patches, segment, key_segment):
        """x [rows I*Q D], patches [rows P D], and the image numbers of the queries and of both together -> as x."""
        config, dtype = self.config, self.runtime.dtype
        norm = lambda name: NORMS[config.norm](config.norm_eps, name=name)
        sizes, qk_norm = (config.heads, config.kv_heads, config.head_dim), config.norm if config.qk_norm else ""
        attention = CrossAttention(*sizes, self.runtime, qk_norm=qk_norm, norm_eps=config.norm_eps, name="attention")
        if config.gated:
            mlp = GatedMlp(config.mlp, config.width, config.activation, dtype, name="mlp")
        else:
            mlp = Mlp(config.mlp, config.width, config.activation, dtype, bias=False, name="mlp")
        y = norm("norm1")(x)
        keys = jnp.concatenate([norm("norm_patches")(patches), y], axis=1)
        x = x + attention(y, keys, segment, key_segment)
        return x + mlp(norm("norm2")(x))


class Perceiver(nn.Module):
    config: PerceiverConfig
    out: int
    runtime: Runtime

    @nn.compact
    def __call__(self, features, vision: Vision) -> VisionTokens:
        config, runtime = self.config, self.runtime.within("connector")

        def layers(patches, vision: Vision):
            if config.input_mlp:
                sizes = (config.input_mlp, config.width, config.activation, runtime.dtype)
                patches = GatedMlp(*sizes, name="input")(patches)
            patches = fitted(patches, config.width, runtime.dtype, "input")
            x, segment = Queries(config.queries, config.width, runtime, name="queries")(vision.slots)
            key_segment = jnp.concatenate([vision.image, segment], axis=1)

            def body(layer, x, _):
                return layer(x, patches, segment, key_segment), None

            layer = rematted(PerceiverLayer, runtime)(config, runtime, name="layers")
            x, _ = scan_layers(body, layer, x, None, config.layers, runtime)
            x = NORMS[config.norm](config.norm_eps, name="norm")(x)
            return fitted(x, self.out, runtime.dtype, "output")

        return VisionTokens(to_query_tokens(features.value, vision, layers, self.runtime, config.prefix_tokens))
