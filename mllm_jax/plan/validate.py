"""Checks that no mesh can satisfy: rows longer than the model's positions, weights of another model."""

import json
from pathlib import Path

from mllm_jax.common.config import ConfigError
from mllm_jax.common.trees import differences, in_words
from mllm_jax.common.workdir import is_run
from mllm_jax.families import FAMILIES, kind_of
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.train.runs.config import Run

PARTS = ("encoder", "connector", "decoder")


def check_run(run: Run) -> None:
    """Raises ConfigError, with the fix, if a run cannot be trained on any devices."""
    if not isinstance(run.model, ModelConfig):
        raise ConfigError("config.model is a dual encoder; plans are made of models that answer")
    longest = _positions(run)
    if run.data.tokens > longest:
        raise ConfigError(
            f"config.data.tokens={run.data.tokens} is longer than the {longest:.0f} positions of the model; "
            "lower it, or choose a model for longer rows"
        )
    if not run.init or is_run(run.init):
        return
    folder = Path(run.init)
    if not folder.is_dir():
        if folder.is_absolute() or run.init.startswith("."):  # the others are names of the hub
            raise ConfigError(f"config.init: there is no folder {run.init}")
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(f"config.init: {run.init} has no config.json; name a folder in Hugging Face's format")
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = FAMILIES.get(kind_of(stated))
    if family is None:
        raise ConfigError(f"config.init: {run.init} is of model_type {stated.get('model_type')!r}, not of this model")
    try:
        published = family.from_hf(stated)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"config.init: {run.init}/config.json cannot be read: {error}") from error
    other = [
        f"{path} is {in_words(theirs)} there and {in_words(ours)} here"
        for part in PARTS
        for path, theirs, ours in differences(getattr(published, part), getattr(run.model, part), path=part)
    ]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise ConfigError(
            f"config.init: {run.init} is another model than config.model: {'; '.join(other[:3])}{more}; "
            "name the weights of this size, or choose the size of these weights"
        )


def _positions(run: Run) -> float:
    """Infinity for a model of one's own, which no published config describes."""
    try:
        stated = FAMILIES[run.model.family].to_hf(run.model)
    except (KeyError, ValueError):
        return float("inf")
    return stated.get("text_config", stated).get("max_position_embeddings", float("inf"))
