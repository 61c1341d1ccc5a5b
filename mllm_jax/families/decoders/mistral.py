"""Mistral 7B and Nemo (arXiv 2310.06825)."""

from dataclasses import replace

from mllm_jax.common.fields import count, nullable, read
from mllm_jax.families.base import DecoderFamily
from mllm_jax.families.shared.decoder_config import decoder_fields, read_decoder, write_decoder
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.nn.attention.layer import AttentionConfig

_ATTENTION = AttentionConfig(32, 8, 128, rope_theta=1e6, rope_sections=(64, 0, 0), qk_norm=False)
_7B = DecoderConfig(32000, 4096, 32, _ATTENTION, 14336, norm_eps=1e-5, family="mistral")

SIZES = {
    "7b-v0.1": replace(_7B, attention=replace(_ATTENTION, rope_theta=1e4), sliding_windows=(4096,)),
    "7b-v0.2": _7B,
    "7b-v0.3": replace(_7B, vocab=32768),
    "nemo-12b": replace(_7B, vocab=131072, width=5120, layers=40),
}
FIELDS = decoder_fields(vocab=32000, width=4096, mlp=14336, depth=32, heads=32, kv_heads=8, length=131072) | {
    "num_key_value_heads": count(8),
    "sliding_window": nullable(count(4096)),
}


class Mistral(DecoderFamily):
    name = "Mistral"
    architectures = {"mistral": "MistralForCausalLM"}
    decoders = SIZES

    def decoder_from_hf(self, text: dict) -> DecoderConfig:
        text = read(text, FIELDS)
        return read_decoder(text, sliding_windows=(text["sliding_window"],) if text["sliding_window"] else ())

    def decoder_to_hf(self, decoder: DecoderConfig) -> dict:
        window = decoder.sliding_windows[0] if decoder.sliding_windows else None
        return write_decoder(decoder, length=32768) | {"hidden_act": "silu", "sliding_window": window}
