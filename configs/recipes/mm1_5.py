"""Trains a model like MM1.5 (arXiv 2409.20566): all weights in one stage of instructions with large images.

    python -m mllm_jax.train --config configs/recipes/mm1_5.py --workdir DIR --config.processor=FOLDER \
        --config.data.path=instructions.jsonl

The argument is "3b" (the default), or "tiny" (see `mllm_jax.train.runs.miniature`). Neither weights nor code of MM1.5
are public. This recipe has its size, with similar parts and random weights: a CLIP ViT-H/14, 2 x 2 average pooling
instead of the C-Abstractor, and Qwen2.5-3B instead of its decoder of 3B. Images are not tiled: one may have as many
pixels as the paper's four sub-images and overview. Sources: [P] the paper; [1] MM1, arXiv 2403.09611. The learning
rate and the number of steps are ours.
"""

from dataclasses import replace

from mllm_jax.families.decoders import qwen2
from mllm_jax.families.towers.in_vlms import CLIP
from mllm_jax.families.vlms import qwen3_vl
from mllm_jax.model.connectors.average_pool import AveragePoolConfig
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.runs.config import Run, Stage, TrainConfig
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.runs.miniature import sized
from mllm_jax.train.step.optimizer import OptimConfig

SIZES = ("3b",)
PIXELS = (1 + 4) * 378**2  # [P] an overview and four sub-images of 378 x 378


def recipe() -> Run:
    tower = replace(CLIP.sizes["h14"], position_grid=27)  # [P] 378 / 14
    patches = 4 * 1024  # an image has at most PIXELS / 14**2 = 3,645 patches and a class token
    return Run(
        model=ModelConfig(
            tower,
            AveragePoolConfig(),
            qwen2.SIZES["2.5-3b"],
            qwen3_vl.TOKENS,
            Runtime(dtype="bfloat16", remat="full"),
        ),
        data=FilesData(
            batch=512, tokens=4096, patch_rows=3, patches_per_row=patches, max_pixels=PIXELS
        ),  # [1] 512 and 4,096
        train=TrainConfig(save_every=500),
        stages={
            "instruct": Stage(
                optim=OptimConfig(learning_rate=2e-5, steps=20_000, warmup=500, schedule="cosine", weight_decay=0.0)
            )
        },
    )


def get_config(arg: str = "3b"):
    return sized(__file__, arg, SIZES, lambda size: recipe(), "3b")
