"""Q-Former: a BERT whose tokens are queries, with cross-attention to an image's patches (BLIP-2, arXiv 2301.12597)."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from flax import linen as nn

from mllm_jax.common.settings import OneOf, Positive, PositiveInt
from mllm_jax.model.connectors.base import ConnectorConfig
from mllm_jax.model.connectors.queries import Queries, to_query_tokens
from mllm_jax.nn.attention.cross import CrossAttention
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.mlp import ACTIVATIONS, Mlp
from mllm_jax.nn.norm import LayerNorm
from mllm_jax.nn.runtime import Runtime, rematted
from mllm_jax.nn.stack import layers_of, scan_segment, segments
from mllm_jax.types import Vision, VisionTokens


@dataclass(frozen=True)
class QFormerConfig(ConnectorConfig):
    """A Q-Former and a linear layer to the decoder's width. The defaults are those of BLIP-2.

    queries: visual tokens of an image.
    width, layers, heads, mlp: sizes of a BERT.
    cross_every: every n-th layer attends to the patches, the first one included.
    prefix_tokens: whether queries attend to the class token and the registers of an image, too.
    """

    queries: PositiveInt = 32
    width: PositiveInt = 768
    layers: PositiveInt = 12
    heads: PositiveInt = 12
    mlp: PositiveInt = 3072
    cross_every: PositiveInt = 2
    activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "gelu"
    norm_eps: Positive = 1e-12
    prefix_tokens: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"connector.width={self.width} is not a multiple of connector.heads={self.heads}")

    @property
    def kinds(self) -> tuple[bool, ...]:
        """True for the layers that attend to the patches."""
        return tuple(number % self.cross_every == 0 for number in range(self.layers))

    def weight_rows(self, path: str, patches: float, images: float) -> float:
        keys = "cross_attention/k/" in path or "cross_attention/v/" in path
        return patches if keys else images * self.queries

    def attention_flops(self, patches: float, images: float) -> float:
        pairs = self.queries * (self.layers * images * self.queries + sum(self.kinds) * patches)
        return 4 * self.width * pairs

    def build(self, out: int, runtime: Runtime, name: str | None) -> nn.Module:
        return QFormer(self, out, runtime, name=name)


class QFormerLayer(nn.Module):
    """Blocks whose norms come after the addition, as in BERT."""

    config: QFormerConfig
    runtime: Runtime
    cross: bool

    @nn.compact
    def __call__(self, x, patches, segment, patch_segment):
        """x [rows I*Q D], patches [rows P E], and the image numbers of both -> as x."""
        config, runtime = self.config, self.runtime
        norm = lambda name: LayerNorm(config.norm_eps, name=name)
        sizes = (config.heads, config.heads, config.width // config.heads)
        attention = lambda name: CrossAttention(*sizes, runtime, bias=True, name=name)
        x = norm("norm1")(x + attention("attention")(x, x, segment, segment))
        if self.cross:
            x = norm("norm_cross")(x + attention("cross_attention")(x, patches, segment, patch_segment))
        mlp = Mlp(config.mlp, config.width, config.activation, runtime.dtype, name="mlp")
        return norm("norm2")(x + mlp(x))


class QFormer(nn.Module):
    config: QFormerConfig
    out: int
    runtime: Runtime

    @nn.compact
    def __call__(self, features, vision: Vision) -> VisionTokens:
        config, runtime = self.config, self.runtime.within("connector")

        def layers(patches, vision: Vision):
            x, segment = Queries(config.queries, config.width, runtime, name="queries")(vision.slots)
            x = LayerNorm(config.norm_eps, name="norm")(x)

            def step(layer, x, number):
                del number
                return layer(x, patches, segment, vision.image), None

            for part in segments(config.kinds):
                build = partial(rematted(QFormerLayer, runtime), config, runtime)
                x, _ = scan_segment(step, layers_of(build, part, part.name), x, part, runtime)
            shape = (config.width, self.out)
            return Einsum("...D,DF->...F", shape, ("embed", "mlp"), runtime.dtype, bias=True, name="output")(x)

        return VisionTokens(to_query_tokens(features.value, vision, layers, self.runtime, config.prefix_tokens))
