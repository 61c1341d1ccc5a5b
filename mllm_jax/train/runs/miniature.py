"""Miniatures of recipes: the same stages, frozen weights, schedules and losses with a tiny model and 8 steps.

    python -m mllm_jax.train --config configs/recipes/llava_1_5.py:tiny --workdir DIR

They train on the embedded scenes, or on the files that the recipe's data settings name.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from ml_collections import ConfigDict

from mllm_jax.common.config import ConfigError
from mllm_jax.common.errors import suggestion
from mllm_jax.data.synthetic.scenes import SCENES, scenes_vision_ids
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.moe.layer import MoeConfig
from mllm_jax.train.runs.config import PARTS_OF_STAGES, Run, Stage, run_config
from mllm_jax.train.runs.data_files import EMBEDDED, FilesData, MixtureData

STEPS = 8  # maximum number of steps of a stage
RANK = 4  # maximum rank of adapters
QUESTIONS = f"{EMBEDDED}color"


def miniature(run: Run) -> Run:
    """Returns the run with a model of 0.1 million random weights and at most 8 steps per stage.

    The model has an encoder, a connector and a decoder, with experts if that of `run` has them. Its tokenizer encodes
    any text as bytes. Every data set becomes the embedded scenes, unless its path is set again. Optimizers, trained
    weights and losses stay those of the recipe.
    """
    stages = {name: _stage(stage) for name, stage in run.stages.items()}
    tiny = replace(run, model=_model(run.model.decoder.moe is not None), init="", processor=SCENES, stages=stages)
    return replace(tiny, **{part: getattr(_stage(tiny), part) for part in PARTS_OF_STAGES})


def _stage(run: Run | Stage) -> Stage:
    optim = run.optim and replace(
        run.optim, steps=min(STEPS, run.optim.steps or STEPS), warmup=min(STEPS // 4, run.optim.warmup)
    )
    lora = run.lora
    if lora and lora.rank > RANK:
        lora = replace(lora, rank=RANK, alpha=lora.alpha * RANK / lora.rank)
    train = run.train and replace(
        run.train, loss_chunk=64, log_every=1, evaluate_every=0, save_every=0, num_eval_examples=8, grad_accum_steps=1
    )
    mesh = run.mesh and {"fsdp": -1}
    return Stage(
        after=getattr(run, "after", None),
        algorithm=run.algorithm,
        data=run.data and _data(run.data),
        optim=optim,
        lora=lora,
        train=train,
        mesh=mesh,
    )


def _data(data: FilesData | MixtureData) -> FilesData | MixtureData:
    data = replace(data, batch=8, tokens=512, patch_rows=2, patches_per_row=256, min_pixels=256)
    if isinstance(data, FilesData):
        return replace(data, path=QUESTIONS)
    return replace(data, sources={name: replace(part, path=QUESTIONS) for name, part in data.sources.items()})


def _model(experts: bool) -> ModelConfig:
    attention = AttentionConfig(heads=2, kv_heads=2, head_dim=16, rope_theta=10_000.0, rope_sections=(4, 2, 2))
    moe = MoeConfig(experts=4, top_k=2, mlp=16) if experts else None
    return ModelConfig(
        encoder=VitConfig(width=32, layers=1, heads=2, mlp=32, patch_size=8, position_grid=8, deepstack_layers=(0,)),
        connector=PatchMergerConfig(merge=2),
        decoder=DecoderConfig(vocab=384, width=32, layers=2, attention=attention, mlp=32, moe=moe),
        tokens=VisionTokenIds(*scenes_vision_ids()),
    )


def sized(file: str, size: str, sizes: Iterable[str], recipe: Callable[[str], Run], smallest: str) -> ConfigDict:
    """Returns the config of a recipe in one of its sizes, or the miniature of `smallest` if `size` is "tiny".

    Args:
      file: file of the recipe, for errors. recipe: returns the run of a size.
    Raises:
      ConfigError: there is no such size.
    """
    names = (*sizes, "tiny")
    if size not in names:
        raise ConfigError(f"configs/recipes/{Path(file).name} has no size {size!r}; {suggestion(size, names)}")
    return run_config(miniature(recipe(smallest)) if size == "tiny" else recipe(size))
