"""Estimates the data that moves in a step: between devices, and between a device and its memory.

Weights sharded over an axis that also shards rows are all-gathered before use, and their gradients reduce-scattered
(ZeRO, arXiv 1910.02054). Other weight shardings stay, and activations are all-reduced over them (Megatron, arXiv
1909.08053). Tokens go to the devices of their experts and back (GShard, arXiv 2006.16668). Attention over a sharded
length exchanges tokens as in `mllm_jax.nn.attention.context_parallel`.
"""

from collections.abc import Callable, Iterable

from mllm_jax.nn.attention import context_parallel
from mllm_jax.nn.moe import all_to_all
from mllm_jax.plan.compile import Collective
from mllm_jax.plan.device_workload import DeviceWorkload
from mllm_jax.plan.sharded_weight import VOCABULARY, ShardedWeight

Add = Callable[[str, Iterable[str], float, float, int], None]


def collectives(portion: DeviceWorkload, remat: str, platform: str) -> list[Collective]:
    """Returns the collectives of one micro-batch, with the bytes of their results on one device."""
    sums: dict[tuple[str, tuple[str, ...]], tuple[float, float]] = {}

    def add(kind: str, axes, runs: float, values: float, width: int = portion.bytes) -> None:
        """Adds `runs` collectives whose result on a device has `values` values of `width` bytes."""
        axes = tuple(axis for axis in portion.mesh.axis_names if axis in axes and portion.mesh.shape[axis] > 1)
        if axes and runs:
            before = sums.get((kind, axes), (0, 0.0))
            sums[kind, axes] = before[0] + runs, before[1] + runs * values * width

    for laid in portion.laid:
        counts = laid.weight.is_matrix or laid.weight.path in VOCABULARY  # all others are small enough to ignore
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
    return [Collective(kind, axes, runs, size) for (kind, axes), (runs, size) in sorted(sums.items())]


def _move_weight(portion: DeviceWorkload, laid: ShardedWeight, add: Add) -> None:
    """Adds the all-gathers of a weight for forward and backward, and the reduction of its gradient."""
    weight, rows = laid.weight, portion.rows[laid.weight.part].axes
    trains = portion.trains(weight.part)
    vocabulary = weight.path in VOCABULARY  # gathered once per step
    add("all-gather", laid.gathered, weight.repeats * (1 + (trains and not vocabulary)), laid.layer)
    if weight.trained:
        width = 4 if vocabulary else portion.bytes
        reduced = [axis for axis in laid.gathered if axis in rows]
        add("reduce-scatter", reduced, weight.repeats, laid.layer / portion.size(reduced), width)
        left = [axis for axis in rows if axis not in laid.split]
        add("all-reduce", left, weight.repeats, laid.values / weight.repeats, width)


def _move_rows(portion: DeviceWorkload, part: str, block: list[ShardedWeight], remat: str, add: Add) -> None:
    """Adds the reductions of activations over axes that shard a weight while it is used (tensor parallelism).

    Forward, the outputs of a sharded product are summed; backward, the gradients of its inputs. If tokens are sharded
    between layers, the sum is a reduce-scatter, and an all-gather precedes the next product (arXiv 2205.05198). Blocks
    of experts use all-reduce.
    """
    values, trains, layers = (
        portion.rows[part].count * portion.width(part),
        portion.trains(part),
        block[0].weight.repeats,
    )
    between, has_experts = portion.parted(part), any(laid.weight.of_experts for laid in block)
    out = {axis for laid in block for axis in laid.kept(laid.weight.product()[0])}
    into = {axis for laid in block for axis in laid.kept(laid.weight.product()[1])}
    # Remat recomputes the sum of attention. The sum of the MLP is the next layer's input, which is saved.
    again = trains and remat in ("full", "experts") and block[0].weight.block.endswith("attention")
    for axes, runs in ((out, layers * (1 + again)), (into, layers * trains)):
        scattered = [axis for axis in axes if axis in between and not has_experts]
        add("reduce-scatter", scattered, runs, values / portion.size(scattered))
        add("all-reduce", axes.difference(scattered), runs, values)
    # Forward the input of a product; backward the gradient of its output and, with remat, the input again.
    gathered = layers * (1 + trains * (1 + (remat != "none")))
    add("all-gather", (out | into).intersection(between), gathered, values)


def _move_tokens(portion: DeviceWorkload, layers: int, remat: str, platform: str, add: Add) -> None:
    """Adds the exchange of tokens with their experts: of the full buffers or, if ragged, of the real tokens only."""
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
    """Adds the all-gather of visual tokens, which may be computed on other devices than the row that they belong to."""
    axes = [axis for axis in portion.rows["connector"].axes if axis not in portion.text["batch"]]
    encoder, connector = portion.run.model.encoder, portion.run.model.connector
    tokens = connector.num_tokens(portion.patches, portion.images)
    visual = tokens * (1 + len(encoder.deepstack_layers)) * portion.width("decoder")
    add("all-gather", axes, 1, visual)
    add("reduce-scatter", axes, portion.trains("connector"), visual / portion.size(axes))


def traffic(portion: DeviceWorkload, remat: str) -> float:
    """Returns a lower bound of the bytes that a device reads and writes in its memory in a step.

    Counted are: reading and writing weights, moments and gradients once; writing the weights in compute dtype once for
    forward and once for backward, and reading them in every product; the inputs and outputs of every product.
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
