"""The one primitive where a weight meets an activation."""

import math

import jax
from flax import linen as nn

from mllm_jax.sharding import named


class Einsum(nn.Module):
    """`einsum(equation, x, w) + b`, computed in `dtype` from fp32 parameters `w` and `b`.

    The equation has capital letters of the legend and one ellipsis on the activation, e.g. "...D,DNH->...NH".
    Letters of the weight that reach the output are its output axes; the bias has exactly those.
    Initialised normal with variance 1 / fan-in.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: str
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        weight_letters, output = self.equation.split(",")[1].split("->")
        fan_in = math.prod(size for letter, size in zip(weight_letters, self.shape) if letter not in output)
        w = self.param("w", named(nn.initializers.normal(fan_in**-0.5), *self.axes), self.shape)
        # fp32 means fp32 on every platform: TPUs and GPUs would otherwise round the operands.
        precision = jax.lax.Precision.HIGHEST if self.dtype == "float32" else None
        contracted = [letter for letter in weight_letters if letter not in output]
        axes = (range(x.ndim - len(contracted), x.ndim), [weight_letters.index(letter) for letter in contracted])
        # jnp.einsum would contract several axes in reverse order, for which XLA copies the weight.
        y = jax.lax.dot_general(x.astype(self.dtype), w.astype(self.dtype), (axes, ((), ())), precision=precision)
        if self.bias:
            kept = [index for index, letter in enumerate(weight_letters) if letter in output]
            shape = tuple(self.shape[index] for index in kept)
            b = self.param("b", named(nn.initializers.zeros, *(self.axes[index] for index in kept)), shape)
            y = y + b.astype(self.dtype)
        return y


class Weight(nn.Module):
    """A weight `w` alone, for products that `Einsum` cannot say; fp32, normal with variance 1 / fan_in."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int

    @nn.compact
    def __call__(self):
        return self.param("w", named(nn.initializers.normal(self.fan_in**-0.5), *self.axes), self.shape)
