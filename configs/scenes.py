"""Trains a small Qwen3-VL to answer questions about drawn images and videos, in minutes on two cores.

    python -m mllm_jax.train --config configs/scenes.py --workdir /tmp/scenes
    python -m mllm_jax.train --config configs/scenes.py:blind --workdir /tmp/blind       the same without images
    python -m mllm_jax.train --config configs/scenes.py:experts --workdir /tmp/experts   with experts instead of MLPs

The argument is "blind", "experts" or absent. The model has a million random parameters. A visual token covers 16 x 16
pixels, and images have 3-5 x 3-5 of them. A row holds about four conversations, a batch 32.
`mllm_jax.data.synthetic.scenes` describes the questions and what their scores do not show.
"""

from mllm_jax.common.config import ConfigError
from mllm_jax.data.synthetic.scenes import SCENES, scenes_vision_ids
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.moe.layer import MoeConfig
from mllm_jax.train.losses.load_balance import BalanceConfig
from mllm_jax.train.runs.config import Run, TrainConfig, run_config
from mllm_jax.train.runs.data import ScenesData
from mllm_jax.train.step.optimizer import OptimConfig

WIDTH, HEADS = 96, 4
HEAD_DIM = WIDTH // HEADS
VOCAB = 384  # vocabulary of the tokenizer, padded to a size that meshes divide


def model(experts: bool = False) -> ModelConfig:
    return ModelConfig(
        encoder=VitConfig(
            width=WIDTH,
            layers=2,
            heads=HEADS,
            mlp=2 * WIDTH,
            patch_size=8,
            position_grid=8,
            deepstack_layers=(0,),
        ),
        connector=PatchMergerConfig(merge=2),
        decoder=DecoderConfig(
            vocab=VOCAB,
            width=WIDTH,
            layers=3,
            attention=AttentionConfig(
                heads=HEADS,
                kv_heads=HEADS // 2,
                head_dim=HEAD_DIM,
                rope_theta=10_000.0,  # low rotary frequencies let "any red?" match colors at any distance
                rope_sections=(4, 4, 4),
            ),
            mlp=3 * WIDTH,
            moe=MoeConfig(experts=8, top_k=2, mlp=3 * WIDTH // 2) if experts else None,
        ),
        tokens=VisionTokenIds(*scenes_vision_ids()),
    )


def get_config(arg: str = ""):
    if arg not in ("", "blind", "experts"):
        raise ConfigError(f"configs/scenes.py: unknown argument {arg!r}. Pass 'blind', 'experts' or no argument.")
    blind = arg == "blind"
    return run_config(
        Run(
            model=model(experts=arg == "experts"),
            processor=SCENES,
            # Text-only rows need fewer tokens for the same number of conversations.
            data=ScenesData(
                batch=8,
                tokens=64 if blind else 144,
                patch_rows=2,
                patches_per_row=160,
                window=8.0,
                min_pixels=256,
                text_only=blind,
            ),
            # Muon learns this set in far fewer steps than AdamW.
            optim=OptimConfig(
                name="muon",
                learning_rate=2e-3,
                steps=1300,
                warmup=100,
                final_lr_ratio=0.03,
                b2=0.98,
                weight_decay=0.02,
                max_grad_norm=1.0,
            ),
            train=TrainConfig(
                log_every=50,
                evaluate_every=500,
                num_eval_examples=400,
                save_every=500,
                balance=BalanceConfig("global" if arg == "experts" else "none", aux_loss_weight=0.01),
            ),
        )
    )
