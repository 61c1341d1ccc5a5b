"""Attention over rows whose tokens are sharded over devices (context parallelism), with one of two exchanges.

Ulysses (arXiv 2309.14509): an all-to-all turns a shard of the tokens with all heads into all tokens with a shard of the
heads, so that the platform's kernel runs on full sequences; a second one turns the result back.

Ring (arXiv 2310.01889): queries stay, keys and values go around. Under a causal mask a device with the first tokens
would be idle for most of the round, so each takes one part from the beginning and one from the end (of 2n parts, device
i takes i and 2n - 1 - i: the zig-zag order of Llama 3, arXiv 2407.21783). Tokens are brought into that order here and
back again in every layer. That costs each layer about as much as Ulysses exchanges, but all code outside this file
(positions, segments, images, loss) knows only the natural order.

All code here runs inside `jax.shard_map`, on a device's own rows, tokens and heads.
"""

import math

import jax
import jax.numpy as jnp

from mllm_jax.nn.attention.flash import flash
from mllm_jax.nn.attention.kernels import repeat_heads
from mllm_jax.nn.attention.masks import AttentionSpec, KeyBounds, QueryBounds


def exchange_for(heads: int, kv_heads: int, devices: int, wanted: str) -> str:
    """The exchange of tokens: the configured one, or under "auto" Ulysses if it can shard the heads."""
    divides = heads % math.lcm(kv_heads, devices) == 0
    if wanted == "ulysses" and not divides:
        raise ValueError(
            f"runtime.context='ulysses' cannot split {heads} heads ({kv_heads} of keys and values) over {devices} "
            "devices; use 'ring' or a smaller mesh axis 'context'"
        )
    return "ulysses" if divides and wanted != "ring" else "ring"


def ulysses(q, k, v, query: QueryBounds, key: KeyBounds, axes: tuple[str, ...], kernel):
    """`kernel(q, k, v, query, key)` on full sequences and a shard of the heads.

    Args:
      q: [B T/n N H]; k, v: [B T/n K H], of this device, with N a multiple of K and n.
      query, key: bounds of its tokens from `mask_bounds`.
      axes: mesh axes of the n shards.
    Returns:
      [B T/n N H].
    """
    k, v = repeat_heads(k, v, jax.lax.axis_size(axes))
    q, k, v = (jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    whole = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True), (query, key))
    return jax.lax.all_to_all(kernel(q, k, v, *whole), axes, split_axis=1, concat_axis=2, tiled=True)


def ring(q, k, v, query: QueryBounds, key: KeyBounds, axes: tuple[str, ...], spec: AttentionSpec):
    """Attention while keys and values go round; arguments and result as of `ulysses`.

    A device never holds more than two parts of keys and values, nor more scores than those of two blocks of tokens.
    """
    tokens = (q, k, v, query, key)
    balanced = spec.causal and q.shape[1] % 2 == 0  # an odd number of tokens cannot be halved
    if balanced:
        tokens = jax.tree.map(lambda x: _to_zigzag(x, axes), tokens)
    out = flash(*tokens, spec, axes)
    return _from_zigzag(out, axes) if balanced else out


def _routes(axes):
    """For the even and for the odd parts: the device that holds each in natural order, and in zig-zag order."""
    devices = jax.lax.axis_size(axes)
    place = lambda part: min(part, 2 * devices - 1 - part)
    return [[(i, place(2 * i + odd)) for i in range(devices)] for odd in (0, 1)]


def _to_zigzag(x, axes):
    """[B T/n ...]: parts 2i and 2i + 1 of 2n in, parts i and 2n - 1 - i out."""
    even, odd = (jax.lax.ppermute(part, axes, route) for part, route in zip(jnp.split(x, 2, axis=1), _routes(axes)))
    return _in_turn(even, odd, axes)


def _from_zigzag(x, axes):
    first, second = jnp.split(x, 2, axis=1)
    even, odd = jnp.split(_in_turn(first, second, axes), 2, axis=1)
    back = [[(there, here) for here, there in route] for route in _routes(axes)]
    return jnp.concatenate([jax.lax.ppermute(part, axes, route) for part, route in zip((even, odd), back)], axis=1)


def _in_turn(first, second, axes):
    """The two joined, on odd devices the second one first: of parts i and 2n - 1 - i, i is the even one on even i."""
    swap = jax.lax.axis_index(axes) % 2 == 1
    pair = jnp.where(swap, second, first), jnp.where(swap, first, second)
    return jnp.concatenate(pair, axis=1)
