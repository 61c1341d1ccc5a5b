"""Families of published models by the model_type of config.json; `base.py` defines their interface."""

from collections.abc import Mapping
from typing import Any

from mllm_jax.data.pipeline.spec import TEXT as TEXT_ONLY
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.families.base import Family
from mllm_jax.families.decoders.by_model_type import TEXT
from mllm_jax.families.decoders.deepseek import Deepseek
from mllm_jax.families.towers.clip import Clip
from mllm_jax.families.towers.dinov2 import Dinov2
from mllm_jax.families.towers.siglip import Siglip
from mllm_jax.families.towers.siglip2 import Siglip2
from mllm_jax.families.towers.vision_only import ClipTower, Siglip2Tower, SiglipTower
from mllm_jax.families.vlms.blip2 import Blip2
from mllm_jax.families.vlms.instructblip import Instructblip
from mllm_jax.families.vlms.internvl import Internvl
from mllm_jax.families.vlms.internvl_chat import InternvlChat
from mllm_jax.families.vlms.llava import Llava
from mllm_jax.families.vlms.llava_llama import LlavaLlama
from mllm_jax.families.vlms.llava_onevision import LlavaOnevision
from mllm_jax.families.vlms.paligemma import Paligemma
from mllm_jax.families.vlms.qwen2_vl import Qwen2Vl
from mllm_jax.families.vlms.qwen3_vl import Qwen3Vl
from mllm_jax.model.vlm import ModelConfig

_ALL = (
    *TEXT.values(),
    Deepseek(),
    Clip(),
    ClipTower(),
    Dinov2(),
    Siglip(),
    SiglipTower(),
    Siglip2(),
    Siglip2Tower(),
    Blip2(),
    Instructblip(),
    Internvl(),
    InternvlChat(),
    Llava(),
    LlavaLlama(),
    LlavaOnevision(),
    Paligemma(),
    Qwen2Vl(),
    Qwen3Vl(),
)
FAMILIES: dict[str, Family] = dict(
    sorted({model_type: family for family in _ALL for model_type in family.architectures}.items())
)


def kind_of(config: Mapping[str, Any]) -> str | None:
    """Returns the name of a config.json's family in FAMILIES: its model_type. None: it has none."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    # LLaVA's authors and transformers both use "llava", for different formats.
    return "llava_llama" if kind == "llava" and "mm_vision_tower" in config else kind


def spec_for(config: ModelConfig) -> ProcessorSpec:
    """Returns the processor spec of a model: settings of its inputs that its family and config determine."""
    return TEXT_ONLY if config.encoder is None else FAMILIES[config.family].processor_spec(config)
