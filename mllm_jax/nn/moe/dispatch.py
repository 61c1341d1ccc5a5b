"""Dispatch of tokens to their experts and back: pure functions, with equal results if no token is dropped.

Tokens are moved by gathers alone, forward and backward: the assignment is a permutation, so that its transpose is a
gather with the inverse.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from mllm_jax.nn.moe.all_to_all import all_to_all
from mllm_jax.nn.moe.grouped_matmul import grouped_for, grouped_matmul, row_multiple
from mllm_jax.nn.precision import einsum
from mllm_jax.nn.runtime import EXCHANGED, Runtime, expect_share
from mllm_jax.sharding.activations import shard
from mllm_jax.sharding.logical_axes import as_axes, num_shards, partition_spec
from mllm_jax.types import Array


class Experts(NamedTuple):
    """Weights of all experts, each a gated MLP, and the two factors of their adapters, where they have any."""

    gate_up: Array  # [E 2 D F]
    down: Array  # [E F D]
    gate_up_factors: tuple[Array, ...] = ()  # [E D r], [E r 2 F]
    down_factors: tuple[Array, ...] = ()  # [E F r], [E r D]


AXES = Experts(
    jax.P("expert", None, "expert_embed", "expert_mlp"),
    jax.P("expert", "expert_mlp", "expert_embed"),
    (jax.P("expert", "expert_embed", None), jax.P("expert", None, None, "expert_mlp")),
    (jax.P("expert", "expert_mlp", None), jax.P("expert", None, "expert_embed")),
)


@jax.named_scope("experts")
def dispatch(x, experts, weights, real, params: Experts, activation: Callable, runtime: Runtime):
    """Sum over a token's experts of weight * expert(token).

    Args:
      x: [B T D]; experts: i32[B T k]; weights: f32[B T k].
      real: bool[B T]; padding reaches no expert.
      params: weights of the experts, fp32.
      activation: activation of the gate.
      runtime: `moe_dispatch` selects the dispatch, `capacity_factor` its capacity.
    Returns:
      [B T D], and i32[B] number of choices over the capacity.
    """
    weights = jnp.where(real[..., None], weights, 0).astype(x.dtype)
    experts = jnp.where(real[..., None], experts, params.down.shape[0])  # E = nowhere
    return {"dense": _dense, "capacity": _capacity, "dropless": _dropless}[runtime.moe_dispatch](
        x, experts, weights, params, activation, runtime
    )


def _dense(x, experts, weights, params, activation, runtime):
    """Every expert reads every token."""
    count = params.down.shape[0]
    share = jnp.sum(jax.nn.one_hot(experts, count, dtype=x.dtype) * weights[..., None], axis=-2)
    product = lambda x, w: _product("BTI,EIO->BTEO" if x.ndim == 3 else "BTEI,EIO->BTEO", x, w)
    y = _mlps(product, x, params, activation)
    return jnp.einsum("BTE,BTED->BTD", share, y), jnp.zeros(len(x), jnp.int32)


def _capacity(x, experts, weights, params, activation, runtime):
    """A buffer per expert and batch row (GShard, arXiv 2006.16668): best choices first, then in the order of tokens."""
    length, top_k, count = x.shape[1], experts.shape[-1], params.down.shape[0]
    room = _room(runtime.capacity_factor, length * top_k / count, length)
    choices = rearrange(experts, "B T k -> B (k T)")
    plan = jax.vmap(partial(_plan, bins=count, room=room))(choices)
    copies = jax.vmap(lambda x: jnp.tile(x, (top_k, 1)))(x)
    names = ("expert_batch", "expert", None, None)
    buffer = rearrange(jax.vmap(_move)(copies, *plan), "B (E room) D -> B E room D", E=count)
    buffer = shard(buffer, names, runtime.rules)
    y = shard(_mlps(partial(_product, "BERI,EIO->BERO"), buffer, params, activation), names, runtime.rules)
    y = jax.vmap(_move)(rearrange(y, "B E room D -> B (E room) D"), plan.slot, plan.choice)
    y = jnp.einsum("BkTD,BTk->BTD", rearrange(y, "B (k T) D -> B k T D", k=top_k), weights)
    return y, jnp.sum((plan.slot < 0) & (choices < count), axis=1)


def _dropless(x, experts, weights, params, activation, runtime):
    """Tokens sorted by expert, in products of groups; over a mesh, exchanged between the devices that hold experts."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _local(x, experts, weights, params, activation, runtime, (), ())
    spec, names = (lambda *names: partition_spec(names, runtime.rules, mesh)), ("batch", "length")
    whole = [name if size % num_shards(name, runtime.rules, mesh) == 0 else None for name, size in zip(names, x.shape)]
    held = Experts(*(axes if len(given) else () for axes, given in zip(AXES, params)))
    tokens, places = spec(*whole), jax.tree.map(lambda axes: spec(*axes), held)
    across, gathered, split = (as_axes(places.gate_up[axis]) for axis in (0, 2, 3))
    exchanged = set(across) & {axis for part in tokens for axis in as_axes(part)}
    if exchanged and exchanged != set(across):
        raise ValueError(f"rules: of the axes {across} of 'expert' only {sorted(exchanged)} hold tokens: all or none")

    def whole_embed(w, axes):
        place = tuple(axes).index("expert_embed") if "expert_embed" in axes else None
        return w if place is None else jax.lax.all_gather(w, gathered, axis=place, tiled=True)

    def local(x, experts, weights, params):
        params = jax.tree.map(lambda w: w.astype(x.dtype), params)
        if gathered:
            params = jax.tree.map(whole_embed, params, held)
        if exchanged:
            return _local(x, experts, weights, params, activation, runtime, across, split)
        # All devices have these tokens: each sends them through its own experts alone.
        own, index = len(params.down), jax.lax.axis_index(across) if across else 0
        experts = jnp.where(experts // own == index, experts % own, own)
        with expect_share(1 / _size(across)):
            return _local(x, experts, weights, params, activation, runtime, (), (*across, *split))

    specs, out_specs = (tokens, tokens, tokens, places), (tokens, jax.P(tokens[0]))
    return jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)(x, experts, weights, params)


def _local(x, experts, weights, params, activation, runtime, across, split):
    """A device's tokens through all experts, those of other devices by exchange over the axes `across`.

    `split`: axes over which results are parts of a sum.
    """
    rows, top_k = len(x), experts.shape[-1]
    choices, flat = rearrange(experts, "B T k -> (B T k)"), rearrange(x, "B T D -> (B T) D")
    mlp = partial(_grouped_mlp, params=params, activation=activation, runtime=runtime)
    if not across:
        plan = _sorted(choices, row_multiple(grouped_for(runtime.grouped)))
        y = mlp(_move(flat, *plan, top_k), sizes=jnp.bincount(choices, length=params.down.shape[0]))
        y = _move(y, plan.slot, plan.choice)
    else:
        y, plan = _exchanged(flat, choices, mlp, len(params.down), across, runtime)
    y = jnp.einsum("BTkD,BTk->BTD", rearrange(y, "(B T k) D -> B T k D", B=rows, k=top_k), weights)
    if split:
        y = jax.lax.psum(y, split)
    missed = (plan.slot < 0) & (choices < len(params.down) * _size(across))
    return y, jnp.sum(rearrange(missed, "(B n) -> B n", B=rows), axis=1)


def _exchanged(x, choices, mlp, own, across, runtime):
    """Tokens to the devices of their experts, through these, and back: [n D] in the order of choices, and the plan."""
    devices, top_k = _size(across), len(choices) // len(x)
    room = _room(runtime.capacity_factor, len(choices) / devices, len(x) * min(top_k, own))
    plan = _plan(choices, devices, room, own)
    ids = jnp.where(plan.choice >= 0, choices[plan.choice] % own, own)
    fill = min(1.0, len(choices) / len(ids))
    held = lambda ids: jnp.sum(rearrange(ids, "(device room) -> device room", room=room) < own, axis=1, dtype=jnp.int32)
    send = partial(all_to_all, axes=across, fill=fill, wanted=runtime.all_to_all)
    sent, ids = held(ids), jax.lax.all_to_all(ids, across, 0, 0, tiled=True)
    received = held(ids)
    x = checkpoint_name(send(_move(x, *plan, top_k), sent, received), EXCHANGED[0])
    inner = _sorted(ids, row_multiple(grouped_for(runtime.grouped)))
    with expect_share(fill):
        y = mlp(_move(x, *inner), sizes=jnp.bincount(ids, length=own))
    y = checkpoint_name(send(_move(y, inner.slot, inner.choice), received, sent), EXCHANGED[1])
    return _move(y, plan.slot, plan.choice), plan


def _grouped_mlp(x, sizes, params, activation, runtime):
    product = partial(grouped_matmul, sizes=sizes.astype(jnp.int32), implementation=grouped_for(runtime.grouped))
    return _mlps(product, x, jax.tree.map(lambda w: w.astype(x.dtype), params), activation)


def _mlps(product: Callable, x, params: Experts, activation: Callable):
    """Tokens through the MLPs of their experts; `product(x, w)` is that with the weights w [E I O] of all experts."""
    gate, up = (product(x, params.gate_up[:, i]) for i in range(2))
    if params.gate_up_factors:
        first, second = params.gate_up_factors
        low = product(x, first)
        gate, up = (y + product(low, second[:, :, i]) for i, y in enumerate((gate, up)))
    hidden = activation(gate) * up
    y = product(hidden, params.down)
    if params.down_factors:
        first, second = params.down_factors
        y += product(product(hidden, first), second)
    return y


class _Plan(NamedTuple):
    """Assignment of tokens to slots of experts, and back; -1: none."""

    choice: Array  # i32[slots] the choice that a slot holds
    slot: Array  # i32[choices] the slot that a choice has


def _plan(choices, bins: int, room: int, width: int = 1) -> _Plan:
    """Slots of `bins` bins with room for `room` choices each; choice e belongs to bin e // width, first come first."""
    bin_of = choices // width
    order = jnp.argsort(bin_of, stable=True)
    rank = _inverse(order)
    count = jnp.bincount(bin_of, length=bins)
    start = jnp.cumsum(count) - count
    place = jnp.arange(room)
    choice = jnp.where(
        place < jnp.minimum(count, room)[:, None], order[jnp.minimum(start[:, None] + place, len(order) - 1)], -1
    )
    place = rank - start[jnp.minimum(bin_of, bins - 1)]
    slot = jnp.where((bin_of < bins) & (place < room), bin_of * room + place, -1)
    return _Plan(choice.ravel(), slot)


def _sorted(choices, multiple: int) -> _Plan:
    """All choices in the order of experts, those of none last; slots to a multiple."""
    order = jnp.argsort(choices, stable=True)
    return _Plan(jnp.pad(order, (0, -len(order) % multiple), constant_values=-1), _inverse(order))


def _inverse(order):
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _move(x, source, target, copies: int = 1):
    """Slot i receives row `source[i] // copies` of x [n D], zero where source is -1.

    `target`, i32[n * copies], is the inverse: the slot of every copy of a row, or -1.
    """
    return _taken(x, source, copies)


def _taken(x, source, copies):
    return jnp.where((source >= 0)[:, None], jnp.take(x, jnp.maximum(source, 0) // copies, axis=0), 0)


def _move_forward(x, source, target, copies):
    return _taken(x, source, copies), target


def _move_backward(copies, target, d_y):
    return jnp.sum(rearrange(_taken(d_y, target, 1), "(n c) D -> n c D", c=copies), axis=1), None, None


_move.defvjp(_move_forward, _move_backward)


def _room(factor: float, fair: float, most: int) -> int:
    """Rows of a buffer whose fair share is `fair` and that never needs more than `most`; a multiple of 8 below that."""
    return min(most, 8 * math.ceil(fair * factor / 8)) if factor else most


def _size(axes) -> int:
    return int(np.prod([jax.lax.axis_size(axis) for axis in axes], dtype=int))


def _product(equation, x, w):
    return einsum(equation, x, w.astype(x.dtype))
