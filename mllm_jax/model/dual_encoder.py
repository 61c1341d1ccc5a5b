"""Dual encoders: embeddings of images and texts in one space (CLIP, arXiv 2103.00020; SigLIP, arXiv 2303.15343).

A vision transformer encodes images, a decoder stack encodes texts; a pool reduces the features of each to one vector.
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
    """Class token of an image, projected to `width` values."""

    width: PositiveInt

    def build(self, runtime: Runtime, name: str | None) -> nn.Module:
        return _ClassPool(self, runtime, name=name)


@dataclass(frozen=True)
class AttentionPool(Config):
    """A learned query that attends to all patches of an image, then a feed-forward block (MAP, arXiv 2106.04560).

    heads: number of attention heads.
    mlp: width of the feed-forward block.
    activation: activation of the feed-forward block.
    norm_eps: epsilon of the layer norm before it.
    """

    heads: PositiveInt
    mlp: PositiveInt
    activation: Annotated[str, OneOf(tuple(ACTIVATIONS))] = "gelu_tanh"
    norm_eps: Positive = 1e-6

    def build(self, runtime: Runtime, name: str | None) -> nn.Module:
        return _AttentionPool(self, runtime, name=name)


@dataclass(frozen=True)
class TokenPool(Config):
    """Hidden state of one token of a text, projected to `width` values.

    width: size of the embedding.
    token: "end": the first token with id `end`. "highest": the token with the highest id. "last": the last column,
      even if it is padding.
    end: id of the end token for "end".
    bias: whether the projection has a bias.
    """

    width: PositiveInt
    token: Annotated[str, OneOf(lambda: TOKENS)]
    end: TokenId = -1
    bias: bool = False


TOKENS = {  # tokens i32[texts T] -> columns i32[texts]
    "end": lambda tokens, end: jnp.argmax(tokens == end, axis=1),
    "highest": lambda tokens, end: jnp.argmax(tokens, axis=1),
    "last": lambda tokens, end: jnp.full(len(tokens), tokens.shape[1] - 1),
}


@dataclass(frozen=True)
class DualConfig(Config):
    """An encoder and a pool for images, and for texts; the type of each config selects the module.

    encoder: vision transformer.
    image_pool: ClassPool or AttentionPool.
    text: text encoder. With `prefix`, all tokens of a text attend to each other.
    text_pool: selection and projection of a text's token.
    loss: contrastive loss of the logits: "softmax" over all texts (and images), or "sigmoid" of every pair.
    runtime: execution of the model.
    family: name of the weight table (families/), for reading and writing only.
    lora: adapters that `init_params` creates; `load_adapters` replaces them.
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
        """The text encoder, under the name that a ModelConfig uses."""
        return self.text

    def build(self) -> nn.Module:
        return DualEncoder(self)

    def example(self) -> DualBatch:
        """Returns the smallest batch that uses every weight: an image of one patch and a text of one token."""
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
        """Returns image embeddings f32[images D] of unit length; `apply(..., method="encode_image")`."""
        x = rearrange(self.encoder(batch.vision).value, "B R P D -> B (R P) D")
        image = rearrange(batch.vision.image, "B R P -> B (R P)")
        pooled = rearrange(self.image_pool(x, image, batch.first), "B k D -> (B k) D")
        return _unit(pooled if batch.order is None else pooled[batch.order])

    def encode_text(self, batch: DualBatch):
        """Returns text embeddings f32[texts D] of unit length; `apply(..., method="encode_text")`."""
        tokens, segment, pool = batch.tokens, batch.segment, self.config.text_pool
        position = repeat(jnp.arange(tokens.shape[1]), "T -> B T 3", B=len(tokens))
        modality = jnp.zeros_like(tokens)
        prefix = segment > 0 if self.config.text.prefix else None
        x, _, _ = self.text(self.text.embed(tokens), position, segment, modality, prefix=prefix)
        token = jnp.take_along_axis(x, TOKENS[pool.token](tokens, pool.end)[:, None, None], axis=1)
        token = shard(token, ("batch", None, None), self.config.runtime.rules)  # else its gradient is replicated
        return _unit(self.text_pool(token[:, 0]))

    def __call__(self, batch: DualBatch) -> Output:
        """Returns the embeddings of a batch's images and texts, and their logits if it has both."""
        images = None if batch.vision is None else self.encode_image(batch)
        texts = None if batch.tokens is None else self.encode_text(batch)
        if images is None or texts is None:
            return Output(image_embeddings=images, text_embeddings=texts)
        return Output(self.similarity(images, texts), image_embeddings=images, text_embeddings=texts)

    def similarity(self, images, texts):
        """Returns logits f32[images texts] of [images D] and [texts D]; `apply(..., method="similarity")`."""
        cosine = jnp.einsum("iD,jD->ij", images, texts, precision=jax.lax.Precision.HIGHEST)
        scale, bias = self.temperature()
        return scale * cosine + bias

    def temperature(self):
        """Returns scale and bias, f32[], of logit = scale * cosine + bias; `apply(..., method="temperature")`."""
        bias = jnp.zeros(()) if self.bias is None else self.bias
        return jnp.exp(self.log_scale.astype(jnp.float32)), bias.astype(jnp.float32)


def probabilities(logits, loss: str):
    """Returns the probability f32[images texts] that a text belongs to an image.

    Args:
      logits: f32[images texts].
      loss: loss that the model was trained with, see LOSSES.
    """
    return jax.nn.softmax(logits, axis=-1) if loss == "softmax" else jax.nn.sigmoid(logits)


def _unit(x):
    """Scales vectors [... D] to unit length in f32; zero vectors of missing images stay zero and have no gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-30))


class _ClassPool(nn.Module):
    config: ClassPool
    runtime: Runtime

    @nn.compact
    def __call__(self, x, image, first):
        """Returns [B k width] of x [B P D], image numbers i32[B P] and first patches of images i32[B k]."""
        token = jnp.take_along_axis(x, first[..., None], axis=1)
        shape = (x.shape[-1], self.config.width)
        return Einsum("...D,DE->...E", shape, ("embed", None), self.runtime.dtype, name="projection")(token)


class _AttentionPool(nn.Module):
    config: AttentionPool
    runtime: Runtime

    @nn.compact
    def __call__(self, x, image, first):
        """Returns [B k D] of x [B P D], image numbers i32[B P] and first patches of images i32[B k] (-1: no image)."""
        config, dtype, width = self.config, self.runtime.dtype, x.shape[-1]
        heads, head_dim = config.heads, width // config.heads
        probe = self.param("probe", partitioned(nn.initializers.normal(width**-0.5), "embed"), (width,))

        shape, axes = (3, width, heads, head_dim), (None, "embed", "heads", "head_dim")
        project = Einsum("...D,CDNH->...CNH", shape, axes, dtype, bias=True, name="qkv")
        q, kv = project(probe)[0], project(x)
        q = jnp.broadcast_to(q, (*first.shape, heads, head_dim))
        k, v = (kv[..., i, :, :] for i in (1, 2))
        segment = jnp.where(first < 0, -1, jnp.take_along_axis(image, first, axis=1))
        out = attend(q, k, v, q_segment=segment, kv_segment=image, causal=False, runtime=self.runtime)
        axes = ("heads", "head_dim", "embed")
        out = Einsum("...NH,NHD->...D", (heads, head_dim, width), axes, dtype, bias=True, name="out")(out)
        mlp = Mlp(config.mlp, width, config.activation, dtype, name="mlp")
        return out + mlp(LayerNorm(config.norm_eps, name="norm")(out))
