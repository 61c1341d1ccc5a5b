"""Trains Qwen2-VL (arXiv 2409.12191): the tower, then all weights, then the decoder alone on instructions.

    python -m mllm_jax.train --config configs/recipes/qwen2_vl.py:2b --workdir DIR --config.init=FOLDER \
        --config.stages.vision.data.path=pairs.jsonl --config.stages.joint.data.path=all.jsonl \
        --config.stages.instruct.data.path=instructions.jsonl

The argument is "2b" (the default), "7b", "72b", or "tiny" (see `mllm_jax.train.runs.miniature`). Source: [Q] the
report. Learning rates, batch sizes, row lengths and the size of the instruction set are not published and are ours.
"""

from dataclasses import replace

from mllm_jax.families import FAMILIES
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.runs.config import Run, Stage, TrainConfig
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.runs.miniature import sized
from mllm_jax.train.step.optimizer import OptimConfig

SIZES = ("2b", "7b", "72b")
VISION = 600e9  # [Q] tokens of the first stage
TOTAL = 1.4e12  # [Q] tokens of the first two stages


def recipe(size: str) -> Run:
    data = FilesData(batch=1024, tokens=8192, patch_rows=4, patches_per_row=4096)
    instructions = replace(data, batch=128)
    adam = OptimConfig(weight_decay=0.1, max_grad_norm=1.0, schedule="cosine", final_lr_ratio=0.1, warmup=500)
    tokens_per_step = data.batch * data.tokens
    return Run(
        model=replace(FAMILIES["qwen2_vl"].config(size), runtime=Runtime(dtype="bfloat16", remat="full")),
        init=f"Qwen/Qwen2-VL-{size.upper()}-Instruct",
        data=data,
        train=TrainConfig(save_every=1000),
        stages={
            "vision": Stage(
                # [Q] only the tower, which includes the connector in the released code
                optim=replace(adam, learning_rate=1e-4, steps=int(VISION / tokens_per_step), freeze=("decoder",))
            ),
            "joint": Stage(  # [Q] all weights
                optim=replace(adam, learning_rate=5e-5, steps=int((TOTAL - VISION) / tokens_per_step))
            ),
            "instruct": Stage(
                data=instructions,
                optim=replace(adam, learning_rate=1e-5, steps=10_000, freeze=("encoder",)),  # [Q] without the tower
            ),
        },
    )


def get_config(arg: str = "2b"):
    return sized(__file__, arg, SIZES, recipe, "2b")
