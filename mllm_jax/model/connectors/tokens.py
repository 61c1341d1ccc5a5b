"""Grouping of patches into visual tokens, shared by all connectors."""

from collections.abc import Callable

from einops import rearrange

from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.activations import fold_rows, shard, unfold_rows


def to_tokens(features, patches_per_token: int, layers: Callable, runtime: Runtime):
    """Applies a connector's layers to groups of patches; patch rows are sharded over all devices meanwhile.

    Args:
      features: [B R P D] encoder features; the patches of a visual token are contiguous.
      patches_per_token: number of patches that become a visual token.
      layers: function of grouped patches [rows M group D] that returns [rows M out].
      runtime: runtime of the model.
    Returns:
      [B (R M) out].
    """
    rules, connector_rules, count = runtime.rules, runtime.within("connector").rules, len(features)
    x = rearrange(fold_rows(features, rules), "BR (M group) D -> BR M group D", group=patches_per_token)
    x = shard(
        layers(shard(x, ("batch", "length", None, None), connector_rules)), ("batch", "length", None), connector_rules
    )
    # The only exchange: visual tokens move from the devices of their patch row to those of their batch row.
    x = unfold_rows(shard(x, ("batch", None, None), rules), count, rules)
    return rearrange(x, "B R M D -> B (R M) D")
