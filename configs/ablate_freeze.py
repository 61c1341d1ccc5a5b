"""Shall the encoder be tuned? The same tiny model with the encoder frozen, tuned late, and tuned throughout.

    python -m mllm_jax.train --config configs/ablate_freeze.py --workdir /tmp/freeze
    python -m mllm_jax.train --config configs/ablate_freeze.py:1 --workdir /tmp/freeze-1       another seed

A model is trained from random weights to name colors and shapes. From there three branches learn all kinds of
questions in two halves of one schedule each: `frozen` keeps the encoder as it is, `late` tunes it in the second half,
`throughout` in both. The command ends with a table of all stages, and with a page that draws the branches, report.html
in the folder.
"""

from dataclasses import replace

from mllm_jax.common.config import ConfigError
from mllm_jax.data.synthetic.scenes import SCENES, scenes_vision_ids
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.train.runs.config import Run, Stage, TrainConfig, run_config
from mllm_jax.train.runs.data import ScenesData
from mllm_jax.train.step.optimizer import OptimConfig

STEPS = 100  # of a stage


def model() -> ModelConfig:
    """The model of configs/scenes.py, two thirds as wide."""
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=16, rope_theta=10_000.0, rope_sections=(4, 2, 2))
    return ModelConfig(
        encoder=VitConfig(width=64, layers=2, heads=4, mlp=128, patch_size=8, position_grid=8, deepstack_layers=(0,)),
        connector=PatchMergerConfig(merge=2),
        decoder=DecoderConfig(vocab=384, width=64, layers=3, attention=attention, mlp=192),
        tokens=VisionTokenIds(*scenes_vision_ids()),
    )


def get_config(arg: str = "0"):
    if not (arg or "0").isdigit():
        raise ConfigError(f"configs/ablate_freeze.py takes a seed, an integer, not {arg!r}")
    seed = int(arg or "0")
    data = ScenesData(batch=4, tokens=144, patch_rows=2, patches_per_row=160, window=8.0, min_pixels=256, seed=seed)
    tuned = OptimConfig(
        "muon", 2e-3, warmup=10, steps=STEPS, final_lr_ratio=0.03, b2=0.98, weight_decay=0.02, max_grad_norm=1.0
    )
    frozen = replace(tuned, freeze=("encoder",))
    stages = {
        "pretrain": Stage(data=replace(data, kinds={"color": 1.0, "shape": 1.0})),
        "frozen_first": Stage(after="pretrain", optim=frozen),
        "frozen": Stage(after="frozen_first", optim=frozen),
        "late": Stage(after="frozen_first"),
        "throughout_first": Stage(after="pretrain"),
        "throughout": Stage(after="throughout_first"),
    }
    train = TrainConfig(seed=seed, log_every=25, evaluate_every=50, num_eval_examples=300, save_every=50)
    return run_config(
        Run(model=model(), data=data, optim=tuned, train=train, processor=SCENES, stages=stages),
    )
