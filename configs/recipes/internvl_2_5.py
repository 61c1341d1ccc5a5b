"""Trains InternVL 2.5 1B (arXiv 2412.05271): first the connector, then all weights, with square-root reweighting.

    python -m mllm_jax.train --config configs/recipes/internvl_2_5.py --workdir DIR --config.init=FOLDER \
        --config.stages.mlp.data.path=pretrain.jsonl --config.stages.full.data.path=finetune.jsonl

The argument is "1b" (the default), or "tiny" (see `mllm_jax.train.runs.miniature`). Sources: [1], [2] of
OpenGVLab/InternVL, internvl_chat/shell/internvl2.5/stage{1,2}/internvl2_5_1b_qwen2_5_0_5b_dynamic_res_stage{1,2}.sh;
[D] defaults of transformers' Trainer, which both scripts keep. [2] drops a tenth of the tower's layers at random
(stochastic depth); this recipe drops none.
"""

from dataclasses import replace

from mllm_jax.families import FAMILIES
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.losses.cross_entropy import SupervisedConfig
from mllm_jax.train.runs.config import Run, Stage, TrainConfig
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.runs.miniature import sized
from mllm_jax.train.step.optimizer import OptimConfig

SIZES = ("1b",)


def recipe() -> Run:
    data = FilesData(
        batch=512,  # [1, 2] packed rows
        tokens=16384,  # [1, 2]
        patch_rows=12,
        # 12 x 4 = 48 tiles [1, 2] of 1,024 patches and a class token, rounded up to a multiple of 2 x 2 patches.
        patches_per_row=4 * 1028,
    )
    adam = OptimConfig(
        b1=0.9, b2=0.999, eps=1e-8, max_grad_norm=1.0, weight_decay=0.01, schedule="cosine"
    )  # [D]; [1, 2] last 2
    mlp = replace(
        adam,
        learning_rate=2e-4,  # [1]
        steps=100_000,  # [1] maximum of the script
        warmup=100,  # [1]
        freeze=("encoder", "decoder"),  # [1]
    )
    full = replace(
        adam,
        learning_rate=4e-5,  # [2]
        steps=22_000,  # [2]
        warmup=round(0.03 * 22_000),  # [2]
    )
    return Run(
        # InternVL 3 1B has the same parts: InternViT-300M and Qwen2.5-0.5B.
        model=replace(
            FAMILIES["internvl"].config("3-1b"),
            runtime=Runtime(dtype="bfloat16", remat="full"),  # [1, 2] bf16
        ),
        init="OpenGVLab/InternVL3-1B-hf",
        data=data,
        algorithm=SupervisedConfig(weighting="sqrt"),  # [1, 2] loss_reduction "square"
        train=TrainConfig(save_every=1000),
        stages={"mlp": Stage(optim=mlp), "full": Stage(optim=full)},
    )


def get_config(arg: str = "1b"):
    return sized(__file__, arg, SIZES, lambda size: recipe(), "1b")
