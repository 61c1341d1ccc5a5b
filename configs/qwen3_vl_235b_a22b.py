"""Trains Qwen3-VL-235B-A22B on 256 TPU v5p chips; up to half of each row's tokens are visual.

    python -m mllm_jax.plan --config configs/qwen3_vl_235b_a22b.py --topology v5p:4x8x8
    python -m mllm_jax.train --config configs/qwen3_vl_235b_a22b.py --workdir DIR --config.data.path=conversations.jsonl

Takes no argument. The first command plans the run on any machine.
"""

from dataclasses import replace

from mllm_jax.families import FAMILIES
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.losses.load_balance import BalanceConfig
from mllm_jax.train.runs.config import Run, TrainConfig, run_config
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.step.optimizer import OptimConfig


def get_config():
    # An expert takes at most 1.25 times its fair share of tokens. Choices beyond that are dropped and counted.
    runtime = Runtime(dtype="bfloat16", remat="full", capacity_factor=1.25)
    return run_config(
        Run(
            model=replace(FAMILIES["qwen3_vl"].config("235b-a22b"), runtime=runtime),
            init="Qwen/Qwen3-VL-235B-A22B-Instruct",
            # At most 2,048 of a row's 4,096 tokens are visual: two images of 4,096 patches, or more, smaller ones.
            data=FilesData(batch=256, tokens=4096, patch_rows=2, patches_per_row=4096),
            optim=OptimConfig(learning_rate=1e-5, steps=10_000, warmup=200, weight_decay=0.01),
            train=TrainConfig(log_every=10, save_every=500, balance=BalanceConfig("global")),
            preset="expert",
            mesh={"expert": 16},
        )
    )
