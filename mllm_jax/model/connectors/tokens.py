"""Grouping of patches into visual tokens, which every connector does around its own layers."""

from collections.abc import Callable

from einops import rearrange

from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.activations import fold_rows, shard, unfold_rows


def to_tokens(features, patches_per_token: int, layers: Callable, runtime: Runtime):
    """`layers` maps patches [rows M group D] of visual tokens to [rows M out]. [B R P D] -> [B (R M) out].

    Inside, patch rows are sharded over all devices.
    """
    rules, own, count = runtime.rules, runtime.within("connector").rules, len(features)
    x = rearrange(fold_rows(features, rules), "BR (M group) D -> BR M group D", group=patches_per_token)
    x = shard(layers(shard(x, ("batch", "length", None, None), own)), ("batch", "length", None), own)
    # Only here do rows of patches, spread over every device, become tokens of the batch rows that own them.
    x = unfold_rows(shard(x, ("batch", None, None), rules), count, rules)
    return rearrange(x, "B R M D -> B (R M) D")
