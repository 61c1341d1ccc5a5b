"""Trains InternVL 3 (arXiv 2504.10479): all weights on text and images in one stage, then your own data.

    python -m mllm_jax.train --config configs/recipes/internvl_3.py:8b --workdir DIR --config.init=FOLDER \
        --config.data.sources.text.path=texts.jsonl --config.data.sources.images.path='images/*.parquet' \
        --config.stages.finetune.data.path=conversations.jsonl

The argument is a size of the family without "3-" (default "8b"), or "tiny" (see `mllm_jax.train.runs.miniature`).
Sources: [P] the paper, section 2.2; [F] OpenGVLab/InternVL's script for your own data,
internvl_chat/shell/internvl3.0/2nd_finetune/internvl3_1b_dynamic_res_2nd_finetune_full.sh; [2.5]
configs/recipes/internvl_2_5.py: learning rate, batch and decay of joint training are not published, so those of its
second stage are used. The paper's positions (V2PE) are not implemented.
"""

from dataclasses import replace

from mllm_jax.families import FAMILIES
from mllm_jax.families.vlms import internvl
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.losses.cross_entropy import SupervisedConfig
from mllm_jax.train.runs.config import Run, Stage, TrainConfig
from mllm_jax.train.runs.data_files import FilesData, MixtureData, Part
from mllm_jax.train.runs.miniature import sized
from mllm_jax.train.step.optimizer import OptimConfig

SIZES = tuple(name.removeprefix("3-") for name in internvl.SIZES)
TOKENS = 200e9  # [P] about 200B


def recipe(size: str) -> Run:
    shape = {"tokens": 16384, "patches_per_row": 4 * 1028}  # [2.5]
    sources = {"text": Part(weight=1.0), "images": Part(weight=3.0)}  # [P] 1 to 3 of tokens; here of conversations
    data = MixtureData(batch=512, patch_rows=12, sources=sources, **shape)  # [2.5]
    conversations = FilesData(batch=128, patch_rows=4, **shape)  # [F] 128; room for 16 tiles: 12 and the overview
    adam = OptimConfig(b1=0.9, b2=0.999, eps=1e-8, max_grad_norm=1.0, schedule="cosine")  # [2.5]
    steps = int(TOKENS / (data.batch * data.tokens))
    joint = replace(adam, learning_rate=4e-5, weight_decay=0.01, steps=steps, warmup=round(0.03 * steps))  # [2.5]
    finetune = replace(
        adam,
        learning_rate=1e-5,  # [F]
        weight_decay=0.05,  # [F]
        steps=1000,  # set this to one epoch [F] of your data
        warmup=30,  # [F] 0.03
        freeze=("encoder",),  # [F] freeze_backbone
    )
    return Run(
        model=replace(
            FAMILIES["internvl"].config(f"3-{size}"),
            runtime=Runtime(dtype="bfloat16", remat="full"),  # [F] bf16
        ),
        init=f"OpenGVLab/InternVL3-{size.upper()}-hf",
        data=data,
        algorithm=SupervisedConfig(weighting="sqrt"),  # [2.5]
        train=TrainConfig(save_every=1000),
        stages={
            "joint": Stage(optim=joint),  # [P] nothing is frozen
            "finetune": Stage(
                algorithm=SupervisedConfig(), data=conversations, optim=finetune, train=TrainConfig(save_every=200)
            ),  # [F] 200
        },
    )


def get_config(arg: str = "8b"):
    return sized(__file__, arg, SIZES, recipe, "1b")
