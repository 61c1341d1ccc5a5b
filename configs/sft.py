"""Fine-tunes any published family on your conversations: files of any kind that `mllm_jax.data.sources` reads.

    python -m mllm_jax.train --config configs/sft.py:llava_next/next-mistral-7b --workdir DIR \
        --config.init=llava-hf/llava-v1.6-mistral-7b-hf \
        --config.data.path=conversations.jsonl --config.data.root=PICTURES

The argument is FAMILY/SIZE, as `python -m mllm_jax.models` lists them; `--config.init` is a folder of published weights
or the hub's name of them. `--config.optim.freeze="('encoder',)"` leaves the tower as it is.

    --config configs/sft.py:llava_next/next-mistral-7b,charts,texts
        --config.data.sources.charts.path='charts/*.parquet' --config.data.sources.texts.path=texts.jsonl
        --config.data.sources.texts.weight=0.5

Names after it are those of a mixture's sources.
"""

from dataclasses import replace

from mllm_jax.config import ConfigError, suggestion
from mllm_jax.families import FAMILIES
from mllm_jax.model import ModelConfig
from mllm_jax.nn.runtime import Runtime
from mllm_jax.train.files import FilesData, MixtureData, Part
from mllm_jax.train.optim import OptimConfig
from mllm_jax.train.run import Run, TrainConfig, run_config

TOKENS, PATCHES = 4096, 4096  # of a row, about


def get_config(arg: str = "llava/1.5-7b"):
    named, *sources = (arg or "llava/1.5-7b").split(",")
    family, _, size = named.partition("/")
    if family not in FAMILIES:
        raise ConfigError(
            f"configs/sft.py takes FAMILY/SIZE; there is no family {family!r}; {suggestion(family, FAMILIES)}"
        )
    model = FAMILIES[family].sizes(size)
    if not isinstance(model, ModelConfig) or model.connector is None:
        raise ConfigError(f"configs/sft.py: {named} does not answer questions about pictures")
    picture = model.lead + max(1, model.encoder.position_grid**2)  # as large as the table of positions, if there is one
    shape = {"batch": 8, "tokens": TOKENS, "rows": 2, "patches": picture * max(1, PATCHES // picture)}
    return run_config(
        Run(
            model=replace(model, runtime=Runtime(dtype="bfloat16", remat="full")),
            data=MixtureData(**shape, sources=dict.fromkeys(sources, Part())) if sources else FilesData(**shape),
            optim=OptimConfig(learning_rate=1e-5, steps=1000, warmup=50),
            train=TrainConfig(log_every=10, evaluate_every=200, save_every=200),
        )
    )
