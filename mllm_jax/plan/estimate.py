"""Estimates the resources of a step from shapes, axis names and sharding rules, in milliseconds per mesh.

The estimate models the training step (`mllm_jax.train.step.train_step`) and the way in which XLA compiles it.
"""

from mllm_jax.nn.attention.kernels import SPLASH_BLOCK
from mllm_jax.plan.comms import collectives
from mllm_jax.plan.compile import Planned
from mllm_jax.plan.device_workload import DeviceWorkload

# FLOPs that the backward kernels of attention recompute, as a multiple of the forward FLOPs, by platform: cuDNN repeats
# one of its five products, the two kernels of splash three of their seven.
TWICE = {"gpu": 0.5, "tpu": 1.5}
PLATFORM = {"NVIDIA": "gpu", "Tesla": "gpu", "TPU": "tpu", "TPU7x": "tpu"}  # by the first word of `device_kind`


def estimate(portion: DeviceWorkload, remat: str, device_kind: str = "") -> Planned:
    """Estimates the plan of a step under a remat policy, without a compiler."""
    platform = PLATFORM.get(device_kind.partition(" ")[0], "cpu")
    forward, again = _flops(portion, remat, platform)
    flops = portion.shapes.flops
    times = {part: flops[part].total / flops[part].forward if flops[part].forward else 0.0 for part in flops}
    times["experts"] = times["decoder"]
    arguments, alive = _memory(portion, remat)
    parts = portion.grad_accum_steps
    return Planned(
        mesh=dict(portion.mesh.shape),
        devices=portion.devices,
        device_kind=device_kind,
        arguments=int(arguments),
        temporaries=int(sum(alive.values())),
        peak=int(arguments + sum(alive.values())),
        largest=tuple(sorted(((name, int(size)) for name, size in alive.items()), key=lambda item: -item[1])),
        flops={part: parts * (forward[part] * times[part] + again.get(part, 0.0)) for part in forward},
        useful=sum(part.total for part in flops.values()) / portion.devices,
        recomputed=parts * sum(again.values()),
        collectives=tuple(
            move._replace(runs=parts * move.runs, bytes=parts * move.bytes)
            for move in collectives(portion, remat, platform)
        ),
        warnings=(),
        compile_seconds=0.0,
        host_bytes=0,
    )


def _flops(portion: DeviceWorkload, remat: str, platform: str) -> tuple[dict[str, float], dict[str, float]]:
    """Returns ({part: forward FLOPs}, {part: FLOPs recomputed in the backward pass}) of a micro-batch."""
    names = [*portion.shapes.flops, *(["experts"] if portion.moe else [])]
    forward, again = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for part in portion.towers:
        # Attention is sharded like its rows and, over other axes, like its heads.
        heads = {axis for laid in portion.tower(part) for axis in laid.kept(range(len(laid.axes)))}
        heads &= set(portion.known[part]["heads"])
        shards = portion.size({*portion.rows[part].axes, *heads})
        attention = portion.shapes.attention[part] / portion.grad_accum_steps / shards
        if platform == "tpu" and part == "decoder":  # splash computes the masked half of blocks on the diagonal too
            attention *= 1 + SPLASH_BLOCK / portion.budget.tokens
        forward[part] += attention
        again[part] += attention * ((remat != "none") + TWICE.get(platform, 0.0))
    for laid in portion.laid:
        weight = laid.weight
        if not weight.is_matrix:
            continue
        product = 2 * portion.rows_through(laid) * laid.met * weight.repeats
        part = "experts" if weight.of_experts else weight.part
        forward[part] += product
        if "layers" not in weight.names:
            continue
        # The output of a layer's last product is not needed in the backward pass, except for experts.
        last = weight.path.split("/")[-2] == "down"
        if (remat in ("full", "experts") and not last) or (remat == "dots" and weight.of_experts):
            again[part] += product
    shards = portion.size((*portion.rows["decoder"].axes, *portion.text["vocab"]))
    forward["head"] = portion.shapes.flops["head"].forward / portion.grad_accum_steps / shards
    trains = {part: portion.trains("decoder" if part == "experts" else part) for part in again}
    return forward, {part: again[part] * trains[part] for part in again}


def _memory(portion: DeviceWorkload, remat: str) -> tuple[float, dict[str, float]]:
    """Returns (bytes of the step's arguments, {name: bytes} of other arrays alive at the peak)."""
    run, width = portion.run, portion.bytes
    arguments = sum(laid.values * (laid.weight.kept + laid.weight.moments) for laid in portion.laid)
    arguments += portion.grad_accum_steps * portion.patches * run.model.patch_values
    saved = sum(saved_bytes(portion, part, remat) for part in portion.towers if portion.trains(part))
    gradients = 4.0 * sum(laid.values for laid in portion.laid if laid.weight.trained)
    tower = next((part for part in portion.towers[::-1] if portion.trains(part)), "decoder")
    layer = {part: sum(laid.layer for laid in portion.tower(part) if laid.gathered) for part in portion.towers}
    vocab = run.model.decoder.vocab / portion.size(portion.text["vocab"])
    chunk = portion.batch * min(run.train.loss_chunk, portion.budget.tokens) * vocab
    phases = (
        {
            "gradients": gradients * (1 if portion.grad_accum_steps == 1 else 2),
            "weights of a layer, gathered": 2 * width * layer[tower],
            "gradients of a layer's weights": width * layer[tower],
            "activations of a layer": saved_bytes(portion, tower, "none") / portion.layers(tower),
        },
        {
            "gradient of the head, so far and of a chunk": 2 * 4 * vocab * run.model.decoder.width,
            "head, gathered": width * vocab * run.model.decoder.width,
            "logits of a chunk": 2 * 4 * chunk,
        },
    )
    alive = max(phases, key=lambda phase: sum(phase.values()))  # the phases do not overlap
    return arguments, {"saved activations": saved, **alive}


def saved_bytes(portion: DeviceWorkload, part: str, remat: str) -> float:
    """Returns the bytes that a tower's forward pass saves for the backward pass, in all layers together."""
    rows, layers = portion.rows[part].count, portion.layers(part)
    residual = rows * portion.width(part) * layers / portion.size(portion.parted(part))
    outputs = exchanged = 0.0
    for laid in portion.tower(part):
        if laid.weight.of_experts:
            through = portion.exchanged()
            exchanged = 2 * through * portion.width(part) * laid.weight.repeats
        else:
            through = portion.rows_through(laid)
        if remat == "none" or not laid.weight.of_experts:
            outputs += through * laid.sizes_of(laid.weight.product()[1]) * laid.weight.repeats
    if remat == "none":
        # Results between products (norms, rotations, activations) are saved too, about as many bytes again.
        return portion.bytes * (2 * residual + 2 * outputs + exchanged)
    return portion.bytes * (residual + {"full": 0.0, "experts": exchanged, "dots": outputs}[remat])
