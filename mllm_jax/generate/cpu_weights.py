"""Layout of weights on CPU while tokens are decoded one by one.

A decoding step is bound by reading every weight once. XLA on CPU copies a layer out of a stack before it can multiply
with it, and packs a [V D] head anew in every product of several rows: both cost more than the reading. So on CPU the
layers are unstacked and the head is transposed once per call. Inside a program they are stacked again: XLA cancels a
slice of a stack, and a transposition of a transposition, and nothing is moved.
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
    params: Any  # parameters of the model; without the decoder's layers if these are unstacked
    layers: dict[str, tuple] | None = None  # each of the decoder's layers, by the name of their stack
    head: Array | None = None  # [D V]


def lay_out(model: VLM, params, rows: int) -> tuple[VLM, Weights]:
    """The weights for decoding `rows` rows, and the model that reads them fast. On CPU the decoder is copied."""
    if jax.default_backend() != "cpu":
        return model, Weights({"decoder": params["decoder"]})
    runtime = dataclasses.replace(model.config.runtime, scan=False, remat="none")
    model = VLM(dataclasses.replace(model.config, runtime=runtime))
    names = tuple(segment.name for segment in segments(model.config.decoder.kinds))
    return model, _apart({"decoder": params["decoder"]}, names, turn_head=rows > 1)


def for_hidden(weights: Weights):
    """Parameters that `model.apply` takes."""
    if weights.layers is None:
        return weights.params
    stacked = {name: jax.tree.map(lambda *parts: jnp.stack(parts), *apart) for name, apart in weights.layers.items()}
    return {"decoder": {**weights.params["decoder"], **stacked}}


def for_logits(weights: Weights):
    """Parameters that `model.apply(..., method="logits")` takes."""
    if weights.head is None:
        return weights.params
    decoder = weights.params["decoder"]
    own = {"head": {"w": weights.head.T}} if "head" in decoder else {"embed": weights.head.T}
    return {"decoder": {**decoder, **own}}


@functools.partial(jax.jit, static_argnames=("names", "turn_head"))
def _apart(params, names: tuple[str, ...], turn_head: bool) -> Weights:
    decoder, layers = dict(params["decoder"]), {}
    for name in names:
        stacked = decoder.pop(name)
        depth = len(jax.tree.leaves(stacked)[0])
        layers[name] = tuple(jax.tree.map(lambda part, i=i: part[i], stacked) for i in range(depth))
    return Weights({"decoder": decoder}, layers, head_table(params).T if turn_head else None)
