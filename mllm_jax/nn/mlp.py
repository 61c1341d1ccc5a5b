"""Feed-forward blocks."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.nn.einsum import Einsum

ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


class Mlp(nn.Module):
    """Computes down(activation(up(x))): [... D] -> [... out]."""

    mlp: int
    out: int
    activation: str
    dtype: str
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        up = Einsum("...D,DF->...F", (width, self.mlp), ("embed", "mlp"), self.dtype, bias=self.bias, name="up")
        down = Einsum("...F,FD->...D", (self.mlp, self.out), ("mlp", "embed"), self.dtype, bias=self.bias, name="down")
        return down(ACTIVATIONS[self.activation](up(x)))


class GatedMlp(nn.Module):
    """Computes down(activation(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202): [... D] -> [... out]."""

    mlp: int
    out: int
    activation: str
    dtype: str
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        gate = Einsum("...D,DF->...F", (width, self.mlp), ("embed", "mlp"), self.dtype, bias=self.bias, name="gate")
        up = Einsum("...D,DF->...F", (width, self.mlp), ("embed", "mlp"), self.dtype, bias=self.bias, name="up")
        down = Einsum("...F,FD->...D", (self.mlp, self.out), ("mlp", "embed"), self.dtype, bias=self.bias, name="down")
        return down(ACTIVATIONS[self.activation](gate(x)) * up(x))
