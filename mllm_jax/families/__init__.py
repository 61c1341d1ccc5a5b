"""Published models: one file per family, looked up by the model_type of a config.json.

Each file has sizes(name), from_hf(json), to_hf(config), weights(config), IGNORE (beside buffers and tied heads),
RENAME, and MODULES where layers have other names in transformers' memory than in files, (regular expression,
replacement) pairs; one that sees also INPUTS, the names of its Hugging Face processor's arrays of pictures, and
visuals(config, arrays), what they show, or as a dual encoder pictures(config, arrays). SPEC is what its processor
expects, beside what the config says, rule(config) how it cuts pictures, clip_rule(config) how it reads the frames of
clips, and chat(config) what it expects of chats.
elsewhere(json, names) is the model that has the rest of the weights, where files may hold a part of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mllm_jax.data.pipeline.spec import SEEING, TEXT, ProcessorSpec
from mllm_jax.families.decoders import deepseek, gemma, gemma2, gpt2, internlm2, llama, mistral, opt, phi3, qwen2, qwen3
from mllm_jax.families.towers import clip, dinov2, siglip, siglip2, vision_only
from mllm_jax.families.vlms import (
    internvl,
    internvl_chat,
    llava,
    llava_llama,
    llava_onevision,
    paligemma,
    qwen2_vl,
    qwen3_vl,
)
from mllm_jax.model.vlm import ModelConfig

FAMILIES = {
    "clip": clip,
    "clip_vision_model": vision_only.clip,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "dinov2": dinov2,
    "dinov2_with_registers": dinov2,
    "gemma": gemma,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "internlm2": internlm2,
    "internvl": internvl,
    "internvl_chat": internvl_chat,
    "llama": llama,
    "llava": llava,
    "llava_llama": llava_llama,
    "llava_mistral": llava_llama,
    "llava_next": llava,
    "llava_onevision": llava_onevision,
    "mistral": mistral,
    "opt": opt,
    "paligemma": paligemma,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen2_5_vl": qwen2_vl,
    "qwen2_vl": qwen2_vl,
    "qwen3": qwen3,
    "qwen3_moe": qwen3,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl,
    "siglip": siglip,
    "siglip_vision_model": vision_only.siglip,
    "siglip2": siglip2,
    "siglip2_vision_model": vision_only.siglip2,
}


def kind_of(config: Mapping[str, Any]) -> str | None:
    """The name in FAMILIES that a config.json is of: its model_type."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    # LLaVA's authors and transformers gave one name to two formats
    return "llava_llama" if kind == "llava" and "mm_vision_tower" in config else kind


def spec_for(config: ModelConfig) -> ProcessorSpec:
    """What a model expects of its input, as far as its family and its config say."""
    encoder, decoder = config.encoder, config.decoder
    if encoder is None:
        return TEXT
    attention = None if decoder is None else decoder.attention
    rows = getattr(attention, "rope_theta", None) and getattr(attention, "rope_sections", (0,))[1:]
    family = FAMILIES[config.family]
    return dataclasses.replace(
        getattr(family, "SPEC", SEEING),
        rule=family.rule(config) if hasattr(family, "rule") else None,
        clip_rule=family.clip_rule(config) if hasattr(family, "clip_rule") else None,
        patch=encoder.patch_size,
        temporal_patch=encoder.temporal_patch_size,
        merge=config.merge,
        lead=config.lead,
        shown=config.shown,
        mean=encoder.pixel_mean,
        std=encoder.pixel_std,
        position_rate=config.inputs.position_rate,
        on_a_grid=any(rows or ()),
        prefix=config.prefix,
        **(family.chat(config) if hasattr(family, "chat") else {}),
        mixes=config.inputs.most_tiles > 0,
    )
