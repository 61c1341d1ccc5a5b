"""Finds errors of a run that no mesh can fix: rows longer than the model's positions, or weights of another model."""

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
    """Raises ConfigError if a run cannot be planned, or cannot be trained on any devices."""
    if not isinstance(run.model, ModelConfig):
        raise ConfigError("config.model is a dual encoder, which cannot be planned. Choose a language model.")
    longest = _positions(run)
    if run.data.tokens > longest:
        raise ConfigError(
            f"config.data.tokens={run.data.tokens} is longer than the {longest:.0f} positions of the model. Lower it, "
            "or choose a model with more positions."
        )
    if not run.init or is_run(run.init):
        return
    folder = Path(run.init)
    if not folder.is_dir():
        if folder.is_absolute() or run.init.startswith("."):  # other values are names on the Hugging Face Hub
            raise ConfigError(f"config.init={run.init}: there is no such folder. Set it to an existing one.")
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(f"config.init={run.init} has no config.json. Choose a folder in Hugging Face's format.")
    hf_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = FAMILIES.get(kind_of(hf_config))
    if family is None:
        raise ConfigError(
            f"config.init={run.init} is of model_type {hf_config.get('model_type')!r}, not of this model. Choose "
            "weights of this model."
        )
    try:
        published = family.from_hf(hf_config)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"config.init={run.init}: its config.json cannot be read: {error}") from error
    other = [
        f"{path} is {in_words(theirs)} there and {in_words(ours)} here"
        for part in PARTS
        for path, theirs, ours in differences(getattr(published, part), getattr(run.model, part), path=part)
    ]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise ConfigError(
            f"config.init={run.init} is another model than config.model: {'; '.join(other[:3])}{more}. "
            "Choose the weights of this size, or set config.model to the size of these weights."
        )


def _positions(run: Run) -> float:
    """Returns the number of positions in the published config. Infinity for a model without one."""
    try:
        hf_config = FAMILIES[run.model.family].to_hf(run.model)
    except (KeyError, ValueError):
        return float("inf")
    return hf_config.get("text_config", hf_config).get("max_position_embeddings", float("inf"))
