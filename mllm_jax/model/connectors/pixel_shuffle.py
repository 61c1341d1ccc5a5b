"""Pixel shuffle and an MLP (InternVL 1.5, arXiv 2404.16821): joins neighboring patches into a visual token."""

from dataclasses import dataclass
from typing import Annotated

from einops import rearrange
from flax import linen as nn

from mllm_jax.common.settings import OneOf, Positive, PositiveInt
from mllm_jax.model.connectors.base import ConnectorConfig
from mllm_jax.model.connectors.tokens import to_tokens
from mllm_jax.nn.mlp import ACTIVATIONS, Mlp
from mllm_jax.nn.norm import LayerNorm
from mllm_jax.nn.runtime import Runtime
from mllm_jax.types import Vision, VisionTokens


@dataclass(frozen=True)
class PixelShuffleConfig(ConnectorConfig):
    """
    merge: side in patches of the square that becomes a visual token.
    activation: activation of the MLP.
    norm_eps: epsilon of the layer norm before it.
    """

    merge: PositiveInt = 2
    activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "gelu"
    norm_eps: Positive = 1e-5

    def build(self, out: int, runtime: Runtime, name: str | None) -> nn.Module:
        return PixelShuffle(self, out, runtime, name=name)


class PixelShuffle(nn.Module):
    config: PixelShuffleConfig
    out: int
    runtime: Runtime

    @nn.compact
    def __call__(self, features, vision: Vision) -> VisionTokens:
        del vision  # visual tokens of padding are never read
        config = self.config

        def layers(x):
            x = LayerNorm(config.norm_eps, name="norm")(rearrange(x, "... group D -> ... (group D)"))
            return Mlp(self.out, self.out, config.activation, self.runtime.dtype, name="mlp")(x)

        return VisionTokens(to_tokens(features.value, config.patches_per_token, layers, self.runtime))
