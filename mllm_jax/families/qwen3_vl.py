"""Qwen3-VL, dense (arXiv 2511.21631): published sizes, config.json both ways, weight names.

Tensor names as in the published safetensors files.
"""

from dataclasses import replace

from mllm_jax.connectors.patch_merger import PatchMergerConfig
from mllm_jax.decoder import DecoderConfig
from mllm_jax.encoders.vit import VitConfig
from mllm_jax.model import ModelConfig, VisionTokenIds
from mllm_jax.weights.table import Row

TOKENS = VisionTokenIds(image=151655, video=151656, start=151652, end=151653)
# SigLIP-2 towers: large (300M) for the small decoders, SO400M for the others.
LARGE = VitConfig(width=1024, layers=24, heads=16, mlp=4096, taps=(5, 11, 17))
SO400M = VitConfig(width=1152, layers=27, heads=16, mlp=4304, taps=(8, 16, 24))
QWEN3 = DecoderConfig(vocab=151936, width=2048, layers=28, heads=16, kv_heads=8, head_dim=128, mlp=6144)

SIZES = {
    "2b": (LARGE, replace(QWEN3, tie_embeddings=True)),
    "4b": (LARGE, replace(QWEN3, width=2560, layers=36, heads=32, mlp=9728, tie_embeddings=True)),
    "8b": (SO400M, replace(QWEN3, width=4096, layers=36, heads=32, mlp=12288)),
    "32b": (SO400M, replace(QWEN3, width=5120, layers=64, heads=64, mlp=25600)),
}


def sizes(name: str) -> ModelConfig:
    """The config of a published size: "2b", "4b", "8b" or "32b"."""
    if name not in SIZES:
        raise ValueError(f"Qwen3-VL has no size {name!r}; sizes: {', '.join(SIZES)}")
    encoder, decoder = SIZES[name]
    return ModelConfig(encoder, PatchMergerConfig(), decoder, TOKENS, family="qwen3_vl")


def from_hf(config: dict) -> ModelConfig:
    """The model that a `config.json` of model_type "qwen3_vl" describes. ValueError for what this model cannot do."""
    text, vision = config["text_config"], config["vision_config"]
    rope = text.get("rope_parameters") or {
        "rope_theta": text.get("rope_theta", 5e6),
        **(text.get("rope_scaling") or {}),
    }
    if rope.get("rope_type", "default") != "default" or not rope.get("mrope_interleaved", True):
        raise ValueError(f"Qwen3-VL has interleaved M-RoPE of rope_type 'default'; config.json says {rope}")
    if text.get("attention_bias") or text.get("hidden_act", "silu") != "silu":
        raise ValueError("Qwen3-VL's decoder has no attention biases and SiLU; config.json says otherwise")
    activations = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
    if vision.get("hidden_act", "gelu_pytorch_tanh") not in activations:
        raise ValueError(f"vision_config.hidden_act {vision['hidden_act']!r} is not one of {sorted(activations)}")
    if vision["out_hidden_size"] != text["hidden_size"]:
        raise ValueError(
            f"vision_config.out_hidden_size {vision['out_hidden_size']} must equal "
            f"text_config.hidden_size {text['hidden_size']}"
        )
    heads = text["num_attention_heads"]
    encoder = VitConfig(
        width=vision["hidden_size"],
        layers=vision["depth"],
        heads=vision["num_heads"],
        mlp=vision["intermediate_size"],
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        channels=vision.get("in_channels", 3),
        position_grid=round(vision["num_position_embeddings"] ** 0.5),
        taps=tuple(vision["deepstack_visual_indexes"]),
        activation=activations[vision.get("hidden_act", "gelu_pytorch_tanh")],
    )
    decoder = DecoderConfig(
        vocab=text["vocab_size"],
        width=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads", heads),
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        mlp=text["intermediate_size"],
        rope_theta=float(rope["rope_theta"]),
        rope_sections=tuple(rope.get("mrope_section", (24, 20, 20))),
        norm_eps=text.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
    )
    tokens = VisionTokenIds(
        image=config["image_token_id"],
        video=config["video_token_id"],
        start=config["vision_start_token_id"],
        end=config["vision_end_token_id"],
    )
    return ModelConfig(
        encoder, PatchMergerConfig(merge=vision["spatial_merge_size"]), decoder, tokens, family="qwen3_vl"
    )


def to_hf(config: ModelConfig) -> dict:
    """The inverse of `from_hf`: what transformers needs to build the same model.

    Raises ValueError for a model that differs from Qwen3-VL in what its config.json does not say.
    """
    encoder, decoder = config.encoder, config.decoder
    written = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": decoder.tie_embeddings,
        "image_token_id": config.tokens.image,
        "video_token_id": config.tokens.video,
        "vision_start_token_id": config.tokens.start,
        "vision_end_token_id": config.tokens.end,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": decoder.vocab,
            "hidden_size": decoder.width,
            "num_hidden_layers": decoder.layers,
            "num_attention_heads": decoder.heads,
            "num_key_value_heads": decoder.kv_heads,
            "head_dim": decoder.head_dim,
            "intermediate_size": decoder.mlp,
            "hidden_act": "silu",
            "attention_bias": False,
            "rms_norm_eps": decoder.norm_eps,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": decoder.tie_embeddings,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": decoder.rope_theta,
                "mrope_section": list(decoder.rope_sections),
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "hidden_size": encoder.width,
            "depth": encoder.layers,
            "num_heads": encoder.heads,
            "intermediate_size": encoder.mlp,
            "patch_size": encoder.patch_size,
            "temporal_patch_size": encoder.temporal_patch_size,
            "in_channels": encoder.channels,
            "num_position_embeddings": encoder.position_grid**2,
            "deepstack_visual_indexes": list(encoder.taps),
            "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}[encoder.activation],
            "spatial_merge_size": config.connector.merge,
            "out_hidden_size": decoder.width,
        },
    }
    understood = from_hf(written)
    for part in ("encoder", "connector", "decoder"):
        if (reads := getattr(understood, part)) != (own := getattr(config, part)):
            raise ValueError(f"Qwen3-VL's config.json cannot say all of this {part}: {own} would be read as {reads}")
    return written


def _linear(ours: str, theirs: str, pattern: str, bias: str | None = None):
    """Rows of a linear layer: torch keeps [out, in]."""
    rows = [Row(f"{ours}/w", f"{theirs}.weight", pattern)]
    return rows if bias is None else [*rows, Row(f"{ours}/b", f"{theirs}.bias", bias)]


def _layer_norm(ours: str, theirs: str):
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def _merger(ours: str, theirs: str):
    return [
        *_layer_norm(f"{ours}/norm", f"{theirs}.norm"),
        *_linear(f"{ours}/mlp/up", f"{theirs}.linear_fc1", "f d -> d f", ""),
        *_linear(f"{ours}/mlp/down", f"{theirs}.linear_fc2", "d f -> f d", ""),
    ]


_BLOCK, _LAYER = "model.visual.blocks.{n}", "model.language_model.layers.{n}"


def weights(config: ModelConfig) -> list[Row]:
    """Our names and theirs, for this config; see weights/table.py."""
    pixels = {"c": config.encoder.channels, "t": config.encoder.temporal_patch_size, "y": config.encoder.patch_size}
    return [
        Row("encoder/patch_embed/w", "model.visual.patch_embed.proj.weight", "d c t y x -> (c t y x) d", pixels),
        Row("encoder/patch_embed/b", "model.visual.patch_embed.proj.bias"),
        Row("encoder/position_embed", "model.visual.pos_embed.weight", "(y x) d -> y x d"),
        *_layer_norm("encoder/layers/norm1", f"{_BLOCK}.norm1"),
        *_layer_norm("encoder/layers/norm2", f"{_BLOCK}.norm2"),
        *_linear("encoder/layers/attention/qkv", f"{_BLOCK}.attn.qkv", "(c n h) d -> d c n h", "(c n h) -> c n h"),
        *_linear("encoder/layers/attention/out", f"{_BLOCK}.attn.proj", "d (n h) -> n h d", ""),
        *_linear("encoder/layers/mlp/up", f"{_BLOCK}.mlp.linear_fc1", "f d -> d f", ""),
        *_linear("encoder/layers/mlp/down", f"{_BLOCK}.mlp.linear_fc2", "d f -> f d", ""),
        *_merger("connector/main", "model.visual.merger"),
        *_merger("connector/deepstack", "model.visual.deepstack_merger_list.{k}"),
        Row("decoder/embed", "model.language_model.embed_tokens.weight"),
        Row("decoder/layers/norm1/scale", f"{_LAYER}.input_layernorm.weight"),
        Row("decoder/layers/norm2/scale", f"{_LAYER}.post_attention_layernorm.weight"),
        *_linear("decoder/layers/attention/q", f"{_LAYER}.self_attn.q_proj", "(n h) d -> d n h"),
        *_linear("decoder/layers/attention/k", f"{_LAYER}.self_attn.k_proj", "(n h) d -> d n h"),
        *_linear("decoder/layers/attention/v", f"{_LAYER}.self_attn.v_proj", "(n h) d -> d n h"),
        *_linear("decoder/layers/attention/out", f"{_LAYER}.self_attn.o_proj", "d (n h) -> n h d"),
        Row("decoder/layers/attention/q_norm/scale", f"{_LAYER}.self_attn.q_norm.weight"),
        Row("decoder/layers/attention/k_norm/scale", f"{_LAYER}.self_attn.k_norm.weight"),
        *_linear("decoder/layers/mlp/gate", f"{_LAYER}.mlp.gate_proj", "f d -> d f"),
        *_linear("decoder/layers/mlp/up", f"{_LAYER}.mlp.up_proj", "f d -> d f"),
        *_linear("decoder/layers/mlp/down", f"{_LAYER}.mlp.down_proj", "d f -> f d"),
        Row("decoder/norm/scale", "model.language_model.norm.weight"),
        Row("decoder/head/w", "lm_head.weight"),
    ]


# Files of a model with tied embeddings may repeat the table under the head's name.
IGNORE = ("lm_head.weight",)
# Names before transformers 4.57 moved both towers under `model.`.
RENAME = ((r"^visual\.", "model.visual."), (r"^model\.(?=layers|embed_tokens|norm)", "model.language_model."))
