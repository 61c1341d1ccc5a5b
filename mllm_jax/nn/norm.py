"""Normalization, always computed in fp32 and returned in the dtype of the input."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.sharding.weights import partitioned


class RMSNorm(nn.Module):
    """Computes x / rms(x) * (offset + scale) over the last axis (arXiv 1910.07467). Gemma has an offset of 1."""

    eps: float = 1e-6
    offset: float = 0.0

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", partitioned(nn.initializers.constant(1 - self.offset), None), x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * (self.offset + scale)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Computes (x - mean) / std * scale + bias over the last axis (arXiv 1607.06450)."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", partitioned(nn.initializers.ones, None), x.shape[-1:])
        bias = self.param("bias", partitioned(nn.initializers.zeros, None), x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


NORMS = {"rms": RMSNorm, "rms_offset": partial(RMSNorm, offset=1.0), "layer": LayerNorm}
