"""Estimated traffic of a step: between devices, and between a device and its memory.

Weights that are sharded over axes which also shard the rows are all-gathered before use, and their gradients are
reduce-scattered (ZeRO, arXiv 1910.02054). Over other axes weights stay sharded and activations are all-reduced
(Megatron, arXiv 1909.08053). Tokens are sent to the devices of their experts and back (GShard, arXiv 2006.16668).
Attention over a sharded row is in `mllm_jax.nn.attention.context_parallel`.
"""

from collections.abc import Callable, Iterable

from mllm_jax.nn.attention import context_parallel
from mllm_jax.nn.moe import all_to_all
from mllm_jax.plan.compile import Collective
from mllm_jax.plan.device_workload import DeviceWorkload
from mllm_jax.plan.sharded_weight import VOCABULARY, ShardedWeight

Add = Callable[[str, Iterable[str], float, float, int], None]


def collectives(portion: DeviceWorkload, remat: str, platform: str) -> list[Collective]:
    """Collectives of one micro-batch, with the bytes of their results on one device of a platform."""
    found: dict[tuple[str, tuple[str, ...]], tuple[float, float]] = {}

    def add(kind: str, axes, runs: float, values: float, width: int = portion.bytes) -> None:
        """Adds a collective with a result of this many values, run `runs` times."""
        axes = tuple(axis for axis in portion.mesh.axis_names if axis in axes and portion.mesh.shape[axis] > 1)
        if axes and runs:
            before = found.get((kind, axes), (0, 0.0))
            found[kind, axes] = before[0] + runs, before[1] + runs * values * width

    for laid in portion.laid:
        counts = laid.weight.is_matrix or laid.weight.path in VOCABULARY  # all others are too small
        if counts and portion.rows[laid.weight.part].count:
            _move_weight(portion, laid, add)
    for part in portion.towers:
        for block in {laid.weight.block for laid in portion.tower(part)}:
            matrices = [laid for laid in portion.tower(part) if laid.weight.block == block]
            _move_rows(portion, part, matrices, remat, add)
            if any(laid.weight.of_experts for laid in matrices):
                _move_tokens(portion, matrices[0].weight.repeats, remat, platform, add)
    _move_context(portion, remat, add)
    if "connector" in portion.rows:
        _move_visual(portion, add)
    return [Collective(kind, axes, runs, size) for (kind, axes), (runs, size) in sorted(found.items())]


def _move_weight(portion: DeviceWorkload, laid: ShardedWeight, add: Add) -> None:
    """Gathered before it is used, forward and backward; its gradient added up where it rests."""
    weight, rows = laid.weight, portion.rows[laid.weight.part].axes
    trains = portion.trains(weight.part)
    vocabulary = weight.path in VOCABULARY  # gathered once
    add("all-gather", laid.gathered, weight.repeats * (1 + (trains and not vocabulary)), laid.layer)
    if weight.trained:
        width = 4 if vocabulary else portion.bytes
        reduced = [axis for axis in laid.gathered if axis in rows]
        add("reduce-scatter", reduced, weight.repeats, laid.layer / portion.size(reduced), width)
        left = [axis for axis in rows if axis not in laid.split]
        add("all-reduce", left, weight.repeats, laid.values / weight.repeats, width)


def _move_rows(portion: DeviceWorkload, part: str, block: list[ShardedWeight], remat: str, add: Add) -> None:
    """The results of a sharded product are summed; in the backward pass, so are the gradients of its input.

    With sequence parallelism each device sums its own tokens, and all tokens are gathered for the next product (arXiv
    2205.05198). Outputs of experts are summed in full.
    """
    values, trains, layers = (
        portion.rows[part].count * portion.width(part),
        portion.trains(part),
        block[0].weight.repeats,
    )
    parted, whole = portion.parted(part), any(laid.weight.of_experts for laid in block)
    out = {axis for laid in block for axis in laid.kept(laid.weight.product()[0])}
    into = {axis for laid in block for axis in laid.kept(laid.weight.product()[1])}
    # Attention's sum is computed again; that of the block after it is the next layer's input, which is kept.
    again = trains and remat in ("full", "experts") and block[0].weight.block.endswith("attention")
    for axes, runs in ((out, layers * (1 + again)), (into, layers * trains)):
        own = [axis for axis in axes if axis in parted and not whole]
        add("reduce-scatter", own, runs, values / portion.size(own))
        add("all-reduce", axes.difference(own), runs, values)
    # Forward what goes into a product, backward it again and the gradient of what came out.
    gathered = layers * (1 + trains * (1 + (remat != "none")))
    add("all-gather", (out | into).intersection(parted), gathered, values)


def _move_tokens(portion: DeviceWorkload, layers: int, remat: str, platform: str, add: Add) -> None:
    """Tokens to their experts and back: all room for them, or where the exchange is ragged those that there are."""
    trains, rows = portion.trains("decoder"), portion.exchanged()
    passes = 2 + 2 * trains + 2 * (trains and remat in ("full", "dots"))
    kind = "all-to-all"
    if all_to_all.all_to_all_for(portion.run.model.runtime.all_to_all, platform) == "ragged":
        kind, rows = "ragged-all-to-all", min(rows, portion.rows["decoder"].count * portion.moe.top_k)
    add(kind, portion.text["expert"], layers * passes, rows * portion.width("decoder"))


def _move_context(portion: DeviceWorkload, remat: str, add: Add) -> None:
    axes, attention = portion.text["length"], portion.run.model.decoder.attention
    if not axes:
        return
    devices, tensor = portion.size(axes), portion.size(portion.text["heads"])
    heads, kv_heads = attention.heads // tensor, max(1, getattr(attention, "kv_heads", attention.heads) // tensor)
    values = portion.rows["decoder"].count * attention.pair_flops / attention.heads / 4  # of a head, of each of q, k, v
    trains, layers = portion.trains("decoder"), portion.layers("decoder")
    passes = layers * (1 + trains + (trains and remat != "none"))
    wanted = getattr(portion.run.model.runtime, "context", "auto")
    if context_parallel.exchange_for(heads, kv_heads, devices, wanted) == "ulysses":
        add("all-to-all", axes, 2 * passes, heads * values)
        add("all-to-all", axes, 2 * passes, max(kv_heads, devices) * values)
    else:
        add("collective-permute", axes, 2 * (devices - 1) * passes, kv_heads * values)
        add("collective-permute", axes, 2 * passes, (heads + kv_heads) * values)  # into zig-zag order and back


def _move_visual(portion: DeviceWorkload, add: Add) -> None:
    """Visual tokens, computed on any device, are sent to the rows that contain them."""
    axes = [axis for axis in portion.rows["connector"].axes if axis not in portion.text["batch"]]
    encoder, connector = portion.run.model.encoder, portion.run.model.connector
    visual = (
        portion.patches / connector.patches_per_token * (1 + len(encoder.deepstack_layers)) * portion.width("decoder")
    )
    add("all-gather", axes, 1, visual)
    add("reduce-scatter", axes, portion.trains("connector"), visual / portion.size(axes))


def traffic(portion: DeviceWorkload, remat: str) -> float:
    """Bytes that a device reads and writes in its memory in a step, at least.

    Weights, moments and gradients once each way; weights as they are used, made once for forward and once for backward,
    read by every product; what goes into and comes out of every product.
    """
    rests = lambda weight: weight.kept + weight.moments + 4 * weight.trained
    state = sum(laid.values * 2 * rests(laid.weight) for laid in portion.laid)
    moved = 0.0
    for laid in portion.laid:
        if laid.weight.is_matrix:
            row = sum(map(laid.sizes_of, laid.weight.product()))
            trains = portion.trains(laid.weight.part)
            products = 1 + 2 * trains + (trains and remat in ("full", "experts"))
            values = products * (portion.rows_through(laid) * row + laid.layer) + (1 + trains) * laid.layer
            moved += laid.weight.repeats * portion.bytes * values
    return state + portion.grad_accum_steps * moved
