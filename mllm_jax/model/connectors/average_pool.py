"""Average pooling of neighboring patches, then a linear layer (MM1, arXiv 2403.09611, section 3.1)."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.common.settings import PositiveInt
from mllm_jax.model.connectors.base import ConnectorConfig
from mllm_jax.model.connectors.tokens import to_tokens
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.runtime import Runtime
from mllm_jax.types import Vision, VisionTokens


@dataclass(frozen=True)
class AveragePoolConfig(ConnectorConfig):
    """merge: side in patches of the square that becomes a visual token."""

    merge: PositiveInt = 2

    def build(self, out: int, runtime: Runtime, name: str | None) -> nn.Module:
        return AveragePool(self, out, runtime, name=name)


class AveragePool(nn.Module):
    config: AveragePoolConfig
    out: int
    runtime: Runtime

    @nn.compact
    def __call__(self, features, vision: Vision) -> VisionTokens:
        del vision  # visual tokens of padding are never read

        def layers(x):
            x, shape = jnp.mean(x, axis=-2), (x.shape[-1], self.out)
            return Einsum("...D,DF->...F", shape, ("embed", "mlp"), self.runtime.dtype, bias=True, name="linear")(x)

        return VisionTokens(to_tokens(features.value, self.config.patches_per_token, layers, self.runtime))
