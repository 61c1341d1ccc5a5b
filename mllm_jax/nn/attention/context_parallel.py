"""Attention over rows whose tokens are sharded over devices (context parallelism), with one of two exchanges.

Ulysses (arXiv 2309.14509): an all-to-all turns a shard of the tokens with all heads into all tokens with a shard of the
heads, so that the platform's kernel runs on full sequences. A second all-to-all restores the sharding of the result.

Ring (arXiv 2310.01889): queries stay, keys and values go around the ring. Under a causal mask the device with the first
tokens would be idle for most of the round. Each device therefore takes one part from the beginning and one from the end
(zig-zag order of Llama 3, arXiv 2407.21783): of 2n parts, device i takes i and 2n - 1 - i. For n = 2 devices:

    natural order   0 1 | 2 3
    zig-zag order   0 3 | 1 2

Every layer permutes its tokens to this order and back. That costs about as much as Ulysses exchanges, but all code
outside this file (positions, segments, images, loss) uses the natural order.

All code here runs inside `jax.shard_map`, on the rows, tokens and heads of one device.
"""

import math

import jax
import jax.numpy as jnp

from mllm_jax.nn.attention.flash import flash
from mllm_jax.nn.attention.kernels import repeat_heads
from mllm_jax.nn.attention.masks import AttentionSpec, KeyBounds, QueryBounds


def exchange_for(heads: int, kv_heads: int, devices: int, wanted: str) -> str:
    """Returns the exchange of tokens: the configured one, or for "auto" Ulysses if it can shard the heads, else ring.

    Raises:
      ValueError: "ulysses" is configured but cannot shard the heads.
    """
    divides = heads % math.lcm(kv_heads, devices) == 0
    if wanted == "ulysses" and not divides:
        raise ValueError(
            f"runtime.context='ulysses': cannot shard {heads} heads ({kv_heads} of keys and values) over {devices} "
            "devices. Set runtime.context='ring' or reduce the mesh axis 'context'."
        )
    return "ulysses" if divides and wanted != "ring" else "ring"


def ulysses(q, k, v, query: QueryBounds, key: KeyBounds, axes: tuple[str, ...], kernel):
    """Applies `kernel(q, k, v, query, key)` to full sequences and a shard of the heads.

    Args:
      q: [B T/n N H]; k, v: [B T/n K H] of this device's tokens, with N a multiple of K and n.
      query, key: bounds of these tokens from `mask_bounds`.
      axes: mesh axes of the n shards.
    Returns:
      [B T/n N H].
    """
    k, v = repeat_heads(k, v, jax.lax.axis_size(axes))
    q, k, v = (jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    bounds = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True), (query, key))
    return jax.lax.all_to_all(kernel(q, k, v, *bounds), axes, split_axis=1, concat_axis=2, tiled=True)


def ring(q, k, v, query: QueryBounds, key: KeyBounds, axes: tuple[str, ...], spec: AttentionSpec):
    """Returns attention of this device's queries, with keys and values passed around a ring.

    Arguments and result are those of `ulysses`. A device holds at most two shards of keys and values, and the scores of
    one block of queries with one block of keys.
    """
    tokens = (q, k, v, query, key)
    balanced = spec.causal and q.shape[1] % 2 == 0  # an odd number of tokens cannot be halved
    if balanced:
        tokens = jax.tree.map(lambda x: _to_zigzag(x, axes), tokens)
    out = flash(*tokens, spec, axes)
    return _from_zigzag(out, axes) if balanced else out


def _routes(axes):
    """Returns (source, target) devices of the even parts and of the odd parts, from natural to zig-zag order.

    On 2 devices, parts 0 and 2 take [(0, 0), (1, 1)], parts 1 and 3 [(0, 1), (1, 0)].
    """
    devices = jax.lax.axis_size(axes)
    target = lambda part: min(part, 2 * devices - 1 - part)
    return [[(i, target(2 * i + odd)) for i in range(devices)] for odd in (0, 1)]


def _to_zigzag(x, axes):
    """Exchanges parts 2i and 2i + 1 (of 2n) of device i's tokens [B T/n ...] for parts i and 2n - 1 - i."""
    even, odd = (jax.lax.ppermute(part, axes, route) for part, route in zip(jnp.split(x, 2, axis=1), _routes(axes)))
    return _swap_on_odd(even, odd, axes)


def _from_zigzag(x, axes):
    """Inverts `_to_zigzag`."""
    first, second = jnp.split(x, 2, axis=1)
    even, odd = jnp.split(_swap_on_odd(first, second, axes), 2, axis=1)
    inverse = [[(target, source) for source, target in route] for route in _routes(axes)]
    return jnp.concatenate([jax.lax.ppermute(part, axes, route) for part, route in zip((even, odd), inverse)], axis=1)


def _swap_on_odd(first, second, axes):
    """Concatenates two parts, the second one first on odd devices: of parts i and 2n - 1 - i, i is even on even i."""
    swap = jax.lax.axis_index(axes) % 2 == 1
    pair = jnp.where(swap, second, first), jnp.where(swap, first, second)
    return jnp.concatenate(pair, axis=1)
