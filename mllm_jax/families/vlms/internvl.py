"""InternVL 2.5 and 3 (arXiv 2412.05271, 2504.10479): InternViT, a pixel-shuffle connector, Qwen2.5 or any decoder.

Tensor names as in the published safetensors files of OpenGVLab's "-hf" models.
"""

from dataclasses import replace

from mllm_jax.common.fields import FieldError, count, inside, number, read, section, word
from mllm_jax.data.pipeline.hf_inputs import Arrays, Supply
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.records.grounding import Grounding
from mllm_jax.data.vision.resize import Stretch
from mllm_jax.data.vision.tiles import Tiles
from mllm_jax.families.base import Family
from mllm_jax.families.decoders import by_model_type, qwen2
from mllm_jax.families.shared.decoder_config import activation_from_hf, activation_to_hf, tied_at_the_top
from mllm_jax.families.shared.hf_images import untiled
from mllm_jax.families.shared.rows import layer_norm, linear
from mllm_jax.families.towers.in_vlms import INTERN
from mllm_jax.families.vlms import llava
from mllm_jax.families.vlms.llava import feature_layers, features_from_hf, features_to_hf
from mllm_jax.model.connectors.pixel_shuffle import PixelShuffleConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds
from mllm_jax.weights.table import Row


def _size(tower: str, decoder: DecoderConfig) -> ModelConfig:
    decoder = replace(decoder, vocab=151674, tie_embeddings=False)
    return ModelConfig(INTERN.sizes[tower], PixelShuffleConfig(), decoder, VisionTokenIds(151667), family="internvl")


SIZES = {
    "3-1b": _size("300m", qwen2.SIZES["2.5-0.5b"]),
    "3-2b": _size("300m", qwen2.SIZES["2.5-1.5b"]),
    "3-8b": _size("300m", qwen2.SIZES["2.5-7b"]),
    "3-14b": _size("300m", qwen2.SIZES["2.5-14b"]),
    "3-38b": _size("6b", qwen2.SIZES["2.5-32b"]),
    "3-78b": _size("6b", qwen2.SIZES["2.5-72b"]),
}


FIELDS = {
    "text_config": section(),
    "vision_config": section(),
    "image_token_id": count(151667, low=0),
    "downsample_ratio": number(0.5, 0.01, 1),
    "projector_hidden_act": word("gelu"),
    "vision_feature_layer": feature_layers(-1),
    "vision_feature_select_strategy": word("default", ("default",)),  # drops the class token
}


def features_of(encoder: VitConfig, layers: list[int]) -> VitConfig:
    """Returns the encoder with the features of these layers, in config.json's numbers. [-1]: its last norm's output."""
    return encoder if layers == [-1] else replace(encoder, features=features_from_hf(layers, encoder.layers))


def merge_of(fields: dict) -> int:
    """Returns the number of patches per side of a visual token."""
    merge = 1 / fields["downsample_ratio"]
    if abs(merge - round(merge)) > 1e-9:
        raise FieldError("downsample_ratio", "must be 1, 1/2, 1/3 and so on.", fields["downsample_ratio"])
    return round(merge)


SPEC = ProcessorSpec(
    grounding=Grounding(
        "[{x1}, {y1}, {x2}, {y2}]", name="<ref>{name}</ref>", boxes="<box>[{boxes}]</box>", between=", "
    ),
    brackets=True,
    image_token="<IMG_CONTEXT>",
    video_token="<video>",
    frame_token="<IMG_CONTEXT>",
    label="Frame{number}: ",
    between="\n",
    fps=1.0,
    min_frames=8,  # bounds from internvl_chat/internvl/train/internvl_chat_finetune.py
    max_frames=32,
    vision_start="<img>",
    vision_end="</img>",
    end_of_turn="<|im_end|>",
    processor_class="InternVLProcessor",
    video_processor_type="InternVLVideoProcessor",
)


class Internvl(Family):
    name = "InternVL"
    architectures = {"internvl": "InternVLForConditionalGeneration"}
    sizes = SIZES
    # Tensor names since transformers 4.52.
    rename = (*llava.RENAME_TEXT, (r"^model\.(?=vision_tower|multi_modal_projector)", ""))
    modules = llava.MODULES
    input_names = ("pixel_values",)
    spec = SPEC

    def from_hf(self, config: dict) -> ModelConfig:
        fields = read(config, FIELDS)
        with inside("vision_config"):
            read(fields["vision_config"], {"model_type": word(INTERN.kind, (INTERN.kind,))})
            encoder = features_of(INTERN.from_hf(fields["vision_config"]), fields["vision_feature_layer"])
        with inside("text_config"):
            decoder = by_model_type.decoder_from_hf({"model_type": "qwen2", **fields["text_config"]})
        return ModelConfig(
            encoder,
            PixelShuffleConfig(merge_of(fields), activation_from_hf(fields["projector_hidden_act"])),
            tied_at_the_top(decoder, config, default=True),
            VisionTokenIds(fields["image_token_id"]),
            family="internvl",
        )

    def fields_to_hf(self, config: ModelConfig) -> dict:
        connector, encoder = config.connector, config.encoder
        return {
            "model_type": "internvl",
            "image_token_id": config.tokens.image,
            "image_seq_length": encoder.position_grid**2 // connector.merge**2,
            "downsample_ratio": 1 / connector.merge,
            "projector_hidden_act": activation_to_hf(connector.activation, "gelu"),
            "vision_feature_layer": features_to_hf(encoder.features) if encoder.features else -1,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": config.decoder.tie_embeddings,
            "text_config": by_model_type.decoder_to_hf(config.decoder),
            "vision_config": INTERN.to_hf(encoder),
        }

    def weights(self, config: ModelConfig) -> list[Row]:
        return [
            *INTERN.rows(config.encoder, "vision_tower."),
            *layer_norm("connector/norm", "multi_modal_projector.layer_norm"),
            *linear("connector/mlp/up", "multi_modal_projector.linear_1", "o i -> i o", ""),
            *linear("connector/mlp/down", "multi_modal_projector.linear_2", "o i -> i o", ""),
            *by_model_type.decoder_weights(config.decoder, "language_model.model", "language_model.lm_head.weight"),
        ]

    def rule(self, config: ModelConfig) -> Tiles:
        return Tiles(config.encoder.side)

    def video_rule(self, config: ModelConfig) -> Stretch:
        return Stretch((config.encoder.side,) * 2)  # each frame is one tile

    def visuals(self, config: ModelConfig, arrays: Arrays) -> Supply:
        """Returns the tiles f[tiles c h w] of images and the frames of videos; each has its own placeholders."""
        return {config.tokens.image: untiled(config, arrays)}
