"""Pixel shuffle and an MLP (InternVL 1.5, arXiv 2404.16821): neighbouring patches, joined, become a visual token."""

from dataclasses import dataclass

from einops import rearrange
from flax import linen as nn

from mllm_jax.connectors.tokens import to_tokens
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.mlp import ACTIVATIONS
from mllm_jax.nn.norm import LayerNorm
from mllm_jax.nn.runtime import Runtime
from mllm_jax.types import Vision, VisionTokens


@dataclass(frozen=True)
class PixelShuffleConfig:
    """merge: side of the square of patches that becomes a visual token."""

    merge: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-5

    @property
    def patches_per_token(self) -> int:
        return self.merge**2

    def build(self, out: int, runtime: Runtime, name: str | None) -> nn.Module:
        return PixelShuffle(self, out, runtime, name=name)


class PixelShuffle(nn.Module):
    config: PixelShuffleConfig
    out: int
    runtime: Runtime

    @nn.compact
    def __call__(self, features, vision: Vision) -> VisionTokens:
        del vision  # padding needs no care: nobody reads its tokens
        out, dtype = self.out, self.runtime.dtype

        def layers(x):
            x = LayerNorm(self.config.norm_eps, name="norm")(rearrange(x, "... group D -> ... (group D)"))
            x = Einsum("...D,DF->...F", (x.shape[-1], out), ("embed", "mlp"), dtype, bias=True, name="up")(x)
            x = ACTIVATIONS[self.config.activation](x)
            return Einsum("...F,FD->...D", (out, out), ("mlp", "embed"), dtype, bias=True, name="down")(x)

        return VisionTokens(to_tokens(features.value, self.config.patches_per_token, layers, self.runtime))
