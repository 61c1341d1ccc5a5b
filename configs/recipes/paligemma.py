"""Fine-tunes all weights of a pre-trained PaliGemma (arXiv 2407.07726) on one task, here VQAv2.

    python -m mllm_jax.train --config configs/recipes/paligemma.py:3b-224 --workdir DIR --config.init=FOLDER \
        --config.data.path=vqav2.jsonl

The argument is a size of the family with 224 or 448 pixels (default "3b-224"), or "tiny" (see
`mllm_jax.train.runs.miniature`). Sources: [V] big_vision/configs/proj/paligemma/transfers/vqav2.py of
google-research/big_vision, `sweep_best` and `get_config`; [O] its optax.py, which does not multiply the weight decay by
the learning rate, while this library does; [S] visualqa.org/download.html: 443,757 questions for training and 214,354
for validation, of which [V] holds out 10,240.
"""

from dataclasses import replace

from mllm_jax.families import FAMILIES
from mllm_jax.families.vlms import paligemma
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.runs.config import Run, Stage, TrainConfig
from mllm_jax.train.runs.data_files import FilesData
from mllm_jax.train.runs.miniature import sized
from mllm_jax.train.step.optimizer import OptimConfig

SIZES = tuple(name for name in paligemma.SIZES if name.endswith(("-224", "-448")))
QUESTIONS = 443_757 + 214_354 - 10_240  # [S, V]
STEPS = 10 * QUESTIONS // 256  # [V] 10 epochs of 256


def recipe(size: str) -> Run:
    model = FAMILIES["paligemma"].config(size)
    patches = model.encoder.position_grid**2
    name, _, pixels = size.removeprefix("2-").partition("-")
    version = "2" if size.startswith("2-") else ""
    rate = 1e-5  # [V]
    return Run(
        model=replace(model, runtime=Runtime(dtype="bfloat16", remat="full")),
        init=f"google/paligemma{version}-{name}-pt-{pixels}",
        # A row holds one question: the tokens of an image, up to 32 of text [V], and separators.
        data=FilesData(batch=256, tokens=patches + 64, patch_rows=1, patches_per_row=patches),  # [V] 256
        train=TrainConfig(save_every=1000),  # [V]
        stages={
            "transfer": Stage(
                optim=OptimConfig(
                    learning_rate=rate,
                    schedule="cosine",  # [V]
                    steps=STEPS,
                    warmup=round(0.05 * STEPS),  # [V] warmup_percent
                    weight_decay=1e-6 / rate if pixels == "224" else 0.0,  # [V] 1e-6 and 0, [O]
                    b1=0.9,  # optax's default, which [V] keeps
                    b2=0.999,  # optax's default
                    max_grad_norm=1.0,  # [V]
                )
            )
        },
    )


def get_config(arg: str = "3b-224"):
    return sized(__file__, arg, SIZES, recipe, "3b-224")
