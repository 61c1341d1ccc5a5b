"""OPT (arXiv 2205.01068), except the 350M, which has post-norms."""

from dataclasses import replace

from mllm_jax.common.fields import FieldError, check_heads, count, flag, nullable, only, read, word
from mllm_jax.common.fields import layers as count_layers
from mllm_jax.families.base import DecoderFamily
from mllm_jax.families.shared.decoder_config import activation_from_hf, activation_to_hf
from mllm_jax.families.shared.rows import layer_norm, layers, plain_layer
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.weights.table import Row

_ATTENTION = AttentionConfig(12, 12, 64, rope_theta=None, qk_norm=False, qkv_bias=True, out_bias=True)
_SMALL = DecoderConfig(
    vocab=50272,
    width=768,
    layers=12,
    attention=_ATTENTION,
    mlp=3072,
    activation="relu",
    mlp_gated=False,
    mlp_bias=True,
    norm="layer",
    norm_eps=1e-5,
    tie_embeddings=True,
    positions=2048,
    position_offset=2,
    family="opt",
)


def _size(width: int, layers: int, heads: int) -> DecoderConfig:
    attention = replace(_ATTENTION, heads=heads, kv_heads=heads, head_dim=width // heads)
    return replace(_SMALL, width=width, layers=layers, attention=attention, mlp=4 * width)


SIZES = {
    "125m": _SMALL,
    "1.3b": _size(2048, 24, 32),
    "2.7b": _size(2560, 32, 32),
    "6.7b": _size(4096, 32, 32),
    "13b": _size(5120, 40, 40),
    "30b": _size(7168, 48, 56),
    "66b": _size(9216, 64, 72),
}


FIELDS = {
    "vocab_size": count(50272),
    "hidden_size": count(768),
    "num_hidden_layers": count_layers(12),
    "ffn_dim": count(3072),
    "max_position_embeddings": count(2048),
    "num_attention_heads": count(12),
    "activation_function": word("relu"),
    "tie_word_embeddings": flag(True),
    "word_embed_proj_dim": nullable(count(None)),
    "do_layer_norm_before": only(True),  # this and the fields below rule out the 350M
    "_remove_final_layer_norm": only(False),
    "layer_norm_elementwise_affine": only(True),
    "enable_bias": only(True),
}


class Opt(DecoderFamily):
    name = "OPT"
    architectures = {"opt": "OPTForCausalLM"}
    decoders = SIZES
    rename = ((r"^decoder\.", "model.decoder."),)  # files from before 2023

    def decoder_from_hf(self, text: dict) -> DecoderConfig:
        text = read(text, FIELDS)
        check_heads(text, "hidden_size", "num_attention_heads")
        width, heads = text["hidden_size"], text["num_attention_heads"]
        if text["word_embed_proj_dim"] not in (None, width):
            raise FieldError("word_embed_proj_dim", f"must be hidden_size={width}.", text["word_embed_proj_dim"])
        return replace(
            _SMALL,
            vocab=text["vocab_size"],
            width=width,
            layers=text["num_hidden_layers"],
            attention=replace(_ATTENTION, heads=heads, kv_heads=heads, head_dim=width // heads),
            mlp=text["ffn_dim"],
            activation=activation_from_hf(text["activation_function"]),
            tie_embeddings=text["tie_word_embeddings"],
            positions=text["max_position_embeddings"],
        )

    def decoder_to_hf(self, decoder: DecoderConfig) -> dict:
        return {
            "vocab_size": decoder.vocab,
            "hidden_size": decoder.width,
            "word_embed_proj_dim": decoder.width,
            "num_hidden_layers": decoder.layers,
            "num_attention_heads": decoder.attention.heads,
            "ffn_dim": decoder.mlp,
            "max_position_embeddings": decoder.positions,
            "activation_function": activation_to_hf(decoder.activation, "relu"),
            "tie_word_embeddings": decoder.tie_embeddings,
        }

    def decoder_weights(
        self, decoder: DecoderConfig, prefix: str = "model.decoder", head: str = "lm_head.weight"
    ) -> list[Row]:
        layer = f"{prefix}.layers.{{n}}"
        block = plain_layer(layer, ("self_attn_layer_norm", "final_layer_norm"), f"{layer}.fc")
        return [
            Row("decoder/embed", f"{prefix}.embed_tokens.weight"),
            Row("decoder/position_embed", f"{prefix}.embed_positions.weight"),
            *layers(decoder, lambda kind: block),
            *layer_norm("decoder/norm", f"{prefix}.final_layer_norm"),
            Row("decoder/head/w", head),
        ]
