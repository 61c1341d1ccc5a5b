"""LLaVA 1.5 (arXiv 2310.03744) and LLaVA-NeXT: a CLIP or SigLIP tower, an MLP connector, any decoder.

Tensor names as in the published safetensors files of llava-hf.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mllm_jax.common.fields import (
    MOST_LAYERS,
    Field,
    FieldError,
    Json,
    count,
    inside,
    listed,
    nullable,
    only,
    read,
    section,
    word,
)
from mllm_jax.data.pipeline.hf_inputs import Arrays, Supply
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.vision.resize import Crop, Square, mean_color
from mllm_jax.data.vision.tiles import AnyRes
from mllm_jax.families.base import Family
from mllm_jax.families.decoders import by_model_type, llama, mistral, qwen2
from mllm_jax.families.shared.decoder_config import (
    activation_from_hf,
    activation_to_hf,
    tied_at_either,
    tied_at_the_top,
)
from mllm_jax.families.shared.hf_images import counted_like_text, cut, untiled
from mllm_jax.families.shared.rows import linear
from mllm_jax.families.towers.in_vlms import CLIP, part_to_hf, tower_for, tower_of
from mllm_jax.model.connectors.mlp import MlpConnectorConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.vlm import InputRules, ModelConfig, VisionTokenIds
from mllm_jax.types import VisionSpan
from mllm_jax.weights.table import Row

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_TOWER = replace(CLIP.sizes["l14-336"], features=(-2,))


def _llava(decoder: DecoderConfig) -> ModelConfig:
    decoder = replace(decoder, vocab=32064)
    return ModelConfig(_TOWER, MlpConnectorConfig(), decoder, VisionTokenIds(32000), family="llava")


def _llava_next(decoder: DecoderConfig, vocab: int, image: int) -> ModelConfig:
    decoder = replace(decoder, vocab=vocab)
    return ModelConfig(
        _TOWER,
        MlpConnectorConfig(newline=True),
        decoder,
        VisionTokenIds(image),
        family="llava_next",
        inputs=InputRules(pinpoints=PINPOINTS),
    )


SIZES = {
    "1.5-7b": _llava(llama.SIZES["vicuna-7b"]),
    "1.5-13b": _llava(llama.SIZES["vicuna-13b"]),
    "next-vicuna-7b": _llava_next(llama.SIZES["vicuna-7b"], 32064, 32000),
    "next-vicuna-13b": _llava_next(llama.SIZES["vicuna-13b"], 32064, 32000),
    "next-mistral-7b": _llava_next(mistral.SIZES["7b-v0.2"], 32064, 32000),
    "next-34b": _llava_next(llama.SIZES["yi-34b"], 64064, 64000),
    "next-llama3-8b": _llava_next(llama.SIZES["3-8b"], 128320, 128256),
    "next-72b": _llava_next(qwen2.SIZES["1.5-72b"], 152064, 151646),
    "next-110b": _llava_next(qwen2.SIZES["1.5-110b"], 152064, 151646),
}


def feature_layers(*usual: int) -> Field:
    """Returns the field of one or several layer numbers, as `features_from_hf` reads them."""
    return listed(count(low=-MOST_LAYERS, high=MOST_LAYERS), list(usual), lone=True)


GRID = listed(listed(count()), None)  # image sizes in pixels
FIELDS = {
    "text_config": section(),
    "vision_config": section(),
    "image_token_id": count(None, low=0),  # another name of image_token_index
    "image_token_index": count(32000, low=0),
    "projector_hidden_act": word("gelu"),
    "vision_feature_select_strategy": word("default", ("default", "full")),
    "vision_feature_layer": feature_layers(-2),
    "multimodal_projector_bias": only(True),
    "image_grid_pinpoints": nullable(GRID),
}


def image_token(fields: Json) -> int:
    """Returns the id of the image token, from either of its two names."""
    return fields["image_token_index"] if fields["image_token_id"] is None else fields["image_token_id"]


def pinpoints_from_hf(sizes: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    if invalid := [size for size in sizes if len(size) != 2]:
        raise FieldError("image_grid_pinpoints", "must be pairs of numbers.", invalid[0])
    return tuple((first, second) for first, second in sizes)


def features_from_hf(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Returns the encoder's `features` from transformers' layer numbers.

    Theirs count the embeddings as layer 0, so layer 1 is our 0; negative numbers are equal.
    """
    if not layers or any(layer == 0 or abs(layer) > depth for layer in layers):
        raise FieldError("vision_feature_layer", f"must be from 1 to {depth}, or from -{depth} to -1.", layers)
    return tuple(layer - 1 if layer > 0 else layer for layer in layers)


def features_to_hf(features: tuple[int, ...]) -> int | list[int]:
    layers = [layer + 1 if layer >= 0 else layer for layer in features]
    return layers[0] if len(layers) == 1 else layers


SPEC = ProcessorSpec(
    grounding=None,
    image_token="<image>",
    video_token=None,
    vision_start=None,
    vision_end=None,
    end_of_turn=None,
    processor_class="LlavaProcessor",
    video_processor_type=None,
)


# Tensor names since transformers 4.52.
RENAME_TEXT = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^language_model\.model\.model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
RENAME = (
    *RENAME_TEXT,
    (r"^model\.(?=vision_tower|multi_modal_projector|image_newline)", ""),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
MODULES = (
    (r"^language_model\.lm_head", "lm_head"),
    (r"^language_model\.(model\.)?", "model.language_model."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^(?=vision_tower|multi_modal_projector|image_newline)", "model."),
)


class Llava(Family):
    name = "LLaVA"
    architectures = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
    sizes = SIZES
    rename = RENAME
    modules = MODULES
    input_names = ("pixel_values", "image_sizes")
    spec = SPEC

    def from_hf(self, config: Json) -> ModelConfig:
        fields = read(config, FIELDS)
        with inside("vision_config"):
            vision = {"model_type": CLIP.kind, **fields["vision_config"]}
            encoder = tower_for(vision).from_hf(vision)
        encoder = replace(encoder, features=features_from_hf(fields["vision_feature_layer"], encoder.layers))
        strategy = fields["vision_feature_select_strategy"]
        if strategy == "default" and encoder.num_prefix_tokens != 1:  # "default" drops the first feature
            raise FieldError("vision_feature_select_strategy", "needs a class token and no registers.", strategy)
        newline = config["model_type"] == "llava_next"
        with inside("text_config"):
            decoder = by_model_type.decoder_from_hf({"model_type": "llama", **fields["text_config"]})
        tied = tied_at_the_top if newline else tied_at_either
        return ModelConfig(
            encoder,
            MlpConnectorConfig(activation=activation_from_hf(fields["projector_hidden_act"]), newline=newline),
            tied(decoder, config),
            VisionTokenIds(image_token(fields)),
            family=config["model_type"],
            inputs=InputRules(
                pinpoints=pinpoints_from_hf(fields["image_grid_pinpoints"] or PINPOINTS) if newline else (),
                shows_prefix_tokens=strategy == "full" and encoder.num_prefix_tokens > 0,
            ),
        )

    def fields_to_hf(self, config: ModelConfig) -> dict:
        connector, encoder = config.connector, config.encoder
        return {
            "model_type": "llava_next" if connector.newline else "llava",
            "image_token_index": config.tokens.image,
            "image_seq_length": config.shown + encoder.position_grid**2,
            "projector_hidden_act": activation_to_hf(connector.activation, "gelu"),
            "vision_feature_layer": features_to_hf(encoder.features),
            "vision_feature_select_strategy": "default" if encoder.num_prefix_tokens > config.shown else "full",
            "tie_word_embeddings": config.decoder.tie_embeddings,
            "text_config": by_model_type.decoder_to_hf(config.decoder),
            "vision_config": part_to_hf(encoder),
            **({"image_grid_pinpoints": [list(size) for size in config.inputs.pinpoints]} if connector.newline else {}),
        }

    def weights(self, config: ModelConfig) -> list[Row]:
        return [
            *tower_of(config.encoder).rows(config.encoder, "vision_tower.vision_model."),
            *(
                row
                for i in range(config.connector.layers)
                for row in linear(f"connector/linear{i}", f"multi_modal_projector.linear_{i + 1}", "o i -> i o", "")
            ),
            Row("connector/newline", "image_newline"),
            *by_model_type.decoder_weights(config.decoder, "language_model.model", "language_model.lm_head.weight"),
        ]

    def rule(self, config: ModelConfig) -> AnyRes | Square | Crop:
        side, pinpoints = config.encoder.side, config.inputs.pinpoints
        if config.inputs.square:
            return Square(side, mean_color(config.encoder.pixel_mean))
        return AnyRes(pinpoints, side) if pinpoints else Crop(side, (side, side))

    def visuals(self, config: ModelConfig, arrays: Arrays) -> Supply:
        """Returns images f[images c h w], or for LLaVA-NeXT tiles f[images tiles c h w] with sizes i[images 2]."""
        if not config.connector.newline:
            return {config.tokens.image: untiled(config, arrays)}
        pixels = arrays.get("pixel_values", np.zeros((0, 1, 1, 1)))
        sizes = arrays.get("image_sizes", ())
        if len(pixels) != len(sizes):
            raise ValueError(f"image_sizes: has {len(sizes)} sizes for {len(pixels)} images. Pass one size per image.")
        return {
            config.tokens.image: [
                self._tiled(config, tiles, (int(height), int(width)))
                for tiles, (height, width) in zip(pixels, sizes, strict=True)
            ]
        }

    def _tiled(self, config: ModelConfig, tiles: np.ndarray, size: tuple[int, int]) -> VisionSpan:
        """Returns an AnyRes image of `size` (height, width) in pixels; `tiles` [tiles c h w] are padded at the end."""
        patch, rule = config.encoder.patch_size, self.rule(config)
        images = tuple(cut(pixels, patch, config.num_prefix_tokens) for pixels in tiles[: len(rule.sizes(size))])
        return counted_like_text(images, rule.order(size, patch))
