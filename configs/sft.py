"""Fine-tunes any published model on your conversations, in any file format that `mllm_jax.data.sources` reads.

    python -m mllm_jax.train --config configs/sft.py:FOLDER --workdir DIR \
        --config.data.path=conversations.jsonl --config.data.root=IMAGES

The argument is the model to start from: a folder in Hugging Face's format, its name on the hub, or the workdir of a
training run. The run takes its architecture, weights, tokenizer and chat template. Models without an encoder train on
texts. `--config.optim.freeze="('encoder',)"` freezes the encoder.

    --config configs/sft.py:llava_next/next-mistral-7b --config.init=llava-hf/llava-v1.6-mistral-7b-hf

FAMILY/SIZE, as listed by `python -m mllm_jax.families`, sets the architecture only; `--config.init` names the weights.

    --config configs/sft.py:FOLDER,charts,texts
        --config.data.sources.charts.path='charts/*.parquet' --config.data.sources.texts.path=texts.jsonl
        --config.data.sources.texts.weight=0.5

Names after the model are the sources of a mixture.
"""

import re
from dataclasses import replace
from pathlib import Path

from mllm_jax.common.config import ConfigError
from mllm_jax.common.errors import describe_error, suggestion
from mllm_jax.common.workdir import is_run
from mllm_jax.families import FAMILIES
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.model.vlm import ModelConfig, without_values
from mllm_jax.nn.lora import LoraConfig
from mllm_jax.nn.runtime import Runtime
from mllm_jax.pretrained.api import published_config
from mllm_jax.train.checkpoint.restore import read_config
from mllm_jax.train.runs.config import Run, TrainConfig, run_config
from mllm_jax.train.runs.data_files import FilesData, MixtureData, Part
from mllm_jax.train.step.optimizer import OptimConfig

INSTRUCTION = 128  # tokens of the text that a connector reads with an image
TOKENS, PATCHES = 4096, 4096  # per row, and per patch row; rounded to the model's positions and whole images


def get_config(arg: str = "llava/1.5-7b"):
    return run_config(run(arg))


def run(arg: str = "") -> Run:
    """Returns the run of an argument. configs/dpo.py, reward.py and rlhf.py change its algorithm."""
    named, *sources = (arg or "llava/1.5-7b").split(",")
    family, _, size = named.partition("/")
    is_size = family in FAMILIES
    model = FAMILIES[family].config(size) if is_size else model_in(named)
    if not isinstance(model, ModelConfig) or model.decoder is None:
        raise ConfigError(f"configs/sft.py:{named}: the model does not answer questions. Name one with a decoder.")
    tokens = min(TOKENS, model.decoder.positions or TOKENS)  # learned positions limit a conversation
    shape = {"batch": 8, "tokens": tokens, "patch_rows": 0, "patches_per_row": 0}
    if model.encoder is not None:
        # Patches of an image of the size that the position table was learned for.
        image = model.num_prefix_tokens + max(1, model.encoder.position_grid**2)
        images = max(1, PATCHES // image)
        shape |= {"patch_rows": 2, "patches_per_row": image * images, "images_per_row": images if model.queries else 0}
    if model.reads_instructions:
        shape["instruction_tokens"] = min(INSTRUCTION, model.connector.positions)
    source = "" if is_size else named
    return Run(
        model=replace(model, runtime=Runtime(dtype="bfloat16", remat="full")),
        init=source,
        processor=source,
        data=MixtureData(**shape, sources=dict.fromkeys(sources, Part())) if sources else FilesData(**shape),
        optim=OptimConfig(learning_rate=1e-5, steps=1000, warmup=50),
        train=TrainConfig(log_every=10, evaluate_every=200, save_every=200),
    )


def model_in(source: str) -> ModelConfig | DualConfig:
    """Returns the model in a folder, on the hub or of a training run. Raises ConfigError if it cannot be read."""
    try:
        if is_run(source):
            return replace(without_values(read_config(source).model), lora=LoraConfig())
        return published_config(source)
    except (OSError, ValueError) as error:
        family, fault = source.partition("/")[0], describe_error(error)
        if not Path(source).exists() and re.fullmatch(r"\w+", family):
            fault += f" There is no family {family!r}; {suggestion(family, FAMILIES)}"
        raise ConfigError(f"configs/sft.py:{source}: {fault}") from error
