"""Attention weights of the decoder for a few queries, which no attention implementation stores."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mllm_jax.common.trees import flatten
from mllm_jax.model.vlm import VLM, ModelConfig
from mllm_jax.nn.attention.attend import probabilities
from mllm_jax.nn.attention.layer import Attention, AttentionConfig
from mllm_jax.nn.runtime import TAPS
from mllm_jax.nn.stack import segments
from mllm_jax.types import Array, Batch

NOTED = "probabilities"


def attention_of(vlm: Any, batch: Batch, at: Array) -> jax.Array:
    """Attention weights of all decoder heads at the tokens `at`.

    A pure function: it runs the model again and computes the rows of these queries in each layer. The result does not
    depend on the model's attention implementation, remat policy or scan.

    Args:
      vlm: anything with `config`, `model` and `params` (`mllm_jax.load_pretrained`).
      batch: conversations, packed or one per row. The prediction of an answer's token is made at the column before it,
        where `weight` is above 0.
      at: i32[B Q] columns of the queries, Q in every row.
    Returns:
      f32[L B N Q T] of every layer and head; each row sums to 1, and is 0 at other conversations and at padding. The
        row of a query at padding has no meaning.
    Raises:
      ValueError: the model has no decoder or latent attention, or `at` are not columns of the batch.
    """
    config = vlm.config
    if not isinstance(config, ModelConfig) or config.decoder is None:
        raise ValueError(f"attention_of reads the decoder of a language model; family {config.family} has none here")
    if not isinstance(config.decoder.attention, AttentionConfig):
        raise ValueError("attention_of cannot read latent attention, whose heads share one latent of each token")
    rows, length = batch.tokens.shape
    at = np.asarray(at)
    if at.ndim != 2 or len(at) != rows or not np.issubdtype(at.dtype, np.integer) or ((at < 0) | (at >= length)).any():
        raise ValueError(f"at must be whole numbers [{rows}, any] from 0 to {length - 1}; it is {at.dtype}{at.shape}")
    plain = VLM(replace(config, runtime=replace(config.runtime, remat="none")))
    return _listened(plain, vlm.params, batch, jnp.asarray(at))


@partial(jax.jit, static_argnames="model")
def _listened(model: VLM, params, batch: Batch, at) -> jax.Array:
    def note(method, arguments, options, context):
        if isinstance(context.module, Attention) and context.method_name == "attend":
            q, k, _ = arguments
            about = {name: value for name, value in options.items() if name != "offset"}
            found = probabilities(q, k, at, **about)
            context.module.sow(TAPS, NOTED, found, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return method(*arguments, **options)

    with nn.intercept_methods(note):
        _, taps = model.apply({"params": params}, batch, hidden=True, mutable=[TAPS])
    noted, layers = flatten(taps[TAPS]["decoder"]), {}
    for part in segments(model.config.decoder.kinds):
        for name, numbers, _ in part.slots():
            layers |= dict(zip(numbers, noted[f"{name}/attention/{NOTED}"]))
    return jnp.stack([layers[number] for number in sorted(layers)])
