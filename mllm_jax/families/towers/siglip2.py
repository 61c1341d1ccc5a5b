"""SigLIP 2 for pictures of any size, NaFlex (arXiv 2502.14786): published sizes, config.json, weight names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mllm_jax.data.pipeline.dual_batches import one_each
from mllm_jax.data.pipeline.hf_inputs import Arrays
from mllm_jax.data.vision.resize import Keep
from mllm_jax.families.towers import dual_encoders, siglip
from mllm_jax.families.towers.in_vlms import NAFLEX
from mllm_jax.families.towers.vision_only import ANY_SIZE, pictures_of_any_size
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.types import DualBatch
from mllm_jax.weights.table import Row

SIZES = tuple(NAFLEX.sizes)


def sizes(name: str) -> DualConfig:
    """The config of a published size: "base-16", "so400m-16"."""
    if name not in NAFLEX.sizes:
        raise ValueError(f"SigLIP 2 (NaFlex) has no size {name!r}; sizes: {', '.join(NAFLEX.sizes)}")
    encoder, text = NAFLEX.sizes[name], siglip.TEXTS[name.partition("-")[0]]
    return siglip.dual(encoder, replace(text, vocab=siglip.GEMMA), encoder.width, "siglip2")


def from_hf(config: Mapping[str, Any]) -> DualConfig:
    """The model that a `config.json` of model_type "siglip2" describes. ValueError for what this model cannot do."""
    return siglip.read(config, NAFLEX)


def to_hf(config: DualConfig) -> dict:
    """The inverse of `from_hf`. Raises ValueError for what a config.json of SigLIP 2 cannot say."""
    return siglip.write(config, NAFLEX, "Siglip2")


INPUTS = ANY_SIZE


def pictures(config: DualConfig, arrays: Arrays) -> DualBatch:
    """Pictures of any size, each in a row of its own that is as long as the processor made it."""
    found = pictures_of_any_size(config, arrays)
    return one_each(found, arrays["pixel_values"].shape[1] if found else 0)


def rule(config: DualConfig) -> Keep:
    """How pictures are resized where no preprocessor_config.json says it: as many patches as there are positions."""
    return Keep(config.encoder.patch_size, config.encoder.position_grid**2)


IGNORE, RENAME = dual_encoders.IGNORE, dual_encoders.RENAME


def weights(config: DualConfig) -> list[Row]:
    """Our names and theirs, for this config; see weights/table.py."""
    return siglip.rows(config, NAFLEX)
