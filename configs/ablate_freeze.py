"""Compares three ways to train an encoder: frozen, tuned in the second half, and tuned throughout.

    python -m mllm_jax.train --config configs/ablate_freeze.py --workdir /tmp/freeze
    python -m mllm_jax.train --config configs/ablate_freeze.py:1 --workdir /tmp/freeze-1       another seed

The argument is a seed (default 0). Stage `pretrain` trains a tiny model from random weights to name colors and shapes.
Three branches continue from it with all kinds of questions, in two stages each: `frozen` never tunes the encoder,
`late` tunes it in the second stage, `throughout` in both. The command prints a table of all stages and writes
report.html, which draws the branches, to the workdir.
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

STEPS = 100  # per stage


def model() -> ModelConfig:
    """Returns the model of configs/scenes.py at two thirds of its width."""
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=16, rope_theta=10_000.0, rope_sections=(4, 2, 2))
    return ModelConfig(
        encoder=VitConfig(width=64, layers=2, heads=4, mlp=128, patch_size=8, position_grid=8, deepstack_layers=(0,)),
        connector=PatchMergerConfig(merge=2),
        decoder=DecoderConfig(vocab=384, width=64, layers=3, attention=attention, mlp=192),
        tokens=VisionTokenIds(*scenes_vision_ids()),
    )


def get_config(arg: str = "0"):
    if not (arg or "0").isdigit():
        raise ConfigError(f"configs/ablate_freeze.py: the seed {arg!r} is not a number. Pass a whole number.")
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
