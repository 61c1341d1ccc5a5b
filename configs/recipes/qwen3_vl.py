"""Trains Qwen3-VL (arXiv 2511.21631): four stages of pre-training, with rows of up to 262,144 tokens.

    python -m mllm_jax.train --config configs/recipes/qwen3_vl.py:8b --workdir DIR --config.init=FOLDER \
        --config.data.path=conversations.jsonl --config.stages.s3.data.path=long.jsonl

The argument is a size of the family (default "8b"), or "tiny" (see `mllm_jax.train.runs.miniature`). Sources: [T] Table
1 of the report; [A] its abstract. Learning rates, batch sizes and warm-up are not published and are ours, as are the
meshes.
"""

from dataclasses import replace

from mllm_jax.families import FAMILIES
from mllm_jax.families.vlms import qwen3_vl
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.losses.cross_entropy import SupervisedConfig
from mllm_jax.train.runs.config import Run, Stage, TrainConfig
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.runs.miniature import sized
from mllm_jax.train.step.optimizer import OptimConfig

SIZES = tuple(qwen3_vl.SIZES)
STEP = 2**23  # tokens per step


def recipe(size: str) -> Run:
    data = FilesData(batch=STEP // 8192, tokens=8192, patch_rows=4, patches_per_row=4096)  # [T] 8,192 in S0 and S1
    long = replace(data, batch=STEP // 32768, tokens=32768, patch_rows=16)  # [T] 32,768 in S2
    longest = replace(data, batch=STEP // 262144, tokens=262144, patch_rows=128)  # [T] 262,144 in S3
    adam = OptimConfig(weight_decay=0.1, max_grad_norm=1.0, schedule="cosine", final_lr_ratio=0.1, warmup=500)
    optim = lambda tokens, rate, **more: replace(adam, steps=int(tokens / STEP), learning_rate=rate, **more)
    return Run(
        model=replace(FAMILIES["qwen3_vl"].config(size), runtime=Runtime(dtype="bfloat16", remat="full")),
        init=f"Qwen/Qwen3-VL-{size.upper()}-Instruct",
        data=data,
        algorithm=SupervisedConfig(weighting="sqrt"),  # [A] square-root reweighting
        train=TrainConfig(save_every=1000),
        stages={
            "s0": Stage(optim=optim(67e9, 1e-3, freeze=("encoder", "decoder"))),  # [T] 67B tokens, the merger alone
            "s1": Stage(optim=optim(1e12, 5e-5)),  # [T] about 1T tokens, all weights
            "s2": Stage(data=long, optim=optim(1e12, 3e-5), mesh={"fsdp": -1, "context": 2}),  # [T] about 1T, all
            "s3": Stage(data=longest, optim=optim(100e9, 1e-5), mesh={"fsdp": -1, "context": 16}),  # [T] 100B, all
        },
    )


def get_config(arg: str = "8b"):
    return sized(__file__, arg, SIZES, recipe, "2b")
