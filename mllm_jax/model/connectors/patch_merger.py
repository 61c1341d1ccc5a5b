"""Patch merger (Qwen2-VL arXiv 2409.12191) with DeepStack mergers (Qwen3-VL arXiv 2511.21631).

Each block of merge x merge neighboring patches, which is contiguous in a patch row, becomes one visual token.
"""

from dataclasses import dataclass
from typing import Annotated

from einops import rearrange
from flax import linen as nn

from mllm_jax.common.settings import OneOf, Positive, PositiveInt
from mllm_jax.model.connectors.base import ConnectorConfig
from mllm_jax.model.connectors.tokens import to_tokens
from mllm_jax.nn.mlp import Mlp
from mllm_jax.nn.norm import NORMS
from mllm_jax.nn.runtime import Runtime
from mllm_jax.types import Vision, VisionTokens


@dataclass(frozen=True)
class PatchMergerConfig(ConnectorConfig):
    """
    merge: side in patches of the square that becomes a visual token.
    norm: norm of nn/norm.py: "layer" or "rms".
    norm_eps: epsilon of the norm.
    """

    merge: PositiveInt = 2
    norm: Annotated[str, OneOf(tuple(NORMS))] = "layer"
    norm_eps: Positive = 1e-6

    def build(self, out: int, runtime: Runtime, name: str) -> nn.Module:
        return PatchMerger(self, out, runtime, name=name)


class Merger(nn.Module):
    """Norm and a two-layer MLP on joined patches, [B R P D] -> [B M out].

    norm_joined: whether patches are normalized after they are joined (DeepStack), or before (main merger).
    """

    config: PatchMergerConfig
    out: int
    norm_joined: bool
    runtime: Runtime

    @nn.compact
    def __call__(self, x):
        config, joined = self.config, lambda x: rearrange(x, "... group D -> ... (group D)")

        def layers(x):
            norm = NORMS[config.norm](config.norm_eps, name="norm")
            x = norm(joined(x)) if self.norm_joined else joined(norm(x))
            return Mlp(x.shape[-1], self.out, "gelu", self.runtime.dtype, name="mlp")(x)

        return to_tokens(x, config.patches_per_token, layers, self.runtime)


class PatchMerger(nn.Module):
    config: PatchMergerConfig
    out: int
    runtime: Runtime

    @nn.compact
    def __call__(self, features, vision: Vision) -> VisionTokens:
        del vision  # visual tokens of padding are never read
        embeddings = Merger(self.config, self.out, False, self.runtime, name="main")(features.value)
        if not features.deepstack.shape[0]:
            return VisionTokens(embeddings)
        mergers = nn.vmap(
            Merger,
            in_axes=0,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            metadata_params={nn.PARTITION_NAME: "deepstack_layers"},
        )
        return VisionTokens(
            embeddings, mergers(self.config, self.out, True, self.runtime, name="deepstack")(features.deepstack)
        )
