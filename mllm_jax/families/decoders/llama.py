"""Llama 1 to 3.2 (arXiv 2302.13971, 2307.09288, 2407.21783), Vicuna, and Yi (arXiv 2403.04652)."""

from dataclasses import replace

from mllm_jax.common.fields import flag, nullable, only, read, word
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
from mllm_jax.nn.rope import Llama3RopeScaling

_HEAD = dict(head_dim=128, rope_sections=(64, 0, 0), qk_norm=False)
_ROPE_SCALING = Llama3RopeScaling(factor=8.0, length=8192)


def _llama1(width: int, layers: int, heads: int, mlp: int, eps: float = 1e-6) -> DecoderConfig:
    return DecoderConfig(
        32000, width, layers, AttentionConfig(heads, heads, rope_theta=1e4, **_HEAD), mlp, norm_eps=eps, family="llama"
    )


def _llama3(width: int, layers: int, heads: int, mlp: int) -> DecoderConfig:
    attention = AttentionConfig(heads, 8, rope_theta=5e5, **_HEAD)
    return DecoderConfig(128256, width, layers, attention, mlp, norm_eps=1e-5, family="llama")


def _with_rope_scaling(decoder: DecoderConfig, factor: float = 8.0) -> DecoderConfig:
    return replace(decoder, attention=replace(decoder.attention, rope_scaling=replace(_ROPE_SCALING, factor=factor)))


_2_7B, _2_13B = _llama1(4096, 32, 32, 11008, 1e-5), _llama1(5120, 40, 40, 13824, 1e-5)
_2_70B = replace(_llama1(8192, 80, 64, 28672, 1e-5), attention=AttentionConfig(64, 8, rope_theta=1e4, **_HEAD))
_3_8B, _3_70B = _llama3(4096, 32, 32, 14336), _llama3(8192, 80, 64, 28672)
_SMALL = _with_rope_scaling(replace(_llama3(2048, 16, 32, 8192), tie_embeddings=True), 32.0)

SIZES = {
    "7b": _llama1(4096, 32, 32, 11008),
    "13b": _llama1(5120, 40, 40, 13824),
    "33b": _llama1(6656, 60, 52, 17920),
    "65b": _llama1(8192, 80, 64, 22016, 1e-5),
    "2-7b": _2_7B,
    "2-13b": _2_13B,
    "2-70b": _2_70B,
    "vicuna-7b": _2_7B,
    "vicuna-13b": _2_13B,
    "yi-34b": replace(
        _2_70B, vocab=64000, width=7168, layers=60, mlp=20480, attention=AttentionConfig(56, 8, rope_theta=5e6, **_HEAD)
    ),
    "3-8b": _3_8B,
    "3-70b": _3_70B,
    "3.1-8b": _with_rope_scaling(_3_8B),
    "3.1-70b": _with_rope_scaling(_3_70B),
    "3.1-405b": _with_rope_scaling(_llama3(16384, 126, 128, 53248)),
    "3.2-1b": replace(_SMALL, attention=replace(_SMALL.attention, head_dim=64, rope_sections=(32, 0, 0))),
    "3.2-3b": replace(_SMALL, width=3072, layers=28, attention=replace(_SMALL.attention, heads=24)),
}


FIELDS = decoder_fields(vocab=32000, width=4096, mlp=11008, depth=32, heads=32, kv_heads=None, length=2048) | {
    "hidden_act": word("silu"),
    "attention_bias": flag(False),
    "mlp_bias": flag(False),
    "pretraining_tp": nullable(only(1), 1),
}


class Llama(DecoderFamily):
    name = "Llama"
    architectures = {"llama": "LlamaForCausalLM"}
    decoders = SIZES

    def decoder_from_hf(self, text: dict) -> DecoderConfig:
        text = read(text, FIELDS)
        return read_decoder(
            text,
            activation=activation_from_hf(text["hidden_act"]),
            qkv_bias=text["attention_bias"],
            out_bias=text["attention_bias"],
            mlp_bias=text["mlp_bias"],
        )

    def decoder_to_hf(self, decoder: DecoderConfig) -> dict:
        return write_decoder(decoder, length=131072 if decoder.attention.rope_scaling else 8192) | {
            "hidden_act": activation_to_hf(decoder.activation, "silu"),
            "attention_bias": decoder.attention.qkv_bias,
            "mlp_bias": decoder.mlp_bias,
        }
