"""Trains a dual encoder (CLIP, SigLIP, SigLIP 2) on pairs of an image and a text.

    python -m mllm_jax.train --config configs/contrastive.py --workdir /tmp/pairs
    python -m mllm_jax.train --config configs/contrastive.py:siglip2/base-16 --workdir DIR \
        --config.init=google/siglip2-base-patch16-naflex --config.data.path=pairs.jsonl --config.data.root=IMAGES

Without an argument, a small SigLIP 2 learns captions of the embedded scenes from random weights, in minutes on two
cores. The argument FAMILY/SIZE is a published dual encoder (clip, siglip or siglip2; `python -m mllm_jax.families`
lists their sizes) to train on your pairs. A pair is a line of JSON, {"image": "a.png", "text": "A cat."}, or a
conversation whose last answer is the text. SigLIP 2 keeps the aspect ratio of images and packs several into a row.
"""

from dataclasses import replace

from mllm_jax.common.config import ConfigError
from mllm_jax.common.errors import suggestion
from mllm_jax.data.synthetic.scenes import SCENES
from mllm_jax.families import FAMILIES
from mllm_jax.families.towers import in_vlms, siglip
from mllm_jax.families.towers.dual_encoders import DualFamily
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.losses.contrastive import ContrastiveConfig
from mllm_jax.train.runs.config import Run, TrainConfig, run_config
from mllm_jax.train.runs.data import ScenesData
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.step.optimizer import OptimConfig

WIDTH, HEADS, LENGTH, SIDE = 96, 4, 16, 8
DUALS = {name: family for name, family in FAMILIES.items() if isinstance(family, DualFamily)}
PACKED = 4  # images per row if the tower reads images of any size


def small() -> DualConfig:
    """Returns a SigLIP 2 with 0.4 million parameters, for images of at most 64 patches of 8 x 8 pixels."""
    sizes = {"width": WIDTH, "heads": HEADS, "mlp": 2 * WIDTH}
    tower = replace(in_vlms.NAFLEX.sizes["base-16"], layers=2, patch_size=8, position_grid=SIDE, **sizes)
    text = siglip.TEXTS["base"]
    attention = replace(text.attention, heads=HEADS, kv_heads=HEADS, head_dim=WIDTH // HEADS)
    text = replace(text, vocab=384, width=WIDTH, layers=2, mlp=2 * WIDTH, positions=LENGTH, attention=attention)
    return siglip.dual(tower, text, WIDTH, "siglip2")


def get_config(arg: str = ""):
    if arg:
        return run_config(published(arg))
    return run_config(
        Run(
            model=small(),
            processor=SCENES,
            data=ScenesData(
                batch=16,
                tokens=4 * LENGTH,
                patch_rows=1,
                patches_per_row=4 * SIDE**2,
                kinds={"caption": 1.0},
                window=2.0,
            ),
            optim=OptimConfig(name="muon", learning_rate=2e-3, steps=600, warmup=50, final_lr_ratio=0.03, b2=0.98),
            algorithm=ContrastiveConfig(),
            train=TrainConfig(log_every=50, evaluate_every=200, num_eval_examples=256, save_every=200),
        )
    )


def published(arg: str) -> Run:
    family, _, size = arg.partition("/")
    if family not in DUALS:
        raise ConfigError(
            f"configs/contrastive.py: {family!r} is not a dual encoder. Pass FAMILY/SIZE; {suggestion(family, DUALS)}"
        )
    model = DUALS[family].config(size)
    count = PACKED if DUALS[family].tower.any_size else 1
    image = model.encoder.num_prefix_tokens + model.encoder.position_grid**2
    return Run(
        model=replace(model, runtime=Runtime(dtype="bfloat16", remat="full")),
        data=FilesData(
            batch=256 // count,
            tokens=count * model.text.positions,
            patch_rows=1,
            patches_per_row=count * image,
            window=2.0,
        ),
        optim=OptimConfig(learning_rate=1e-5, steps=1000, warmup=50, b2=0.98, weight_decay=1e-4),
        algorithm=ContrastiveConfig(),
        train=TrainConfig(log_every=10, evaluate_every=200, save_every=200),
    )
