"""Trains LLaVA-1.5 (arXiv 2310.03744): the connector on captions, then connector and decoder on instructions.

    python -m mllm_jax.train --config configs/recipes/llava_1_5.py:7b --workdir DIR --config.init=FOLDER \
        --config.stages.align.data.path=captions.jsonl --config.stages.instruct.data.path=instructions.jsonl

The argument is "7b" (the default), "13b", or "tiny" (see `mllm_jax.train.runs.miniature`). With "-lora" appended, the
second stage trains adapters of the decoder, and the connector. Sources: [T] the tables in README.md of
haotian-liu/LLaVA; [P], [F], [L] its scripts/v1_5/pretrain.sh, finetune.sh and finetune_lora.sh; defaults that the
scripts keep, [A] of llava/train/train.py and [D] of transformers' Trainer. Values without a source are ours.
"""

from dataclasses import replace

from mllm_jax.common.config import ConfigError
from mllm_jax.common.errors import suggestion
from mllm_jax.families import FAMILIES
from mllm_jax.nn.lora import LoraConfig
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.runs.config import Run, Stage, TrainConfig, run_config
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.runs.miniature import miniature
from mllm_jax.train.step.optimizer import OptimConfig

SIZES = ("7b", "13b", "7b-lora", "13b-lora")
ALIGN = 558_000 // 256  # [T] 558K captions, once, 256 at a time
INSTRUCT = 665_000 // 128  # [F] llava_v1_5_mix665k, [T] once, 128 at a time


def recipe(size: str, adapts: bool) -> Run:
    # As in LLaVA, a row holds one conversation with an image: 577 patches with the class token, 576 visual tokens.
    captions = FilesData(batch=256, tokens=768, patch_rows=1, patches_per_row=577)  # [T] 256; a caption is short
    instructions = replace(captions, batch=128, tokens=2048)  # [T]
    adam = OptimConfig(
        b1=0.9, b2=0.999, eps=1e-8, max_grad_norm=1.0, weight_decay=0.0, schedule="cosine"
    )  # [D]; [P, F] last 2
    align = replace(
        adam,
        learning_rate=1e-3,  # [T]
        steps=ALIGN,
        warmup=round(0.03 * ALIGN),  # [P] 0.03
        freeze=("encoder", "decoder"),  # [P] tune_mm_mlp_adapter
    )
    instruct = replace(
        adam,
        learning_rate=2e-5,  # [T]
        steps=INSTRUCT,
        warmup=round(0.03 * INSTRUCT),  # [F] 0.03
        freeze=("encoder",),  # the tower is frozen in both stages
    )
    lora = LoraConfig(
        rank=128,  # [L] lora_r
        alpha=256.0,  # [L] lora_alpha
        dropout=0.05,  # [A]
        modules_to_save=("^connector/",),  # [L] trained in full, with a separate learning rate
        base_dtype="bfloat16",  # [L] bf16
    )
    adapted = replace(
        instruct,
        learning_rate=2e-4,  # [L]
        lr_multipliers=(("^connector/", 2e-5 / 2e-4),),  # [L] mm_projector_lr 2e-5
        freeze=(),  # LoRA trains only the adapters and the connector
    )
    second = Stage(data=instructions, **({"optim": adapted, "lora": lora} if adapts else {"optim": instruct}))
    return Run(
        model=replace(
            FAMILIES["llava"].config(f"1.5-{size}"),
            runtime=Runtime(dtype="bfloat16", remat="full"),  # [P, F] bf16
        ),
        init=f"llava-hf/llava-1.5-{size}-hf",
        data=captions,
        train=TrainConfig(save_every=500),
        stages={"align": Stage(data=captions, optim=align), "instruct": second},
    )


def get_config(arg: str = "7b"):
    known = (*SIZES, "tiny", "tiny-lora")
    if arg not in known:
        raise ConfigError(f"configs/recipes/llava_1_5.py has no size {arg!r}; {suggestion(arg, known)}")
    size, _, adapts = arg.partition("-")
    return run_config(miniature(recipe("7b", bool(adapts))) if size == "tiny" else recipe(size, bool(adapts)))
