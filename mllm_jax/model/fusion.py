"""Fusion of vision into the decoder: pure functions of arrays."""

from functools import partial

import jax
import jax.numpy as jnp

from mllm_jax.types import TokenBlend


def _at_text_positions(visual, vision_index, mix: TokenBlend | None):
    """Row-wise gather [B M D] -> [B T D]; where the index is -1 the result is meaningless.

    A gather, not a scatter: its inverse runs only backward, and rows of text cost nothing.
    """

    def at(index):
        return jnp.take_along_axis(visual, jnp.maximum(index, 0)[..., None], axis=1)

    if mix is None:
        return at(vision_index)
    indices = (vision_index, *jnp.unstack(mix.index, axis=-1))
    return sum(share[..., None] * at(index) for share, index in zip(jnp.unstack(mix.weight, axis=-1), indices))


def splice(x, visual, vision_index, mix: TokenBlend | None = None):
    """Text embeddings [B T D] with visual tokens [B M D], or their mixes, where vision_index i32[B T] is not -1."""
    return jnp.where((vision_index >= 0)[..., None], _at_text_positions(visual, vision_index, mix).astype(x.dtype), x)


# Recompute the gather in the backward pass: saving it would take a mask [B T D] and features for every scanned layer.
@partial(jax.checkpoint, prevent_cse=False)
def deepstack(x, deep, vision_index, layer, mix: TokenBlend | None = None):
    """Add the features of tap `layer` to the visual positions of the residual stream (DeepStack, arXiv 2406.04334).

    Args:
      x: [B T D] output of decoder layer `layer`.
      deep: [deepstack B M D]; layers from `deep.shape[0]` on get nothing, and compute nothing.
      vision_index: i32[B T].
      layer: i32[] 0-based, may be traced.
      mix: of `vision_index`.
    """
    layers = deep.shape[0]

    def add(x):
        features = jax.lax.dynamic_index_in_dim(deep, jnp.minimum(layer, layers - 1), 0, keepdims=False)
        return x + jnp.where(
            (vision_index >= 0)[..., None], _at_text_positions(features, vision_index, mix).astype(x.dtype), 0
        )

    return jax.lax.cond(layer < layers, add, lambda x: x, x)
