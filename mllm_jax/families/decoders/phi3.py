"""Phi-3 (arXiv 2404.14219) and Phi-4 (arXiv 2412.08905): Llama's layers with joint projections."""

from dataclasses import replace

from mllm_jax.common.fields import count, nullable, only, read
from mllm_jax.families.base import DecoderFamily
from mllm_jax.families.shared import rows
from mllm_jax.families.shared.decoder_config import decoder_fields, read_decoder, write_decoder
from mllm_jax.families.shared.rope import LENGTH
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.weights.table import Row

_MINI = DecoderConfig(
    vocab=32064,
    width=3072,
    layers=32,
    attention=AttentionConfig(32, 32, 96, rope_theta=1e4, rope_sections=(48, 0, 0), qk_norm=False),
    mlp=8192,
    sliding_windows=(2047,),
    norm_eps=1e-5,
    family="phi3",
)
_MEDIUM = replace(
    _MINI, width=5120, layers=40, attention=AttentionConfig(40, 10, 128, 1e4, (64, 0, 0), qk_norm=False), mlp=17920
)

SIZES = {
    "3-mini-4k": _MINI,
    "3-medium-4k": _MEDIUM,
    "4": replace(_MEDIUM, vocab=100352, sliding_windows=(), attention=replace(_MEDIUM.attention, rope_theta=2.5e5)),
}
FIELDS = decoder_fields(
    vocab=32064, width=3072, mlp=8192, depth=32, heads=32, kv_heads=None, length=4096, norm_eps=1e-5
) | {
    "attention_bias": only(False),
    "sliding_window": nullable(count(None)),
    LENGTH: count(4096),
}
# "su" and "yarn" are former names of "longrope".
ROPE = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


class Phi3(DecoderFamily):
    name = "Phi-3"
    architectures = {"phi3": "Phi3ForCausalLM"}
    decoders = SIZES

    def decoder_from_hf(self, text: dict) -> DecoderConfig:
        text = read(text, FIELDS)
        windows = (text["sliding_window"],) if text["sliding_window"] else ()
        return read_decoder(text, rope={"kinds": ROPE, "partial": True}, sliding_windows=windows)

    def decoder_to_hf(self, decoder: DecoderConfig) -> dict:
        window = decoder.sliding_windows[0] if decoder.sliding_windows else None
        # Token ids are null because transformers' defaults may exceed the vocabulary.
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        length = 131072 if decoder.attention.rope_scaling else 16384
        return write_decoder(decoder, length) | {"hidden_act": "silu", "sliding_window": window, **tokens}

    def decoder_weights(self, decoder: DecoderConfig, prefix: str = "model", head: str = "lm_head.weight") -> list[Row]:
        layer = f"{prefix}.layers.{{n}}"
        return rows.decoder(
            decoder,
            prefix,
            head,
            others=[
                *rows.joint_qkv(decoder, f"{layer}.self_attn.qkv_proj", "(n h) d -> d n h"),
                *rows.joint_gate_up("mlp", f"{layer}.mlp.gate_up_proj", decoder.mlp),
            ],
        )
