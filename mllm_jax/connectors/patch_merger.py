"""Patch merger (Qwen2-VL arXiv 2409.12191) with DeepStack mergers (Qwen3-VL arXiv 2511.21631).

merge x merge neighbouring patches, which stand next to each other in a patch row, become one visual token.
"""

from dataclasses import dataclass

from einops import rearrange
from flax import linen as nn

from mllm_jax.nn.mlp import Mlp
from mllm_jax.nn.norm import LayerNorm
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding import join_rows, shard, split_rows
from mllm_jax.types import Vision, VisionTokens


@dataclass(frozen=True)
class PatchMergerConfig:
    merge: int = 2
    norm_eps: float = 1e-6

    @property
    def patches_per_token(self) -> int:
        return self.merge**2

    def build(self, out: int, runtime: Runtime, name: str) -> nn.Module:
        return PatchMerger(self, out, runtime, name=name)


class Merger(nn.Module):
    """LayerNorm before or after the patches are joined, then a two-layer MLP. [B R P D] -> [B M out]."""

    config: PatchMergerConfig
    out: int
    norm_joined: bool
    runtime: Runtime

    @nn.compact
    def __call__(self, x):
        norm, count = LayerNorm(self.config.norm_eps, name="norm"), len(x)
        rules, own = self.runtime.rules, self.runtime.within("connector").rules
        if not self.norm_joined:
            x = norm(x)
        x = rearrange(join_rows(x, rules), "BR (M group) D -> BR M (group D)", group=self.config.patches_per_token)
        x = shard(x, ("batch", "length", None), own)
        if self.norm_joined:
            x = norm(x)
        x = Mlp(x.shape[-1], self.out, "gelu", self.runtime.dtype, name="mlp")(x)
        x = shard(x, ("batch", "length", None), own)
        # Only here do rows of patches, spread over every device, become tokens of the batch rows that own them.
        x = split_rows(shard(x, ("batch", None, None), rules), count, rules)
        return rearrange(x, "B R M D -> B (R M) D")


class PatchMerger(nn.Module):
    config: PatchMergerConfig
    out: int
    runtime: Runtime

    @nn.compact
    def __call__(self, features, vision: Vision) -> VisionTokens:
        del vision  # padding needs no care: nobody reads its tokens
        value = Merger(self.config, self.out, False, self.runtime, name="main")(features.value)
        if not features.taps.shape[0]:
            return VisionTokens(value)
        mergers = nn.vmap(
            Merger,
            in_axes=0,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "taps"},
        )
        return VisionTokens(value, mergers(self.config, self.out, True, self.runtime, name="deepstack")(features.taps))
