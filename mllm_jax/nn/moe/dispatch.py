"""Dispatch of tokens to their experts and back. All kinds of dispatch give equal results if no token is dropped.

Tokens are moved by gathers alone, forward and backward: the assignment is a permutation, and its transpose is a gather
with the inverse permutation.
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
    """Weights of all experts, each a gated MLP, and the two factors of their adapters, () without adapters."""

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
    """Returns the sum over each token's experts of weight * expert(token).

    Args:
      x: [B T D]; experts: i32[B T k]; weights: f32[B T k].
      real: bool[B T]; False for padding, which is sent to no expert.
      params: fp32 weights of the experts.
      activation: activation of the gate.
      runtime: `moe_dispatch` selects the dispatch, `capacity_factor` its capacity.
    Returns:
      ([B T D], i32[B] number of choices dropped because they exceed the capacity).
    """
    weights = jnp.where(real[..., None], weights, 0).astype(x.dtype)
    experts = jnp.where(real[..., None], experts, params.down.shape[0])  # E: no expert
    return {"dense": _dense, "capacity": _capacity, "dropless": _dropless}[runtime.moe_dispatch](
        x, experts, weights, params, activation, runtime
    )


def _dense(x, experts, weights, params, activation, runtime):
    """Applies every expert to every token."""
    count = params.down.shape[0]
    combine = jnp.sum(jax.nn.one_hot(experts, count, dtype=x.dtype) * weights[..., None], axis=-2)
    product = lambda x, w: _product("BTI,EIO->BTEO" if x.ndim == 3 else "BTEI,EIO->BTEO", x, w)
    y = _mlps(product, x, params, activation)
    return jnp.einsum("BTE,BTED->BTD", combine, y), jnp.zeros(len(x), jnp.int32)


def _capacity(x, experts, weights, params, activation, runtime):
    """Sends tokens to a buffer per expert and batch row (GShard, arXiv 2006.16668).

    First choices of all tokens have priority over second ones, and so on; among equals, earlier tokens do.
    """
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
    """Sorts tokens by expert for grouped products. On a mesh, exchanges them between the devices of their experts."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _local(x, experts, weights, params, activation, runtime, (), ())
    spec, names = (lambda *names: partition_spec(names, runtime.rules, mesh)), ("batch", "length")
    sharded = [
        name if size % num_shards(name, runtime.rules, mesh) == 0 else None for name, size in zip(names, x.shape)
    ]
    axes_of_params = Experts(*(axes if len(param) else () for axes, param in zip(AXES, params)))
    tokens, param_specs = spec(*sharded), jax.tree.map(lambda axes: spec(*axes), axes_of_params)
    across, gathered, split = (as_axes(param_specs.gate_up[axis]) for axis in (0, 2, 3))
    exchanged = set(across) & {axis for part in tokens for axis in as_axes(part)}
    if exchanged and exchanged != set(across):
        raise ValueError(
            f"rules.expert={across}: only {sorted(exchanged)} of these axes shard tokens. "
            "Shard tokens ('batch' and 'length') over all of them or none."
        )

    def gather_embed(w, axes):
        axis = tuple(axes).index("expert_embed") if "expert_embed" in axes else None
        return w if axis is None else jax.lax.all_gather(w, gathered, axis=axis, tiled=True)

    def local(x, experts, weights, params):
        params = jax.tree.map(lambda w: w.astype(x.dtype), params)
        if gathered:
            params = jax.tree.map(gather_embed, params, axes_of_params)
        if exchanged:
            return _local(x, experts, weights, params, activation, runtime, across, split)
        # All devices along `across` have the same tokens; each applies only its local experts.
        count, index = len(params.down), jax.lax.axis_index(across) if across else 0
        experts = jnp.where(experts // count == index, experts % count, count)
        with expect_share(1 / _size(across)):
            return _local(x, experts, weights, params, activation, runtime, (), (*across, *split))

    specs, out_specs = (tokens, tokens, tokens, param_specs), (tokens, jax.P(tokens[0]))
    return jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)(x, experts, weights, params)


def _local(x, experts, weights, params, activation, runtime, across, split):
    """Applies the experts to the tokens of one device, exchanging tokens over the mesh axes `across`.

    `split`: mesh axes over which the results are partial sums.
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
    dropped = (plan.slot < 0) & (choices < len(params.down) * _size(across))
    return y, jnp.sum(rearrange(dropped, "(B n) -> B n", B=rows), axis=1)


def _exchanged(x, choices, mlp, count, across, runtime):
    """Sends tokens to the devices of their experts, applies these, and sends the results back.

    Returns the results [n D] in the order of `choices`, and the plan. `count`: number of experts per device.
    """
    devices, top_k = _size(across), len(choices) // len(x)
    room = _room(runtime.capacity_factor, len(choices) / devices, len(x) * min(top_k, count))
    plan = _plan(choices, devices, room, count)
    ids = jnp.where(plan.choice >= 0, choices[plan.choice] % count, count)
    fill = min(1.0, len(choices) / len(ids))
    used = lambda ids: jnp.sum(
        rearrange(ids, "(device room) -> device room", room=room) < count, axis=1, dtype=jnp.int32
    )
    send = partial(all_to_all, axes=across, fill=fill, wanted=runtime.all_to_all)
    sent, ids = used(ids), jax.lax.all_to_all(ids, across, 0, 0, tiled=True)
    received = used(ids)
    x = checkpoint_name(send(_move(x, *plan, top_k), sent, received), EXCHANGED[0])
    inner = _sorted(ids, row_multiple(grouped_for(runtime.grouped)))
    with expect_share(fill):
        y = mlp(_move(x, *inner), sizes=jnp.bincount(ids, length=count))
    y = checkpoint_name(send(_move(y, inner.slot, inner.choice), received, sent), EXCHANGED[1])
    return _move(y, plan.slot, plan.choice), plan


def _grouped_mlp(x, sizes, params, activation, runtime):
    product = partial(grouped_matmul, sizes=sizes.astype(jnp.int32), implementation=grouped_for(runtime.grouped))
    return _mlps(product, x, jax.tree.map(lambda w: w.astype(x.dtype), params), activation)


def _mlps(product: Callable, x, params: Experts, activation: Callable):
    """Applies the MLPs of the experts. `product(x, w)` multiplies each token by its expert's matrix of w [E I O]."""
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
    """Assignment of choices to slots, and its inverse. -1: none."""

    choice: Array  # i32[slots] choice in each slot
    slot: Array  # i32[choices] slot of each choice


def _plan(choices, bins: int, room: int, width: int = 1) -> _Plan:
    """Assigns choices to `bins` bins of `room` slots each, in order. Expert e belongs to bin e // width.

    Example: choices [1 0 1 1] with 2 bins of 2 slots have `choice` [1 -1 0 2] and `slot` [2 0 3 -1].
    """
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
    """Sorts all choices by expert, those of no expert last. The number of slots is rounded up to a multiple."""
    order = jnp.argsort(choices, stable=True)
    return _Plan(jnp.pad(order, (0, -len(order) % multiple), constant_values=-1), _inverse(order))


def _inverse(order):
    """Returns the inverse of a permutation."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype), unique_indices=True)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _move(x, source, target, copies: int = 1):
    """Returns an array whose row i is row `source[i] // copies` of x [n D], or zero where source is -1.

    `target`: i32[n * copies], the inverse of `source`: the slot of every copy of a row, or -1. The gradient uses it.
    """
    return _take(x, source, copies)


def _take(x, source, copies):
    return jnp.where((source >= 0)[:, None], jnp.take(x, jnp.maximum(source, 0) // copies, axis=0), 0)


def _move_forward(x, source, target, copies):
    return _take(x, source, copies), target


def _move_backward(copies, target, d_y):
    return jnp.sum(rearrange(_take(d_y, target, 1), "(n c) D -> n c D", c=copies), axis=1), None, None


_move.defvjp(_move_forward, _move_backward)


def _room(factor: float, fair: float, most: int) -> int:
    """Returns the rows of a buffer: `fair * factor` rounded up to a multiple of 8, at most `most`. Factor 0: `most`.

    Example: factor 1.25 of a fair share of 10 rows gives 16.
    """
    return min(most, 8 * math.ceil(fair * factor / 8)) if factor else most


def _size(axes) -> int:
    """Returns the number of devices along mesh axes, inside `shard_map`."""
    return int(np.prod([jax.lax.axis_size(axis) for axis in axes], dtype=int))


def _product(equation, x, w):
    return einsum(equation, x, w.astype(x.dtype))
