"""Trains DeepSeek-VL2 Small (arXiv 2412.10302): alignment with a frozen decoder, joint pre-training, instructions.

    python -m mllm_jax.train --config configs/recipes/deepseek_vl2.py --workdir DIR --config.processor=FOLDER \
        --config.stages.align.data.path=captions.jsonl --config.stages.instruct.data.path=instructions.jsonl \
        --config.data.sources.images.path='images/*.parquet' --config.data.sources.text.path=texts.jsonl

The argument is "small" (the default), or "tiny" (see `mllm_jax.train.runs.miniature`). The published hyperparameters
are applied to similar parts with random weights: SigLIP-SO400M, pixel shuffle instead of the paper's 2 x 2 unfolding,
and the paper's decoder, DeepSeek-V2-Lite, with Qwen's vocabulary. Images keep their size instead of being tiled.
Source: [2] Table 2 of the paper. Not published: the warm-up, and the tokens over which experts are balanced (here a
  sequence).
"""

from dataclasses import replace

from mllm_jax.families.decoders import deepseek
from mllm_jax.families.towers.in_vlms import SIGLIP
from mllm_jax.families.vlms import qwen3_vl
from mllm_jax.model.connectors.pixel_shuffle import PixelShuffleConfig
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.losses.load_balance import BalanceConfig
from mllm_jax.train.runs.config import Run, Stage, TrainConfig
from mllm_jax.train.runs.data_files import FilesData, MixtureData, Part
from mllm_jax.train.runs.miniature import sized
from mllm_jax.train.step.optimizer import OptimConfig

SIZES = ("small",)


def recipe() -> Run:
    shape = {"tokens": 4096, "patch_rows": 2, "patches_per_row": 4096}  # [2] 4,096 tokens
    sources = {"images": Part(weight=0.7), "text": Part(weight=0.3)}  # [2] 70 to 30 of tokens; here of conversations
    captions = FilesData(batch=256, **shape)  # [2]
    data = MixtureData(batch=2304, sources=sources, **shape)  # [2]
    instructions = FilesData(batch=64, **shape)  # [2]
    adam = OptimConfig(
        b1=0.9,  # [2]
        b2=0.95,  # [2]
        weight_decay=0.1,  # [2]
        max_grad_norm=1.0,  # [2]
        lr_multipliers=(("encoder", 0.1),),  # [2] a tenth of the learning rate for the tower
    )
    stage = lambda data, tokens, rate, schedule, **more: Stage(
        data=data,
        optim=replace(
            adam, steps=int(tokens / (data.batch * data.tokens)), learning_rate=rate, schedule=schedule, **more
        ),
    )
    parts = (SIGLIP.sizes["so400m-14-384"], PixelShuffleConfig(), replace(deepseek.SIZES["v2-lite"], vocab=151936))
    return Run(
        model=ModelConfig(*parts, qwen3_vl.TOKENS, Runtime(dtype="bfloat16", remat="full", capacity_factor=1.25)),
        data=data,
        train=TrainConfig(save_every=1000, balance=BalanceConfig("sequence", aux_loss_weight=0.001)),  # [2] 0.001
        stages={
            "align": stage(captions, 2.0e9, 4.2e-4, "cosine", freeze=("decoder",)),  # [2]
            "pretrain": stage(data, 808.9e9, 4.2e-4, "step"),  # [2]
            "instruct": stage(instructions, 20e9, 1.4e-5, "constant"),  # [2] about 20B tokens
        },
    )


def get_config(arg: str = "small"):
    return sized(__file__, arg, SIZES, lambda size: recipe(), "small")
