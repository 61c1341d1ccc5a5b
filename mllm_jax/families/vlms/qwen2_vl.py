"""Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923): published sizes, config.json, weight table.

Tensor names as in the published safetensors files.
"""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np

from mllm_jax.common.fields import (
    FieldError,
    count,
    inside,
    layers,
    listed,
    nullable,
    number,
    positive,
    read,
    section,
    word,
)
from mllm_jax.data.pipeline.hf_inputs import Arrays, Supply
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.records.grounding import QWEN3_VL, Grounding
from mllm_jax.data.vision.positions import patch_positions
from mllm_jax.families.base import Family
from mllm_jax.families.decoders import qwen2
from mllm_jax.families.decoders.by_model_type import TEXT
from mllm_jax.families.shared import rows
from mllm_jax.families.shared.decoder_config import tied_at_either
from mllm_jax.families.shared.hf_images import one_by_one, read_videos
from mllm_jax.families.shared.rows import gated_mlp, layer_norm, linear
from mllm_jax.families.towers.in_vlms import CLIP_PIXELS
from mllm_jax.families.towers.tower import ACTIVATIONS, joint_attention, plain_mlp
from mllm_jax.families.vlms.qwen3_vl import (
    TOKEN_FIELDS,
    TOKENS,
    VISION_FIELDS,
    encoder_fields,
    tokens_of,
    tokens_to_hf,
    vision_to_hf,
)
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import InputRules, ModelConfig
from mllm_jax.weights.table import Row

# Patches have rotary positions only, no position embeddings.
_QWEN2 = VitConfig(
    1280, 32, 16, 5120, patch_size=14, patch_bias=False, position_grid=0, activation="quick_gelu", **CLIP_PIXELS
)
_QWEN2_5 = replace(_QWEN2, mlp=3420, norm="rms", gated=True, activation="silu", window=8, whole=(7, 15, 23, 31))
_QWEN2_5_LARGE = replace(_QWEN2_5, mlp=3456)


def _decoder(name: str) -> DecoderConfig:
    """Returns Qwen2's decoder with M-RoPE."""
    text = qwen2.SIZES[name]
    attention = replace(text.attention, rope_sections=(16, 24, 24), rope_layout="chunked")
    return replace(text, attention=attention, norm_eps=1e-6)


def _size(encoder: VitConfig, name: str) -> ModelConfig:
    return _model(encoder, 2, _decoder(name), TOKENS, position_rate=2.0 if encoder.gated else 0.0)


def _model(encoder: VitConfig, merge: int, decoder: DecoderConfig, tokens, position_rate: float) -> ModelConfig:
    connector = PatchMergerConfig(merge, norm=encoder.norm)
    return ModelConfig(
        encoder, connector, decoder, tokens, family=_kind(encoder), inputs=InputRules(position_rate=position_rate)
    )


def _kind(encoder: VitConfig) -> str:
    return "qwen2_5_vl" if encoder.gated else "qwen2_vl"


SIZES = {
    "2b": _size(_QWEN2, "1.5b"),
    "7b": _size(_QWEN2, "7b"),
    "72b": _size(_QWEN2, "72b"),
    "2.5-3b": _size(_QWEN2_5, "2.5-3b"),
    "2.5-7b": _size(_QWEN2_5, "2.5-7b"),
    "2.5-32b": _size(_QWEN2_5_LARGE, "2.5-32b"),
    "2.5-72b": _size(_QWEN2_5_LARGE, "2.5-72b"),
}


_COMMON = VISION_FIELDS | {"depth": layers(32), "patch_size": count(14), "hidden_size": count(3584)}
FIRST_FIELDS = _COMMON | {
    "embed_dim": count(1280),
    "mlp_ratio": positive(4),
    "hidden_act": word("quick_gelu", ACTIVATIONS),
}
SECOND_FIELDS = _COMMON | {
    "intermediate_size": count(3420),
    "out_hidden_size": count(3584),
    "window_size": count(112),
    "fullatt_block_indexes": listed(count(low=0), (7, 15, 23, 31)),
    "tokens_per_second": number(4, low=0),
    "hidden_act": word("silu", ACTIVATIONS),
}


def _qwen2_encoder(vision: dict) -> VitConfig:
    return replace(_QWEN2, mlp=int(vision["embed_dim"] * vision["mlp_ratio"]), **encoder_fields(vision, "embed_dim"))


def _qwen2_5_encoder(vision: dict) -> VitConfig:
    merge, full_layers = vision["spatial_merge_size"], vision["fullatt_block_indexes"]
    window = vision["window_size"] // merge // vision["patch_size"] * merge
    if invalid := [layer for layer in full_layers if layer >= vision["depth"]]:
        raise FieldError("fullatt_block_indexes", f"must be below depth={vision['depth']}.", invalid)
    if not window:
        raise FieldError(
            "window_size", "must be at least patch_size * spatial_merge_size, one visual token.", vision["window_size"]
        )
    return replace(
        _QWEN2_5,
        mlp=vision["intermediate_size"],
        window=window,
        whole=tuple(full_layers),
        **encoder_fields(vision, "hidden_size"),
    )


PIXELS = replace(QWEN3_VL, scale=None)  # Qwen2.5-VL's coordinates are pixels of the resized image
SPEC = ProcessorSpec(
    grounding=Grounding(  # section 2.2 of the paper: coordinates in [0, 1000)
        "<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>",
        "<|box_start|>({x},{y})<|box_end|>",
        largest=999,
        name="<|object_ref_start|>{name}<|object_ref_end|>",
    ),
    min_pixels=56**2,
    max_pixels=12845056,
    video_min_pixels=128 * 28**2,
    video_max_pixels=768 * 28**2,
    label=None,
    processor_class="Qwen2VLProcessor",
    video_processor_type="Qwen2VLVideoProcessor",
)


_BLOCK = "visual.blocks.{n}"


class Qwen2Vl(Family):
    name = "Qwen2-VL"
    architectures = {
        "qwen2_vl": "Qwen2VLForConditionalGeneration",
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    }
    sizes = SIZES
    # Tensor names since transformers 4.52, which moved the encoder and the decoder under `model.`.
    rename = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."), (r"^model\.model\.", "model."))
    modules = ((r"^visual\.", "model.visual."), (r"^model\.(?=layers|embed_tokens|norm)", "model.language_model."))
    input_names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    spec = SPEC

    def from_hf(self, config: dict) -> ModelConfig:
        second = config["model_type"] == "qwen2_5_vl"
        fields = read(config, {"vision_config": section(), "text_config": nullable(section(None))} | TOKEN_FIELDS)
        with inside("vision_config"):
            vision = read(fields["vision_config"], SECOND_FIELDS if second else FIRST_FIELDS)
            encoder = _qwen2_5_encoder(vision) if second else _qwen2_encoder(vision)
        text = config if fields["text_config"] is None else fields["text_config"]  # old files have no text_config
        with nullcontext() if fields["text_config"] is None else inside("text_config"):
            decoder = tied_at_either(qwen2.seeing_decoder_from_hf(text), config)
        out = "out_hidden_size" if second else "hidden_size"
        if vision[out] != decoder.width:
            raise FieldError(f"vision_config.{out}", f"must be the decoder's hidden_size={decoder.width}.", vision[out])
        rate = float(vision["tokens_per_second"]) if second else 0.0
        return _model(encoder, vision["spatial_merge_size"], decoder, tokens_of(fields), rate)

    def fields_to_hf(self, config: ModelConfig) -> dict:
        encoder, decoder, kind = config.encoder, config.decoder, _kind(config.encoder)
        vision = {
            "model_type": f"{kind}_vision",
            **vision_to_hf(encoder, config.merge),
        }
        if encoder.gated:
            vision |= {
                "hidden_size": encoder.width,
                "out_hidden_size": decoder.width,
                "intermediate_size": encoder.mlp,
                "window_size": encoder.window * encoder.patch_size,
                "fullatt_block_indexes": list(encoder.whole),
                "tokens_per_second": int(config.inputs.position_rate),
            }
        else:
            ratio = encoder.mlp // encoder.width
            vision |= {"embed_dim": encoder.width, "hidden_size": decoder.width, "mlp_ratio": ratio}
        return {
            "model_type": kind,
            "tie_word_embeddings": decoder.tie_embeddings,
            **tokens_to_hf(config.tokens),
            "text_config": {"model_type": f"{kind}_text", **TEXT["qwen2"].decoder_to_hf(decoder)},
            "vision_config": vision,
        }

    def weights(self, config: ModelConfig) -> list[Row]:
        encoder = config.encoder
        pixels = {"c": encoder.channels, "t": encoder.temporal_patch_size, "y": encoder.patch_size}
        plain = plain_mlp(f"{_BLOCK}.mlp.fc1", f"{_BLOCK}.mlp.fc2")
        return [
            Row("encoder/patch_embed/w", "visual.patch_embed.proj.weight", "d c t y x -> (c t y x) d", pixels),
            *layer_norm("encoder/layers/norm1", f"{_BLOCK}.norm1"),
            *layer_norm("encoder/layers/norm2", f"{_BLOCK}.norm2"),
            *joint_attention(f"{_BLOCK}.attn.qkv"),
            *linear("encoder/layers/attention/out", f"{_BLOCK}.attn.proj", "d (n h) -> n h d", ""),
            *(gated_mlp("encoder/layers/mlp", f"{_BLOCK}.mlp") if encoder.gated else plain),
            *layer_norm("connector/main/norm", "visual.merger.ln_q"),
            *linear("connector/main/mlp/up", "visual.merger.mlp.0", "f d -> d f", ""),
            *linear("connector/main/mlp/down", "visual.merger.mlp.2", "d f -> f d", ""),
            *rows.decoder(config.decoder),
        ]

    def processor_spec(self, config: ModelConfig) -> ProcessorSpec:
        spec = super().processor_spec(config)
        return replace(spec, grounding=PIXELS) if config.encoder.gated else spec

    def visuals(self, config: ModelConfig, arrays: Arrays) -> Supply:
        """Returns the images and videos. All temporal patches of a video share one run of placeholders."""
        images, videos = (read_videos(arrays, *self.input_names[i : i + 2]) for i in (0, 2))
        seconds = arrays.get("second_per_grid_ts", np.ones(len(videos)))
        if len(seconds) != len(videos):
            raise ValueError(
                f"second_per_grid_ts: has {len(seconds)} values for {len(videos)} videos. Pass one per video."
            )
        times = [patch_positions(len(video), config.inputs.position_rate, step) for video, step in zip(videos, seconds)]
        return {
            config.tokens.image: [one_by_one(patches, config.merge) for patches in images],
            config.tokens.video: [one_by_one(video, config.merge, steps) for video, steps in zip(videos, times)],
        }
