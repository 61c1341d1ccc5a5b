"""Attention weights of the decoder for a few queries; the model itself never stores them."""

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
    """Returns the attention weights of all decoder layers and heads for the query tokens `at`.

    Runs the model again and computes the rows of these queries in each layer. The result does not depend on the
    attention implementation, remat policy or scan.

    Args:
      vlm: object with `config`, `model` and `params`, such as the result of `mllm_jax.load_pretrained`.
      batch: conversations, packed or one per row. The query that predicts an answer's token is the column before it,
        where `weight` is above 0.
      at: i32[B Q] columns of the queries, Q in every row.
    Returns:
      f32[L B N Q T] attention weights. They sum to 1 over T, and are 0 at other conversations and at padding. Rows of
        queries at padding are meaningless.
    Raises:
      ValueError: the model has no decoder or uses latent attention, or `at` is not i[B Q] or outside the batch.
    """
    config = vlm.config
    if not isinstance(config, ModelConfig) or config.decoder is None:
        raise ValueError(f"config.family={config.family}: attention_of needs a decoder. Pass a language model.")
    if not isinstance(config.decoder.attention, AttentionConfig):
        raise ValueError("attention_of does not support latent attention (MLA). Pass a model with AttentionConfig.")
    rows, length = batch.tokens.shape
    at = np.asarray(at)
    if at.ndim != 2 or len(at) != rows or not np.issubdtype(at.dtype, np.integer) or ((at < 0) | (at >= length)).any():
        raise ValueError(
            f"at={at.dtype}{list(at.shape)}: not columns of the batch. "
            f"Pass integers [{rows}, any] from 0 to {length - 1}."
        )
    model = VLM(replace(config, runtime=replace(config.runtime, remat="none")))
    return _record(model, vlm.params, batch, jnp.asarray(at))


@partial(jax.jit, static_argnames="model")
def _record(model: VLM, params, batch: Batch, at) -> jax.Array:
    """Runs the model and records the attention weights of every `Attention.attend` call. Returns f32[L B N Q T]."""

    def record(method, args, kwargs, context):
        if isinstance(context.module, Attention) and context.method_name == "attend":
            q, k, _ = args
            mask_args = {name: value for name, value in kwargs.items() if name != "offset"}
            weights = probabilities(q, k, at, **mask_args)
            context.module.sow(TAPS, NOTED, weights, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return method(*args, **kwargs)

    with nn.intercept_methods(record):
        _, taps = model.apply({"params": params}, batch, hidden=True, mutable=[TAPS])
    recorded, layers = flatten(taps[TAPS]["decoder"]), {}
    for segment in segments(model.config.decoder.kinds):
        for name, indices, _ in segment.slots():
            layers |= dict(zip(indices, recorded[f"{name}/attention/{NOTED}"]))
    return jnp.stack([layers[index] for index in sorted(layers)])
