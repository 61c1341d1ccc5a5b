"""Qwen3-VL, dense and with experts (arXiv 2511.21631): published sizes, config.json, weight table.

Tensor names as in the published safetensors files.
"""

from dataclasses import replace

from mllm_jax.common.fields import FieldError, check_heads, count, inside, layers, listed, read, section, word
from mllm_jax.data.pipeline.hf_inputs import Arrays, Supply
from mllm_jax.families.base import Family
from mllm_jax.families.decoders import qwen3
from mllm_jax.families.decoders.by_model_type import TEXT
from mllm_jax.families.shared import rows
from mllm_jax.families.shared.decoder_config import tied_at_the_top
from mllm_jax.families.shared.hf_images import one_by_one, read_videos
from mllm_jax.families.shared.rope import axial_theta, axial_to_hf, rope_fields
from mllm_jax.families.shared.rows import FUSED_DOWN, FUSED_GATE_UP, layer_norm, linear
from mllm_jax.families.towers.tower import ACTIVATIONS, joint_attention, plain_mlp
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig, VisionTokenIds
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.weights.table import Row

TOKENS = VisionTokenIds(image=151655, video=151656, start=151652, end=151653)
# SigLIP-2 towers: large (300M) for the small decoders, SO400M for the others.
LARGE = VitConfig(width=1024, layers=24, heads=16, mlp=4096, deepstack_layers=(5, 11, 17))
SO400M = VitConfig(width=1152, layers=27, heads=16, mlp=4304, deepstack_layers=(8, 16, 24))


def _dense(width: int, layers: int, heads: int, mlp: int, tie: bool = False) -> DecoderConfig:
    attention = AttentionConfig(heads=heads, kv_heads=8, head_dim=128)
    return DecoderConfig(151936, width, layers, attention, mlp, tie_embeddings=tie)


def _experts(name: str) -> DecoderConfig:
    """Returns Qwen3's decoder with M-RoPE."""
    text = qwen3.SIZES[name]
    return replace(text, attention=AttentionConfig(text.attention.heads, text.attention.kv_heads, 128))


def _family(decoder: DecoderConfig) -> str:
    return "qwen3_vl_moe" if decoder.moe else "qwen3_vl"


def _size(encoder: VitConfig, decoder: DecoderConfig) -> ModelConfig:
    return ModelConfig(encoder, PatchMergerConfig(), decoder, TOKENS, family=_family(decoder))


SIZES = {
    "2b": _size(LARGE, _dense(2048, 28, 16, 6144, tie=True)),
    "4b": _size(LARGE, _dense(2560, 36, 32, 9728, tie=True)),
    "8b": _size(SO400M, _dense(4096, 36, 32, 12288)),
    "32b": _size(SO400M, _dense(5120, 64, 64, 25600)),
    "30b-a3b": _size(SO400M, _experts("30b-a3b")),
    "235b-a22b": _size(SO400M, _experts("235b-a22b")),
}


SECTIONS = {"text_config": section(), "vision_config": section()}
TOKEN_FIELDS = {
    "image_token_id": count(TOKENS.image, low=0),
    "video_token_id": count(TOKENS.video, low=0),
    "vision_start_token_id": count(TOKENS.start, low=0),
    "vision_end_token_id": count(TOKENS.end, low=0),
}
VISION_FIELDS = {  # shared with Qwen2-VL
    "depth": layers(27),
    "num_heads": count(16),
    "patch_size": count(16),
    "temporal_patch_size": count(2),
    "in_channels": count(3),
    "spatial_merge_size": count(2),
    **rope_fields(1e4),
}
VISION = VISION_FIELDS | {
    "hidden_size": count(1152),
    "intermediate_size": count(4304),
    "out_hidden_size": count(3584),
    "num_position_embeddings": count(2304),
    "deepstack_visual_indexes": listed(count(low=0), (8, 16, 24)),
    "hidden_act": word("gelu_pytorch_tanh", ("gelu_pytorch_tanh", "gelu")),
}


def encoder_fields(vision: dict, width: str = "hidden_size") -> dict:
    """Returns fields of VitConfig from the values of VISION_FIELDS, `hidden_act`, and the width named `width`."""
    check_heads(vision, width, "num_heads", multiple=4)  # axial RoPE rotates pairs, by row and by column
    return {
        "width": vision[width],
        "layers": vision["depth"],
        "heads": vision["num_heads"],
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "channels": vision["in_channels"],
        "activation": ACTIVATIONS[vision["hidden_act"]],
        "rope_theta": axial_theta(vision),
    }


def vision_to_hf(encoder: VitConfig, merge: int) -> dict:
    """Inverse of `encoder_fields`, without the width."""
    return {
        "depth": encoder.layers,
        "num_heads": encoder.heads,
        "patch_size": encoder.patch_size,
        "temporal_patch_size": encoder.temporal_patch_size,
        "in_channels": encoder.channels,
        "hidden_act": next(name for name, ours in ACTIVATIONS.items() if ours == encoder.activation),
        "spatial_merge_size": merge,
        **axial_to_hf(encoder.rope_theta),
    }


def tokens_of(fields: dict) -> VisionTokenIds:
    """Returns the token ids from the values of TOKEN_FIELDS."""
    return VisionTokenIds(
        image=fields["image_token_id"],
        video=fields["video_token_id"],
        start=fields["vision_start_token_id"],
        end=fields["vision_end_token_id"],
    )


def tokens_to_hf(tokens: VisionTokenIds) -> dict:
    """Inverse of `tokens_of`."""
    return {
        "image_token_id": tokens.image,
        "video_token_id": tokens.video,
        "vision_start_token_id": tokens.start,
        "vision_end_token_id": tokens.end,
    }


def _merger(ours: str, theirs: str) -> list[Row]:
    return [
        *layer_norm(f"{ours}/norm", f"{theirs}.norm"),
        *linear(f"{ours}/mlp/up", f"{theirs}.linear_fc1", "f d -> d f", ""),
        *linear(f"{ours}/mlp/down", f"{theirs}.linear_fc2", "d f -> f d", ""),
    ]


_BLOCK, _EXPERTS = "model.visual.blocks.{n}", "model.language_model.layers.{n}.mlp.experts"


def _experts_rows(decoder: DecoderConfig) -> list[Row]:
    """Rows of a layer's experts, joined in one tensor.

    Published files contain them transposed, files saved by transformers 5 do not. A tensor with equal sides is read as
    not transposed, as in transformers 5.
    """
    if (moe := decoder.moe) is None:
        return []
    gate_up = Row("mlp/experts_gate_up/w", f"{_EXPERTS}.gate_up_proj", **FUSED_GATE_UP)
    down = Row("mlp/experts_down/w", f"{_EXPERTS}.down_proj", **FUSED_DOWN)
    published_gate_up = gate_up._replace(pattern="e d (two f) -> e two d f", others=[FUSED_GATE_UP])
    published_down = down._replace(pattern="", others=[FUSED_DOWN])
    return [
        gate_up if 2 * moe.mlp == decoder.width else published_gate_up,
        down if moe.mlp == decoder.width else published_down,
    ]


class Qwen3Vl(Family):
    name = "Qwen3-VL"
    architectures = {
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
        "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    }
    sizes = SIZES
    # Tensor names before transformers 4.57, which moved the encoder and the decoder under `model.`.
    rename = (
        (r"^visual\.", "model.visual."),
        (r"^model\.(?=layers|embed_tokens|norm)", "model.language_model."),
        (r"^model\.language_model\.model\.", "model.language_model."),
    )
    input_names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")

    def from_hf(self, config: dict) -> ModelConfig:
        fields = read(config, SECTIONS | TOKEN_FIELDS)
        with inside("vision_config"):
            vision = read(fields["vision_config"], VISION)
            if (grid := round(vision["num_position_embeddings"] ** 0.5)) ** 2 != vision["num_position_embeddings"]:
                raise FieldError("num_position_embeddings", "must be a square.", vision["num_position_embeddings"])
            shared = encoder_fields(vision)
            if invalid := [layer for layer in vision["deepstack_visual_indexes"] if layer >= vision["depth"]]:
                raise FieldError("deepstack_visual_indexes", f"must be below depth={vision['depth']}.", invalid)
        deepstack_layers = tuple(vision["deepstack_visual_indexes"])
        encoder = VitConfig(
            mlp=vision["intermediate_size"], position_grid=grid, deepstack_layers=deepstack_layers, **shared
        )
        text = fields["text_config"]
        with inside("text_config"):
            decoder = tied_at_the_top(qwen3.seeing_decoder_from_hf(text, config["model_type"]), config)
        if vision["out_hidden_size"] != decoder.width:
            raise FieldError(
                "vision_config.out_hidden_size",
                f"must be text_config.hidden_size={decoder.width}.",
                vision["out_hidden_size"],
            )
        merger = PatchMergerConfig(merge=vision["spatial_merge_size"])
        return ModelConfig(encoder, merger, decoder, tokens_of(fields), family=_family(decoder))

    def fields_to_hf(self, config: ModelConfig) -> dict:
        encoder, decoder, kind = config.encoder, config.decoder, _family(config.decoder)
        return {
            "model_type": kind,
            "tie_word_embeddings": decoder.tie_embeddings,
            **tokens_to_hf(config.tokens),
            "text_config": {"model_type": f"{kind}_text", **TEXT["qwen3"].decoder_to_hf(decoder)},
            "vision_config": {
                "model_type": f"{kind}_vision",
                **vision_to_hf(encoder, config.merge),
                "hidden_size": encoder.width,
                "intermediate_size": encoder.mlp,
                "num_position_embeddings": encoder.position_grid**2,
                "deepstack_visual_indexes": list(encoder.deepstack_layers),
                "out_hidden_size": decoder.width,
            },
        }

    def weights(self, config: ModelConfig) -> list[Row]:
        pixels = {"c": config.encoder.channels, "t": config.encoder.temporal_patch_size, "y": config.encoder.patch_size}
        return [
            Row("encoder/patch_embed/w", "model.visual.patch_embed.proj.weight", "d c t y x -> (c t y x) d", pixels),
            Row("encoder/patch_embed/b", "model.visual.patch_embed.proj.bias"),
            Row("encoder/position_embed", "model.visual.pos_embed.weight"),
            *layer_norm("encoder/layers/norm1", f"{_BLOCK}.norm1"),
            *layer_norm("encoder/layers/norm2", f"{_BLOCK}.norm2"),
            *joint_attention(f"{_BLOCK}.attn.qkv"),
            *linear("encoder/layers/attention/out", f"{_BLOCK}.attn.proj", "d (n h) -> n h d", ""),
            *plain_mlp(f"{_BLOCK}.mlp.linear_fc1", f"{_BLOCK}.mlp.linear_fc2"),
            *_merger("connector/main", "model.visual.merger"),
            *_merger("connector/deepstack", "model.visual.deepstack_merger_list.{k}"),
            *rows.decoder(config.decoder, "model.language_model", experts=_experts_rows(config.decoder)),
        ]

    def visuals(self, config: ModelConfig, arrays: Arrays) -> Supply:
        """Returns the images and every temporal patch of videos; each has its own run of placeholders."""
        names = {config.tokens.image: self.input_names[:2], config.tokens.video: self.input_names[2:]}
        return {
            token: [one_by_one((patch,), config.merge) for video in read_videos(arrays, *pair) for patch in video]
            for token, pair in names.items()
        }
