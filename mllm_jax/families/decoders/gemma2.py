"""Gemma 2 (arXiv 2408.00118), and the decoder of PaliGemma 2."""

from dataclasses import replace

from mllm_jax.common.fields import count, nullable, positive, read, word
from mllm_jax.families.decoders import gemma
from mllm_jax.families.shared.decoder_config import (
    WINDOWS,
    activation_from_hf,
    decoder_fields,
    windows_from_hf,
    windows_to_hf,
)
from mllm_jax.model.decoder import DecoderConfig

_2B = replace(
    gemma.SIZES["2b"],
    width=2304,
    layers=26,
    attention=replace(gemma.SIZES["2b"].attention, kv_heads=4, softcap=50.0),
    mlp=9216,
    sliding_windows=(4096, 0),
    use_post_norm=True,
    embed_scale=2304**0.5,
    logit_softcap=30.0,
    family="gemma2",
)
_HEADS = dict(head_dim=128, rope_sections=(64, 0, 0))

SIZES = {
    "2b": _2B,
    "9b": replace(
        _2B,
        width=3584,
        layers=42,
        attention=replace(_2B.attention, heads=16, kv_heads=8),
        mlp=14336,
        embed_scale=3584**0.5,
    ),
    "27b": replace(
        _2B,
        width=4608,
        layers=46,
        attention=replace(_2B.attention, heads=32, kv_heads=16, scale=144**-0.5, **_HEADS),
        mlp=36864,
        embed_scale=4608**0.5,
    ),
}
FIELDS = (
    decoder_fields(vocab=256000, width=2304, mlp=9216, depth=26, heads=8, kv_heads=4, length=8192, tie=True)
    | gemma.COMMON
    | WINDOWS
    | {
        "num_key_value_heads": count(4),
        "hidden_act": word("silu"),  # ignored in favor of hidden_activation
        "hidden_activation": word("gelu_pytorch_tanh"),
        "query_pre_attn_scalar": positive(256),
        "final_logit_softcapping": nullable(positive(30.0)),
        "attn_logit_softcapping": nullable(positive(50.0)),
    }
)


class Gemma2(gemma.Gemma):
    name = "Gemma 2"
    architectures = {"gemma2": "Gemma2ForCausalLM"}
    decoders = SIZES

    def decoder_from_hf(self, text: dict) -> DecoderConfig:
        text = read(text, FIELDS)
        depth, divisor = text["num_hidden_layers"], text["query_pre_attn_scalar"]
        kinds = text["layer_types"]
        if kinds is None:
            kinds = ["full_attention" if number % 2 else "sliding_attention" for number in range(depth)]
        return gemma.decoder_of(
            text,
            activation_from_hf(text["hidden_activation"]),
            scale=None if divisor == text["head_dim"] else divisor**-0.5,
            softcap=text["attn_logit_softcapping"] or 0.0,
            sliding_windows=windows_from_hf(text, kinds),
            use_post_norm=True,
            logit_softcap=text["final_logit_softcapping"] or 0.0,
        )

    def decoder_to_hf(self, decoder: DecoderConfig) -> dict:
        fields, attention = super().decoder_to_hf(decoder), decoder.attention
        return fields | {
            "hidden_activation": fields["hidden_act"],
            "query_pre_attn_scalar": round(attention.scale**-2) if attention.scale else attention.head_dim,
            "attn_logit_softcapping": attention.softcap or None,
            "final_logit_softcapping": decoder.logit_softcap or None,
            **windows_to_hf(decoder),
        }
