"""Position-aware resampler: one layer of cross-attention from queries on a grid (Qwen-VL, arXiv 2308.12966)."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import linen as nn

from mllm_jax.common.settings import Positive, PositiveInt
from mllm_jax.model.connectors.base import ConnectorConfig, ImageCounts
from mllm_jax.model.connectors.queries import Queries, to_query_tokens
from mllm_jax.model.encoders.positions import resample
from mllm_jax.nn.attention.cross import CrossAttention
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.norm import LayerNorm
from mllm_jax.nn.runtime import Runtime
from mllm_jax.types import Vision, VisionTokens


@dataclass(frozen=True)
class PositionAwareConfig(ConnectorConfig):
    """Queries and patches with 2-D sinusoidal positions, of which only queries and keys know.

    queries: visual tokens of an image, a square number: their grid is spread over the image's.
    width, heads: sizes of the attention layer; a linear layer brings its results to the decoder's width.
    prefix_tokens: whether queries attend to the class token and the registers of an image, too; they have no position.
    """

    queries: PositiveInt = 256
    width: PositiveInt = 4096
    heads: PositiveInt = 32
    norm_eps: Positive = 1e-6
    prefix_tokens: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.side**2 != self.queries:
            raise ValueError(f"connector.queries={self.queries} must be a square number, such as {self.side**2}")
        if self.width % math.lcm(4, self.heads):
            raise ValueError(f"connector.width={self.width} is not a multiple of 4 and of connector.heads={self.heads}")

    @property
    def side(self) -> int:
        """Side of the grid of queries."""
        return math.isqrt(self.queries)

    def weight_rows(self, path: str, counts: ImageCounts) -> float:
        keys = path.startswith(("input/", "attention/k/", "attention/v/"))
        return counts.patches if keys else counts.images * self.queries

    def attention_flops(self, counts: ImageCounts) -> float:
        return 4 * self.width * self.queries * counts.patches

    def build(self, out: int, runtime: Runtime, name: str | None) -> nn.Module:
        return PositionAware(self, out, runtime, name=name)


def sinusoids(side: int, width: int) -> np.ndarray:
    """Returns f32[side side width]: sines and cosines of the column in the first half, of the row in the second."""
    frequencies = 1e4 ** -(np.arange(width // 4, dtype=np.float32) / (width / 4))
    angles = np.outer(np.arange(side, dtype=np.float32), frequencies)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = repeat(axis, "x D -> y x D", y=side), repeat(axis, "y D -> y x D", x=side)
    return np.concatenate([columns, rows], axis=-1).astype(np.float32)


class PositionAware(nn.Module):
    config: PositionAwareConfig
    out: int
    runtime: Runtime

    @nn.compact
    def __call__(self, features, vision: Vision) -> VisionTokens:
        config, width, runtime = self.config, self.config.width, self.runtime.within("connector")
        norm = lambda name: LayerNorm(config.norm_eps, name=name)
        table = sinusoids(config.side, width)

        def linear(name: str, x, width: int):
            shape = (x.shape[-1], width)
            return Einsum("...D,DF->...F", shape, ("embed", "mlp"), runtime.dtype, name=name)(x)

        def layers(patches, vision: Vision):
            values = norm("norm_patches")(linear("input", patches, width))
            places = resample(jnp.asarray(table), vision.coords, vision.grid, "bicubic").astype(values.dtype)
            keys = values + jnp.where((vision.coords[..., 0] >= 0)[..., None], places, 0)
            x, segment = Queries(config.queries, width, runtime, name="queries")(vision.slots)
            x = norm("norm_queries")(x)
            x = x + jnp.tile(rearrange(table, "y x D -> (y x) D"), (vision.slots.shape[1], 1)).astype(x.dtype)
            sizes = (config.heads, config.heads, width // config.heads)
            attention = CrossAttention(*sizes, runtime, bias=True, name="attention")
            x = norm("norm")(attention(x, keys, segment, vision.image, values))
            return linear("output", x, self.out)

        return VisionTokens(to_query_tokens(features.value, vision, layers, self.runtime, config.prefix_tokens))
