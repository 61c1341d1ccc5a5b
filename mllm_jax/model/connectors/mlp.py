"""Linear layer or MLP on every patch (LLaVA arXiv 2304.08485, 2310.03744), with the newline token of LLaVA-NeXT."""

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from mllm_jax.common.settings import OneOf, PositiveInt
from mllm_jax.model.connectors.base import ConnectorConfig
from mllm_jax.model.connectors.tokens import to_tokens
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.mlp import ACTIVATIONS
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.weights import partitioned
from mllm_jax.types import Vision, VisionTokens


@dataclass(frozen=True)
class MlpConnectorConfig(ConnectorConfig):
    """An MLP on every patch.

    layers: number of linear layers, each as wide as the decoder. 1: a linear connector.
    activation: activation between linear layers.
    newline: whether a learned token ends every row of patches, at the places that a batch marks with NEWLINE.
    """

    layers: PositiveInt = 2
    activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "gelu"
    newline: bool = False

    def build(self, out: int, runtime: Runtime, name: str | None) -> nn.Module:
        return MlpConnector(self, out, runtime, name=name)


class MlpConnector(nn.Module):
    config: MlpConnectorConfig
    out: int
    runtime: Runtime

    @nn.compact
    def __call__(self, features, vision: Vision) -> VisionTokens:
        del vision  # visual tokens of padding are never read
        config, out = self.config, self.out

        def layers(x):
            x = rearrange(x, "... 1 D -> ... D")
            for i in range(config.layers):
                x = ACTIVATIONS[config.activation](x) if i else x
                shape, axes = (x.shape[-1], out), ("mlp", "embed") if i else ("embed", "mlp")
                x = Einsum("...D,DF->...F", shape, axes, self.runtime.dtype, bias=True, name=f"linear{i}")(x)
            return x

        embeddings = to_tokens(features.value, 1, layers, self.runtime)
        if config.newline:
            newline = self.param("newline", partitioned(nn.initializers.normal(out**-0.5), "embed"), (out,))
            newline = jnp.broadcast_to(newline.astype(embeddings.dtype), (len(embeddings), 1, out))
            embeddings = jnp.concatenate([embeddings, newline], axis=1)
        return VisionTokens(embeddings)
