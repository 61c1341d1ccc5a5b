"""Functions that write visual features into the decoder's hidden states."""

from functools import partial

import jax
import jax.numpy as jnp

from mllm_jax.types import TokenBlend


def _at_text_positions(visual, vision_index, mix: TokenBlend | None):
    """Gathers visual tokens [B M D] per row to [B T D]; the result is meaningless where the index is -1.

    A gather, so that the slower scatter runs only in the backward pass, and rows of text cost nothing.
    """

    def gather(index):
        return jnp.take_along_axis(visual, jnp.maximum(index, 0)[..., None], axis=1)

    if mix is None:
        return gather(vision_index)
    indices = (vision_index, *jnp.unstack(mix.index, axis=-1))
    return sum(weight[..., None] * gather(index) for weight, index in zip(jnp.unstack(mix.weight, axis=-1), indices))


def splice(x, visual, vision_index, mix: TokenBlend | None = None):
    """Replaces text embeddings [B T D] by visual tokens [B M D], or their blends, where i32[B T] `vision_index` >= 0.

    Example of one row: x = [t0 t1 t2 t3] and vision_index = [-1 0 1 -1] -> [t0 v0 v1 t3].
    """
    return jnp.where((vision_index >= 0)[..., None], _at_text_positions(visual, vision_index, mix).astype(x.dtype), x)


# Recompute the gather in the backward pass: saving it would take a mask [B T D] and features for every scanned layer.
@partial(jax.checkpoint, prevent_cse=False)
def deepstack(x, deep, vision_index, layer, mix: TokenBlend | None = None):
    """Adds features of an encoder layer to the residual stream at visual tokens (DeepStack, arXiv 2406.04334).

    Args:
      x: [B T D] output of decoder layer `layer`.
      deep: [deepstack B M D] features of the tapped layers; decoder layers from `len(deep)` on return x unchanged.
      vision_index: i32[B T] index of the visual token, -1 at text.
      layer: i32[] index of the decoder layer, from 0; may be traced.
      mix: blend of the visual tokens at `vision_index`. None: no blend.
    Returns:
      [B T D].
    """
    layers = deep.shape[0]

    def add(x):
        features = jax.lax.dynamic_index_in_dim(deep, jnp.minimum(layer, layers - 1), 0, keepdims=False)
        return x + jnp.where(
            (vision_index >= 0)[..., None], _at_text_positions(features, vision_index, mix).astype(x.dtype), 0
        )

    return jax.lax.cond(layer < layers, add, lambda x: x, x)
