"""Normalisation, always computed in fp32 and returned in the dtype of the input."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.sharding import named


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis (arXiv 1910.07467)."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", named(nn.initializers.ones, None), x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias over the last axis (arXiv 1607.06450)."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", named(nn.initializers.ones, None), x.shape[-1:])
        bias = self.param("bias", named(nn.initializers.zeros, None), x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)
