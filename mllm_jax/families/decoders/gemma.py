"""Gemma (arXiv 2403.08295), and the decoder of PaliGemma."""

from dataclasses import replace

from mllm_jax.common.fields import count, nullable, only, read, word
from mllm_jax.families.base import DecoderFamily
from mllm_jax.families.shared.decoder_config import (
    activation_from_hf,
    activation_to_hf,
    decoder_fields,
    read_decoder,
    write_decoder,
)
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.nn.attention.layer import AttentionConfig

_2B = DecoderConfig(
    vocab=256000,
    width=2048,
    layers=18,
    attention=AttentionConfig(8, 1, 256, rope_theta=1e4, rope_sections=(128, 0, 0), qk_norm=False),
    mlp=16384,
    activation="gelu_tanh",
    norm="rms_offset",
    tie_embeddings=True,
    embed_scale=2048**0.5,
    family="gemma",
)

SIZES = {
    "2b": _2B,
    "7b": replace(
        _2B,
        width=3072,
        layers=28,
        attention=replace(_2B.attention, heads=16, kv_heads=16),
        mlp=24576,
        embed_scale=3072**0.5,
    ),
}
COMMON = {  # fields of Gemma and Gemma 2
    "head_dim": count(256),
    "attention_bias": only(False),
    "use_bidirectional_attention": nullable(only(False), False),
}
FIELDS = (
    decoder_fields(vocab=256000, width=3072, mlp=24576, depth=28, heads=16, kv_heads=16, length=8192, tie=True)
    | COMMON
    | {
        "num_key_value_heads": count(16),
        "hidden_act": word("gelu_pytorch_tanh"),
    }
)


def decoder_of(text: dict, activation: str, **fields) -> DecoderConfig:
    """Returns the decoder of a text_config's values, with the settings that all Gemma models share."""
    return read_decoder(
        text, activation=activation, norm="rms_offset", embed_scale=text["hidden_size"] ** 0.5, **fields
    )


class Gemma(DecoderFamily):
    name = "Gemma"
    architectures = {"gemma": "GemmaForCausalLM"}
    decoders = SIZES

    def decoder_from_hf(self, text: dict) -> DecoderConfig:
        text = read(text, FIELDS)
        # In files from before transformers 4.39, "gelu" means its tanh approximation.
        activation = "gelu_tanh" if text["hidden_act"] == "gelu" else activation_from_hf(text["hidden_act"])
        return decoder_of(text, activation)

    def decoder_to_hf(self, decoder: DecoderConfig) -> dict:
        activation = activation_to_hf(decoder.activation, "gelu_pytorch_tanh")
        return write_decoder(decoder, length=8192) | {"hidden_act": activation, "attention_bias": False}
