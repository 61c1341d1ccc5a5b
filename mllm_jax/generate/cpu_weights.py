"""Weight layout for fast decoding on CPU.

A decoding step is bound by reading every weight once. XLA on CPU copies each layer out of the stacked weights before it
multiplies, and repacks a [V D] head in every product of several rows; both cost more than the reading itself.
Therefore, on CPU, the layers are unstacked and the head is transposed once per call. The decoding program stacks and
transposes them again, which costs nothing: XLA cancels a slice of a stack, and a double transposition.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mllm_jax.model.vlm import VLM, head_table
from mllm_jax.nn.stack import segments
from mllm_jax.types import Array


class Weights(NamedTuple):
    """Parameters of a decoder in the layout for decoding."""

    params: Any  # parameters of the model, without the decoder's layers if these are unstacked
    layers: dict[str, tuple] | None = None  # unstacked layers of the decoder, by the name of their stack
    head: Array | None = None  # [D V] transposed head. None: `params` contains it


def lay_out(model: VLM, params, rows: int) -> tuple[VLM, Weights]:
    """Returns a model and the weights with which it decodes `rows` rows fast. On CPU they are a copy of the decoder."""
    if jax.default_backend() != "cpu":
        return model, Weights({"decoder": params["decoder"]})
    runtime = dataclasses.replace(model.config.runtime, scan=False, remat="none")
    model = VLM(dataclasses.replace(model.config, runtime=runtime))
    names = tuple(segment.name for segment in segments(model.config.decoder.kinds))
    return model, _unstack({"decoder": params["decoder"]}, names, transpose_head=rows > 1)


def for_hidden(weights: Weights):
    """Returns the parameters for `model.apply(..., hidden=True)`."""
    if weights.layers is None:
        return weights.params
    stacked = {name: jax.tree.map(lambda *parts: jnp.stack(parts), *layers) for name, layers in weights.layers.items()}
    return {"decoder": {**weights.params["decoder"], **stacked}}


def for_logits(weights: Weights):
    """Returns the parameters for `model.apply(..., method="logits")`."""
    if weights.head is None:
        return weights.params
    decoder = weights.params["decoder"]
    head = {"head": {"w": weights.head.T}} if "head" in decoder else {"embed": weights.head.T}
    return {"decoder": {**decoder, **head}}


@functools.partial(jax.jit, static_argnames=("names", "transpose_head"))
def _unstack(params, names: tuple[str, ...], transpose_head: bool) -> Weights:
    decoder, layers = dict(params["decoder"]), {}
    for name in names:
        stacked = decoder.pop(name)
        depth = len(jax.tree.leaves(stacked)[0])
        layers[name] = tuple(jax.tree.map(lambda part, i=i: part[i], stacked) for i in range(depth))
    return Weights({"decoder": decoder}, layers, head_table(params).T if transpose_head else None)
