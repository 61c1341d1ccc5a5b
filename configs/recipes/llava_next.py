"""Trains LLaVA-NeXT: as LLaVA-1.5, but with tiled images and a tower tuned at a fifth of the learning rate.

    python -m mllm_jax.train --config configs/recipes/llava_next.py:mistral-7b --workdir DIR --config.init=FOLDER \
        --config.stages.align.data.path=captions.jsonl --config.stages.instruct.data.path=instructions.jsonl

The argument is "vicuna-7b", "vicuna-13b", "mistral-7b" (the default), "34b", or "tiny" (see
`mllm_jax.train.runs.miniature`). Sources: [P], [F] scripts/train/pretrain_clip.sh and finetune_clip.sh of
LLaVA-VL/LLaVA-NeXT, for CLIP-L/14-336 and Qwen2-7B; [D] defaults of transformers' Trainer, which the scripts keep;
[1.5] configs/recipes/llava_1_5.py, because the global batch of the scripts depends on the number of GPUs; [B] column
"Data (IT)" of the results in llava-vl.github.io/blog/2024-01-30-llava-next. Values without a source are ours.
"""

from dataclasses import replace

from mllm_jax.families import FAMILIES
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.runs.config import Run, Stage, TrainConfig
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.runs.miniature import sized
from mllm_jax.train.step.optimizer import OptimConfig

SIZES = ("vicuna-7b", "vicuna-13b", "mistral-7b", "34b")
ALIGN = 558_000 // 256  # [P] blip_558k, 1 epoch; [1.5] 256
INSTRUCT = 760_000 // 128  # [B] 760K; [F] 1 epoch; [1.5] 128


def recipe(size: str) -> Run:
    # A row holds one image as up to four tiles and an overview: 5 x 577 patches, at most 2,928 visual tokens.
    captions = FilesData(batch=256, tokens=4096, patch_rows=1, patches_per_row=5 * 577)  # [1.5] 256
    instructions = replace(captions, batch=128)  # [1.5] 128
    adam = OptimConfig(
        b1=0.9, b2=0.999, eps=1e-8, max_grad_norm=1.0, weight_decay=0.0, schedule="cosine"
    )  # [D]; [P, F] last 2
    align = replace(
        adam,
        learning_rate=1e-3,  # [P]
        steps=ALIGN,
        warmup=round(0.03 * ALIGN),  # [P] 0.03
        freeze=("encoder", "decoder"),  # [P] mm_tunable_parts: the connector ("mm_mlp_adapter")
    )
    instruct = replace(
        adam,
        learning_rate=1e-5,  # [F]
        lr_multipliers=(("encoder", 2e-6 / 1e-5),),  # [F] mm_vision_tower_lr 2e-6
        steps=INSTRUCT,
        warmup=round(0.03 * INSTRUCT),  # [F] 0.03
    )
    return Run(
        model=replace(
            FAMILIES["llava"].config(f"next-{size}"),
            runtime=Runtime(dtype="bfloat16", remat="full"),  # [P, F] bf16
        ),
        init=f"llava-hf/llava-v1.6-{size}-hf",
        data=captions,
        train=TrainConfig(save_every=500),
        stages={"align": Stage(data=captions, optim=align), "instruct": Stage(data=instructions, optim=instruct)},
    )


def get_config(arg: str = "mistral-7b"):
    return sized(__file__, arg, SIZES, recipe, "mistral-7b")
