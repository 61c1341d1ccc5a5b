"""Learned queries in place of patches: what connectors share that give every image the same number of visual tokens.

A patch row has a static number of slots, one for each image that it can hold, and every slot has a copy of the queries.
Queries and patches of one image have its number, and attention stays within a number. For example, a row of eight
patches with images 1 and 2, three slots and two queries:

    number of a patch   1 1 1 1 1 2 2 0
    number of a query   1 1 2 2 0 0          the third slot is empty: nobody reads its visual tokens
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.activations import fold_rows, shard, unfold_rows
from mllm_jax.sharding.weights import partitioned
from mllm_jax.types import Vision


def to_query_tokens(features, vision: Vision, layers: Callable, runtime: Runtime, prefix_tokens: bool = True):
    """Applies the layers of a connector to patch rows, which are sharded over all devices.

    Args:
      features: [B R P D].
      vision: the images of these features, with `slots`.
      layers: `layers(x [rows P D], vision) -> [rows I*Q out]`, with the fields of `vision` as [rows P ...].
      prefix_tokens: whether queries attend to the class token and the registers of an image, too.
    Returns:
      [B (R I Q) out].
    Raises:
      ValueError: the batch has no slots.
    """
    if vision.slots is None:
        raise ValueError(
            "this connector needs batches with a number of images per patch row: set data.images_per_row, or pass "
            "`images_per_row` of the budget"
        )
    rules, own, count = runtime.rules, runtime.within("connector").rules, len(features)
    vision = jax.tree.map(lambda x: fold_rows(x, rules), vision)
    if not prefix_tokens:
        vision = vision._replace(image=jnp.where(vision.coords[..., 0] < 0, 0, vision.image))
    x = shard(fold_rows(features, rules), ("batch", "length", None), own)
    x = shard(layers(x, vision), ("batch", "length", None), own)
    # Only here do rows of queries, spread over every device, become tokens of the batch rows that own them.
    x = unfold_rows(shard(x, ("batch", None, None), rules), count, rules)
    return rearrange(x, "B R M D -> B (R M) D")


class Queries(nn.Module):
    """The learned queries, one copy for every slot of a patch row."""

    count: int
    width: int
    runtime: Runtime

    @nn.compact
    def __call__(self, slots):
        """i32[rows I] image numbers -> ([rows I*Q D], i32[rows I*Q] image number of every query)."""
        init = partitioned(nn.initializers.normal(self.width**-0.5), None, "embed")
        queries = self.param("tokens", init, (self.count, self.width)).astype(self.runtime.dtype)
        x = repeat(queries, "Q D -> rows (I Q) D", rows=len(slots), I=slots.shape[1])
        return x, repeat(slots, "rows I -> rows (I Q)", Q=self.count)


def fitted(x, width: int, dtype: str, name: str, bias: bool = True):
    """Returns `x` [... D] with `width` values: through a linear layer `name` where D differs from it."""
    if x.shape[-1] == width:
        return x
    return Einsum("...D,DF->...F", (x.shape[-1], width), ("embed", "mlp"), dtype, bias=bias, name=name)(x)
