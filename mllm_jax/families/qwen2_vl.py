"""Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923): published sizes, config.json both ways, weight names.

Tensor names as in the published safetensors files.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from mllm_jax.connectors.patch_merger import PatchMergerConfig
from mllm_jax.data.grounding import QWEN3_VL, Grounding
from mllm_jax.data.hf_inputs import Arrays, Supply
from mllm_jax.data.positions import patch_positions
from mllm_jax.data.spec import ProcessorSpec
from mllm_jax.decoder import DecoderConfig
from mllm_jax.encoders.vit import VitConfig
from mllm_jax.families import qwen2
from mllm_jax.families.decoders import tied_at_either
from mllm_jax.families.pictures import one_by_one, read_clips
from mllm_jax.families.qwen3_vl import TOKENS
from mllm_jax.families.rows import gated_mlp, layer_norm, linear
from mllm_jax.families.towers import ACTIVATIONS, CLIP_PIXELS
from mllm_jax.model import InputRules, ModelConfig, VisionTokenIds
from mllm_jax.weights.table import Row

# Rotary positions alone say where a patch stands.
_FIRST = VitConfig(
    1280, 32, 16, 5120, patch_size=14, patch_bias=False, position_grid=0, activation="quick_gelu", **CLIP_PIXELS
)
_SECOND = replace(_FIRST, mlp=3420, norm="rms", gated=True, activation="silu", window=8, whole=(7, 15, 23, 31))
_WIDER = replace(_SECOND, mlp=3456)


def _decoder(name: str, **more) -> DecoderConfig:
    """Qwen2's decoder with the rotary positions of pictures."""
    text = qwen2.SIZES[name]
    attention = replace(text.attention, rope_sections=(16, 24, 24), rope_layout="chunked")
    return replace(text, attention=attention, norm_eps=1e-6, **more)


SIZES = {
    "2b": (_FIRST, _decoder("1.5b")),
    "7b": (_FIRST, _decoder("7b")),
    "72b": (_FIRST, _decoder("72b")),
    "2.5-3b": (_SECOND, _decoder("2.5-3b")),
    "2.5-7b": (_SECOND, _decoder("2.5-7b")),
    "2.5-32b": (_WIDER, _decoder("2.5-32b")),
    "2.5-72b": (_WIDER, _decoder("2.5-72b")),
}
ARCHITECTURES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}


def sizes(name: str) -> ModelConfig:
    """The config of a published size: Qwen2-VL's "2b", "7b", "72b"; Qwen2.5-VL's "2.5-3b", "2.5-7b", "2.5-32b",
    "2.5-72b"."""
    if name not in SIZES:
        raise ValueError(f"Qwen2-VL has no size {name!r}; sizes: {', '.join(SIZES)}")
    encoder, decoder = SIZES[name]
    return _model(encoder, 2, decoder, TOKENS, position_rate=2.0 if encoder.gated else 0.0)


def _model(encoder: VitConfig, merge: int, decoder: DecoderConfig, tokens, position_rate: float) -> ModelConfig:
    connector = PatchMergerConfig(merge, norm=encoder.norm)
    return ModelConfig(
        encoder, connector, decoder, tokens, family=_kind(encoder), inputs=InputRules(position_rate=position_rate)
    )


def _kind(encoder: VitConfig) -> str:
    return "qwen2_5_vl" if encoder.gated else "qwen2_vl"


def from_hf(config: dict) -> ModelConfig:
    """The model that a `config.json` of model_type "qwen2_vl" or "qwen2_5_vl" describes.

    Raises ValueError for what this model cannot do.
    """
    vision, text = config["vision_config"], config.get("text_config") or config  # old files have one level
    decoder = tied_at_either(qwen2.decoder_from_hf(text), config)
    merge, second = vision.get("spatial_merge_size", 2), config["model_type"] == "qwen2_5_vl"
    tokens = VisionTokenIds(
        image=config["image_token_id"],
        video=config["video_token_id"],
        start=config["vision_start_token_id"],
        end=config["vision_end_token_id"],
    )
    encoder = _encoder_from_hf(vision, _SECOND if second else _FIRST, merge)
    out = vision["out_hidden_size" if second else "hidden_size"]
    if out != decoder.width:
        raise ValueError(f"the vision tower's output of {out} must be as wide as the decoder, {decoder.width}")
    return _model(encoder, merge, decoder, tokens, float(vision.get("tokens_per_second", 4)) if second else 0.0)


def _encoder_from_hf(vision: dict, base: VitConfig, merge: int) -> VitConfig:
    activation = vision.get("hidden_act", "silu" if base.gated else "quick_gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"vision_config.hidden_act must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    width = vision["hidden_size"] if base.gated else vision.get("embed_dim", base.width)
    patch, window = vision.get("patch_size", base.patch_size), {}
    if base.gated:
        side = vision.get("window_size", 112) // merge // patch * merge
        window = {"window": side, "whole": tuple(vision.get("fullatt_block_indexes", base.whole))}
    return replace(
        base,
        width=width,
        layers=vision.get("depth", base.layers),
        heads=vision.get("num_heads", base.heads),
        mlp=vision.get("intermediate_size", base.mlp) if base.gated else int(width * vision.get("mlp_ratio", 4)),
        patch_size=patch,
        temporal_patch_size=vision.get("temporal_patch_size", base.temporal_patch_size),
        channels=vision.get("in_channels", base.channels),
        activation=ACTIVATIONS[activation],
        **window,
    )


def to_hf(config: ModelConfig) -> dict:
    """The inverse of `from_hf`: what transformers needs to build the same model.

    Raises ValueError for a model that differs from Qwen2-VL and Qwen2.5-VL in what a config.json does not say.
    """
    encoder, decoder, kind = config.encoder, config.decoder, _kind(config.encoder)
    vision = {
        "model_type": f"{kind}_vision",
        "depth": encoder.layers,
        "num_heads": encoder.heads,
        "patch_size": encoder.patch_size,
        "temporal_patch_size": encoder.temporal_patch_size,
        "in_channels": encoder.channels,
        "hidden_act": next(name for name, ours in ACTIVATIONS.items() if ours == encoder.activation),
        "spatial_merge_size": config.merge,
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
    written = {
        "architectures": [f"{ARCHITECTURES[kind]}ForConditionalGeneration"],
        "model_type": kind,
        "tie_word_embeddings": decoder.tie_embeddings,
        "image_token_id": config.tokens.image,
        "video_token_id": config.tokens.video,
        "vision_start_token_id": config.tokens.start,
        "vision_end_token_id": config.tokens.end,
        "text_config": {"model_type": f"{kind}_text", **qwen2.decoder_to_hf(decoder)},
        "vision_config": vision,
    }
    understood = from_hf(written)
    for part in ("encoder", "connector", "decoder", "inputs"):
        if (reads := getattr(understood, part)) != (own := getattr(config, part)):
            raise ValueError(f"Qwen2-VL's config.json cannot say all of this {part}: {own} would be read as {reads}")
    return written


PIXELS = replace(QWEN3_VL, scale=None)  # Qwen2.5-VL's numbers are pixels of the image as it is read
SPEC = ProcessorSpec(
    grounding=Grounding(  # section 2.2 of the paper: numbers in [0, 1000)
        "<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>",
        "<|box_start|>({x},{y})<|box_end|>",
        largest=999,
        name="<|object_ref_start|>{name}<|object_ref_end|>",
    ),
    min_pixels=56**2,
    max_pixels=12845056,
    clip_min_pixels=128 * 28**2,
    clip_max_pixels=768 * 28**2,
    label=None,
    processor_class="Qwen2VLProcessor",
    video_processor_type="Qwen2VLVideoProcessor",
)
INPUTS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")


def chat(config: ModelConfig) -> dict[str, Any]:
    """What a processor expects of chats."""
    return {"grounding": PIXELS} if config.encoder.gated else {}


def visuals(config: ModelConfig, arrays: Arrays) -> Supply:
    """Pictures and clips; a clip is one run of placeholders, whatever its number of temporal patches."""
    pictures, clips = read_clips(arrays, *INPUTS[:2]), read_clips(arrays, *INPUTS[2:4])
    seconds = arrays.get("second_per_grid_ts", np.ones(len(clips)))
    if len(seconds) != len(clips):
        raise ValueError(f"second_per_grid_ts has {len(seconds)} values for {len(clips)} clips")
    times = [patch_positions(len(clip), config.inputs.position_rate, step) for clip, step in zip(clips, seconds)]
    return {
        config.tokens.image: [one_by_one(patches, config.merge) for patches in pictures],
        config.tokens.video: [one_by_one(clip, config.merge, steps) for clip, steps in zip(clips, times)],
    }


_BLOCK = "visual.blocks.{n}"


def weights(config: ModelConfig) -> list[Row]:
    """Our names and theirs, for this config; see weights/table.py."""
    encoder = config.encoder
    pixels = {"c": encoder.channels, "t": encoder.temporal_patch_size, "y": encoder.patch_size}
    plain = [
        *linear("encoder/layers/mlp/up", f"{_BLOCK}.mlp.fc1", "f d -> d f", ""),
        *linear("encoder/layers/mlp/down", f"{_BLOCK}.mlp.fc2", "d f -> f d", ""),
    ]
    return [
        Row("encoder/patch_embed/w", "visual.patch_embed.proj.weight", "d c t y x -> (c t y x) d", pixels),
        *layer_norm("encoder/layers/norm1", f"{_BLOCK}.norm1"),
        *layer_norm("encoder/layers/norm2", f"{_BLOCK}.norm2"),
        *linear("encoder/layers/attention/qkv", f"{_BLOCK}.attn.qkv", "(c n h) d -> c d n h", "(c n h) -> c n h"),
        *linear("encoder/layers/attention/out", f"{_BLOCK}.attn.proj", "d (n h) -> n h d", ""),
        *(gated_mlp("encoder/layers/mlp", f"{_BLOCK}.mlp") if encoder.gated else plain),
        *layer_norm("connector/main/norm", "visual.merger.ln_q"),
        *linear("connector/main/mlp/up", "visual.merger.mlp.0", "f d -> d f", ""),
        *linear("connector/main/mlp/down", "visual.merger.mlp.2", "d f -> f d", ""),
        *qwen2.decoder_weights(config.decoder),
    ]


IGNORE = qwen2.IGNORE
# Names since transformers 4.52 moved both towers under `model.`.
RENAME = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."), (r"^model\.model\.", "model."))
MODULES = ((r"^visual\.", "model.visual."), (r"^model\.(?=layers|embed_tokens|norm)", "model.language_model."))
