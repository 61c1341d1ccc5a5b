"""Products of weights and activations, with optional quantization and adapters."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.nn.lora import DOWN, KEEP, SCALE, UP
from mllm_jax.nn.precision import precision_of
from mllm_jax.nn.quantization import SCALE as QUANTIZED
from mllm_jax.nn.quantization import dequantize
from mllm_jax.sharding.weights import partitioned
from mllm_jax.types import Array


class Einsum(nn.Module):
    """Computes `einsum(equation, x, w) + b` in `dtype` from fp32 parameters `w` and `b`.

    The equation has one ellipsis on the activation and capital letters for the other axes, e.g. "...D,DNH->...NH".
    Weight axes that the output has are output axes; the bias has exactly these. `w` is initialized from a normal
    distribution with variance 1 / fan-in. If the parameters have an adapter for `w`, its product is added (nn/lora.py);
    `w` may be quantized (nn/quantization.py).
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: str
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        letters, output = self.equation.split(",")[1].split("->")
        inputs = [index for index, letter in enumerate(letters) if letter not in output]
        outputs = [index for index, letter in enumerate(letters) if letter in output]
        fan_in = math.prod(self.shape[index] for index in inputs)
        matrix = tuple(tuple(index - len(letters) for index in axes) for axes in (inputs, outputs))
        init = partitioned(nn.initializers.normal(fan_in**-0.5), *self.axes, matrix=matrix)
        axes = (range(x.ndim - len(inputs), x.ndim), inputs)

        def product(x, w):
            """Returns the product of x and w. `jnp.einsum` would contract axes in reverse order, so XLA copies w."""
            return jax.lax.dot_general(x, w.astype(self.dtype), (axes, ((), ())), precision=precision_of(self.dtype))

        if self.has_variable("params", QUANTIZED):
            # The backward pass recomputes the full weight, which would otherwise be saved for every layer.
            leaves = {name: leaf for name, leaf in self.variables["params"].items() if name.startswith("w_")}
            y = jax.checkpoint(lambda x, leaves: product(x, dequantize(leaves, matrix[0])))(
                x.astype(self.dtype), leaves
            )
        else:
            y = product(x.astype(self.dtype), self.param("w", init, self.shape))
        if self.has_variable("params", DOWN):
            y = y + self._adapted(x, *("".join(letters[index] for index in axes) for axes in (inputs, outputs)))
        if self.bias:
            shape = tuple(self.shape[index] for index in outputs)
            b = self.param("b", partitioned(nn.initializers.zeros, *(self.axes[index] for index in outputs)), shape)
            y = y + b.astype(self.dtype)
        return y

    def _adapted(self, x, inputs: str, outputs: str):
        """Returns scale * (x A) B for the letters of input and output axes.

        Leading output axes may have a separate adapter per index, e.g. C in A [C D r], B [C r N H] and scale [C].
        """
        down, up, scale = (self.get_variable("params", name).astype(self.dtype) for name in (DOWN, UP, SCALE))
        x, product = x.astype(self.dtype), partial(jnp.einsum, precision=precision_of(self.dtype))
        if self.has_rng("dropout") and self.has_variable("params", KEEP):
            keep = self.get_variable("params", KEEP)
            x = jnp.where(jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape), x / keep.astype(x.dtype), 0)
        lead, others = outputs[: down.ndim - len(inputs) - 1], outputs[down.ndim - len(inputs) - 1 :]
        low = scale[..., None] * product(f"...{inputs},{lead}{inputs}r->...{lead}r", x, down)
        return product(f"...{lead}r,{lead}r{others}->...{outputs}", low, up)


class Weight(nn.Module):
    """fp32 weight `w` for products that `Einsum` cannot express, initialized with variance 1 / fan_in.

    matrix: see `Partitioned`. None: the weight cannot have an adapter.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @nn.compact
    def __call__(self):
        init = partitioned(nn.initializers.normal(self.fan_in**-0.5), *self.axes, matrix=self.matrix)
        return self.param("w", init, self.shape)

    def factors(self) -> tuple[Array, ...]:
        """Returns (scale A, B) of the weight's adapter, or () without an adapter."""
        if not self.has_variable("params", DOWN):
            return ()
        down, up, scale = (self.get_variable("params", name) for name in (DOWN, UP, SCALE))
        return jnp.expand_dims(scale, range(scale.ndim, down.ndim)) * down, up
