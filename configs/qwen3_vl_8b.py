"""Trains Qwen3-VL-8B on 64 TPU v6e chips or 64 H200 GPUs; up to half of each row's tokens are visual.

    python -m mllm_jax.plan --config configs/qwen3_vl_8b.py --topology v6e:8x8
    python -m mllm_jax.train --config configs/qwen3_vl_8b.py --workdir DIR --config.data.path=conversations.jsonl

Takes no argument. The first command plans the run on any machine.
"""

from dataclasses import replace

from mllm_jax.families import FAMILIES
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.runs.config import Run, TrainConfig, run_config
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.step.optimizer import OptimConfig


def get_config():
    model = replace(FAMILIES["qwen3_vl"].config("8b"), runtime=Runtime(dtype="bfloat16", remat="full"))
    return run_config(
        Run(
            model=model,
            init="Qwen/Qwen3-VL-8B-Instruct",
            # At most 2,048 of a row's 4,096 tokens are visual: two images of 4,096 patches, or more, smaller ones.
            data=FilesData(batch=128, tokens=4096, patch_rows=2, patches_per_row=4096),
            optim=OptimConfig(learning_rate=1e-5, steps=10_000, warmup=200, weight_decay=0.01),
            train=TrainConfig(log_every=10, save_every=500),
        )
    )
