"""Bytes, FLOPs and seconds of a step that trains all weights, adapters, or adapters on a quantized base.

    python benchmarks/lora.py                 bytes and FLOPs, of the compiled step and from its shapes; runs no step
    python benchmarks/lora.py --rounds 6      also seconds, each kind of step in turn

A Qwen3-VL of 70M parameters, fp32, four rows of 512 tokens with an image of 1,024 patches each.
"""

import os
import statistics
import time
from dataclasses import replace

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
from jax import numpy as jnp  # noqa: E402

from mllm_jax import ModelConfig, Runtime, make_mesh  # noqa: E402
from mllm_jax.common.cli import Parser  # noqa: E402
from mllm_jax.families.vlms import qwen3_vl  # noqa: E402
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig  # noqa: E402
from mllm_jax.model.decoder import DecoderConfig  # noqa: E402
from mllm_jax.model.encoders.vit import VitConfig  # noqa: E402
from mllm_jax.nn.attention.layer import AttentionConfig  # noqa: E402
from mllm_jax.nn.lora import LoraConfig  # noqa: E402
from mllm_jax.plan.compile import abstract_step  # noqa: E402
from mllm_jax.train.monitor.flops import count_flops, padded  # noqa: E402
from mllm_jax.train.runs.config import Run, read_run, run_config, train_context  # noqa: E402
from mllm_jax.train.runs.data import ScenesData  # noqa: E402
from mllm_jax.train.step.context import init_state  # noqa: E402
from mllm_jax.train.step.optimizer import OptimConfig  # noqa: E402

KINDS = {"all weights": LoraConfig()} | {
    f"adapters, base {base}": LoraConfig(rank=16, base_dtype=base)
    for base in ("float32", "bfloat16", "int8", "int4", "nf4")
}


def run_of(lora: LoraConfig) -> Run:
    attention = AttentionConfig(heads=8, kv_heads=4, head_dim=64, rope_sections=(12, 10, 10))
    model = ModelConfig(
        VitConfig(width=256, layers=6, heads=4, mlp=1024, deepstack_layers=(1, 3, 5)),
        PatchMergerConfig(),
        DecoderConfig(32000, 512, 8, attention, 1536),
        replace(qwen3_vl.TOKENS, image=31000, video=31001, start=31002, end=31003),
        Runtime(remat="full"),
    )
    data = ScenesData(batch=4, tokens=512, patch_rows=1, patches_per_row=1024)
    return read_run(run_config(Run(model, data, optim=OptimConfig(learning_rate=1e-4), lora=lora, processor="scenes")))


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=0, help="timed steps of each kind (default 0: no timing)")
    rounds, mesh, steps = parser.parse_args().rounds, make_mesh({"fsdp": 1}, jax.devices()[:1]), {}
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**20
    print(f"{'':24}{'MiB: weights':>13}{'moments':>9}{'arguments':>11}{'temporaries':>13}{'GFLOP':>8}")
    for name, lora in KINDS.items():
        run = run_of(lora)
        step, state, batch = abstract_step(run, mesh)
        compiled = step.lower(state, batch).compile()
        stats = compiled.memory_analysis()
        flops = count_flops(run.model, padded(batch_of_zeros(batch)), run.optim.freeze)
        total, held = sum(part.total for part in flops.values()) / 1e9, stats.argument_size_in_bytes / 2**20
        sizes = (size(state.params), size(state.opt_state), held, stats.temp_size_in_bytes / 2**20)
        print(f"{name:24}{sizes[0]:13.1f}{sizes[1]:9.1f}{sizes[2]:11.1f}{sizes[3]:13.1f}{total:8.0f}", flush=True)
        if rounds:
            steps[name] = [compiled, init_state(train_context(run, mesh), jax.random.key(0)), batch_of_zeros(batch)]
    seconds = {name: [] for name in steps}
    for _ in range(rounds + 1):  # the first is not counted
        for name, (compiled, state, batch) in steps.items():
            began = time.perf_counter()
            steps[name][1], metrics = compiled(state, batch)
            jax.block_until_ready(metrics)
            seconds[name].append(time.perf_counter() - began)
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["all weights"][1:], taken[1:]))
        print(f"{name:24}{statistics.median(taken[1:]):8.3f} s/step, {ratio:.2f} times as fast as all weights")


def batch_of_zeros(batch):
    """A batch whose rows are each one conversation and one image."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)
    vision = zeros.vision._replace(image=zeros.vision.image + 1, grid=zeros.vision.grid + 32)
    return zeros._replace(segment=zeros.segment + 1, weight=zeros.weight + 1, vision=vision)


if __name__ == "__main__":
    main()
