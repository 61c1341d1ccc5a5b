"""Dual encoders: images and texts as vectors of one space (CLIP, arXiv 2103.00020; SigLIP, arXiv 2303.15343).

A tower of images and the layers of a language model, each with a pool that makes one vector of what they give.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import linen as nn

from mllm_jax.common.settings import Config, OneOf, Positive, PositiveInt, TokenId
from mllm_jax.model.decoder import Decoder, DecoderConfig
from mllm_jax.model.vlm import example_image
from mllm_jax.nn.attention.attend import attend
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.lora import LoraConfig
from mllm_jax.nn.mlp import ACTIVATIONS, Mlp
from mllm_jax.nn.norm import LayerNorm
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.activations import shard
from mllm_jax.sharding.weights import partitioned
from mllm_jax.types import DualBatch, Output

# Per loss, the initial scale and bias of the logits. None: no bias.
LOSSES = {"softmax": (1 / 0.07, None), "sigmoid": (10.0, -10.0)}


@dataclass(frozen=True)
class ClassPool(Config):
    """The class token of an image, projected to `width` values."""

    width: PositiveInt

    def build(self, runtime: Runtime, name: str | None) -> nn.Module:
        return _ClassPool(self, runtime, name=name)


@dataclass(frozen=True)
class AttentionPool(Config):
    """A learned query that attends to all patches of an image, and a feed-forward block (arXiv 2106.04560, MAP)."""

    heads: PositiveInt
    mlp: PositiveInt
    activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "gelu_tanh"
    norm_eps: Positive = 1e-6

    def build(self, runtime: Runtime, name: str | None) -> nn.Module:
        return _AttentionPool(self, runtime, name=name)


@dataclass(frozen=True)
class TokenPool(Config):
    """One token of a text, projected to `width` values.

    token: "end" is the first `end`, "highest" the one of the highest id, "last" the last one, padding or not.
    bias: whether the projection has one.
    """

    width: PositiveInt
    token: Annotated[str, OneOf(lambda: TOKENS)]
    end: TokenId = -1
    bias: bool = False


TOKENS = {  # tokens i32[texts T] -> places i32[texts]
    "end": lambda tokens, end: jnp.argmax(tokens == end, axis=1),
    "highest": lambda tokens, end: jnp.argmax(tokens, axis=1),
    "last": lambda tokens, end: jnp.full(len(tokens), tokens.shape[1] - 1),
}


@dataclass(frozen=True)
class DualConfig(Config):
    """A tower and a pool for images, and for texts; the types of the configs choose the parts.

    encoder, image_pool: of images; the pool is a ClassPool or an AttentionPool.
    text, text_pool: of texts; with `text.prefix` all tokens of a text see each other.
    loss: what the logits are made for: "softmax" over all texts (or images), or a "sigmoid" of every pair.
    family: the table of weight names (families/), used for reading and writing only.
    lora: the adapters that parameters are made with; given ones bring their own.
    """

    encoder: Any
    image_pool: Any
    text: DecoderConfig
    text_pool: TokenPool
    loss: Annotated[str, OneOf(tuple(LOSSES))] = "softmax"
    runtime: Runtime = Runtime()
    family: str = "clip"
    lora: LoraConfig = LoraConfig()

    @property
    def decoder(self) -> DecoderConfig:
        """The text tower, by the name that it has in a ModelConfig."""
        return self.text

    def build(self) -> nn.Module:
        return DualEncoder(self)

    def example(self) -> DualBatch:
        """The smallest batch that touches every weight: an image of one patch, a text of one token."""
        return DualBatch(
            tokens=np.zeros((1, 1), np.int32),
            segment=np.ones((1, 1), np.int32),
            vision=example_image(self.encoder.patch_values, 1),
            first=np.zeros((1, 1), np.int32),
        )


class DualEncoder(nn.Module):
    config: DualConfig

    def setup(self):
        config, runtime = self.config, self.config.runtime
        self.encoder = config.encoder.build(runtime, name=None)
        self.image_pool = config.image_pool.build(runtime.within("encoder"), name=None)
        self.text = Decoder(config.text, runtime)
        shape, axes = (config.text.width, config.text_pool.width), ("embed", None)
        self.text_pool = Einsum("...D,DE->...E", shape, axes, runtime.dtype, bias=config.text_pool.bias)
        scale, bias = LOSSES[config.loss]
        scalar = lambda name, value: self.param(name, partitioned(nn.initializers.constant(value)), ())
        self.log_scale = scalar("log_scale", math.log(scale))
        self.bias = None if bias is None else scalar("bias", bias)

    def encode_image(self, batch: DualBatch):
        """Images -> f32[images D] of unit length; `apply(..., method="encode_image")`."""
        x = rearrange(self.encoder(batch.vision).value, "B R P D -> B (R P) D")
        image = rearrange(batch.vision.image, "B R P -> B (R P)")
        pooled = rearrange(self.image_pool(x, image, batch.first), "B k D -> (B k) D")
        return _unit(pooled if batch.order is None else pooled[batch.order])

    def encode_text(self, batch: DualBatch):
        """Texts -> f32[texts D] of unit length; `apply(..., method="encode_text")`."""
        tokens, segment, pool = batch.tokens, batch.segment, self.config.text_pool
        position = repeat(jnp.arange(tokens.shape[1]), "T -> B T 3", B=len(tokens))
        modality = jnp.zeros_like(tokens)
        prefix = segment > 0 if self.config.text.prefix else None
        x, _, _ = self.text(self.text.embed(tokens), position, segment, modality, prefix=prefix)
        token = jnp.take_along_axis(x, TOKENS[pool.token](tokens, pool.end)[:, None, None], axis=1)
        token = shard(token, ("batch", None, None), self.config.runtime.rules)  # or its gradient would be replicated
        return _unit(self.text_pool(token[:, 0]))

    def __call__(self, batch: DualBatch) -> Output:
        """A pure function of parameters and batch; of what the batch lacks nothing is returned, as are no logits."""
        images = None if batch.vision is None else self.encode_image(batch)
        texts = None if batch.tokens is None else self.encode_text(batch)
        if images is None or texts is None:
            return Output(image_embeddings=images, text_embeddings=texts)
        return Output(self.similarity(images, texts), image_embeddings=images, text_embeddings=texts)

    def similarity(self, images, texts):
        """Embeddings -> logits f32[images texts]; `apply(..., method="similarity")`."""
        cosine = jnp.einsum("iD,jD->ij", images, texts, precision=jax.lax.Precision.HIGHEST)
        scale, bias = self.temperature()
        return scale * cosine + bias

    def temperature(self):
        """The factor of a cosine and what is added, f32[]: a logit. `apply(..., method="temperature")`."""
        bias = jnp.zeros(()) if self.bias is None else self.bias
        return jnp.exp(self.log_scale.astype(jnp.float32)), bias.astype(jnp.float32)


def probabilities(logits, loss: str):
    """Probability that a text belongs to an image, from logits f32[images texts] of a model trained with this loss."""
    return jax.nn.softmax(logits, axis=-1) if loss == "softmax" else jax.nn.sigmoid(logits)


def _unit(x):
    """Scales to unit length; the zeros of missing images stay zero and have no gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-30))


class _ClassPool(nn.Module):
    config: ClassPool
    runtime: Runtime

    @nn.compact
    def __call__(self, x, image, first):
        """x [B P D], image i32[B P], first i32[B k] -> [B k width]."""
        token = jnp.take_along_axis(x, first[..., None], axis=1)
        shape = (x.shape[-1], self.config.width)
        return Einsum("...D,DE->...E", shape, ("embed", None), self.runtime.dtype, name="projection")(token)


class _AttentionPool(nn.Module):
    config: AttentionPool
    runtime: Runtime

    @nn.compact
    def __call__(self, x, image, first):
        """x [B P D], image i32[B P], first i32[B k] -> [B k D]."""
        config, dtype, width = self.config, self.runtime.dtype, x.shape[-1]
        heads, head_dim = config.heads, width // config.heads
        probe = self.param("probe", partitioned(nn.initializers.normal(width**-0.5), "embed"), (width,))

        shape, axes = (3, width, heads, head_dim), (None, "embed", "heads", "head_dim")
        project = Einsum("...D,CDNH->...CNH", shape, axes, dtype, bias=True, name="qkv")
        q, kv = project(probe)[0], project(x)
        q = jnp.broadcast_to(q, (*first.shape, heads, head_dim))
        k, v = (kv[..., i, :, :] for i in (1, 2))
        own = jnp.where(first < 0, -1, jnp.take_along_axis(image, first, axis=1))
        out = attend(q, k, v, q_segment=own, kv_segment=image, causal=False, runtime=self.runtime)
        axes = ("heads", "head_dim", "embed")
        out = Einsum("...NH,NHD->...D", (heads, head_dim, width), axes, dtype, bias=True, name="out")(out)
        mlp = Mlp(config.mlp, width, config.activation, dtype, name="mlp")
        return out + mlp(LayerNorm(config.norm_eps, name="norm")(out))
