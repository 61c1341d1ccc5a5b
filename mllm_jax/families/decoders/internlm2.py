"""InternLM2 (arXiv 2403.17297): Llama's layers with other tensor names, and queries, keys and values in one tensor.

Transformers has no class for it; config.json follows the published one.
"""

from dataclasses import replace

from mllm_jax.common.fields import only, read
from mllm_jax.families.base import DecoderFamily
from mllm_jax.families.shared.decoder_config import decoder_fields, read_decoder, write_decoder
from mllm_jax.families.shared.rows import layers, linear
from mllm_jax.model.decoder import DecoderConfig, LayerKind
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.rope import DynamicNtkRopeScaling
from mllm_jax.weights.table import Row

_7B = DecoderConfig(
    vocab=92544,
    width=4096,
    layers=32,
    attention=AttentionConfig(
        32,
        8,
        128,
        rope_theta=1e6,
        rope_sections=(64, 0, 0),
        rope_scaling=DynamicNtkRopeScaling(2.0, 32768),
        qk_norm=False,
    ),
    mlp=14336,
    norm_eps=1e-5,
    family="internlm2",
)

SIZES = {
    "1.8b": replace(_7B, width=2048, layers=24, attention=replace(_7B.attention, heads=16), mlp=8192),
    "7b": _7B,
    "20b": replace(_7B, width=6144, layers=48, attention=replace(_7B.attention, heads=48), mlp=16384),
}
FIELDS = decoder_fields(vocab=103168, width=4096, mlp=11008, depth=32, heads=32, kv_heads=None, length=2048) | {
    "bias": only(False)
}


class Internlm2(DecoderFamily):
    name = "InternLM2"
    architectures = {"internlm2": "InternLM2ForCausalLM"}
    decoders = SIZES

    def decoder_from_hf(self, text: dict) -> DecoderConfig:
        return read_decoder(read(text, FIELDS))

    def decoder_to_hf(self, decoder: DecoderConfig) -> dict:
        fields = write_decoder(decoder, length=32768) | {"hidden_act": "silu", "bias": False}
        rope = fields.pop("rope_parameters")
        theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
        return fields | {"rope_theta": theta, "rope_scaling": {"type": kind, **rope} if kind != "default" else None}

    def decoder_weights(self, decoder: DecoderConfig, prefix: str = "model", head: str = "output.weight") -> list[Row]:
        # For each key-value head, `wqkv` contains its group of queries, then its key, then its value.
        layer = f"{prefix}.layers.{{n}}"
        group = decoder.attention.heads // decoder.attention.kv_heads

        def rows(kind: LayerKind) -> list[Row]:
            wqkv, pattern = f"{layer}.attention.wqkv.weight", "(k g h) d -> d (k g) h"
            parts = {"q": (0, group), "k": (group, 1), "v": (group + 1, 1)}
            return [
                Row("norm1/scale", f"{layer}.attention_norm.weight"),
                Row("norm2/scale", f"{layer}.ffn_norm.weight"),
                *(
                    Row(f"attention/{name}/w", wqkv, pattern, {"g": size}, part=("g", first, group + 2))
                    for name, (first, size) in parts.items()
                ),
                *linear("attention/out", f"{layer}.attention.wo", "d (n h) -> n h d"),
                *linear("mlp/gate", f"{layer}.feed_forward.w1", "f d -> d f"),
                *linear("mlp/up", f"{layer}.feed_forward.w3", "f d -> d f"),
                *linear("mlp/down", f"{layer}.feed_forward.w2", "d f -> f d"),
            ]

        return [
            Row("decoder/embed", f"{prefix}.tok_embeddings.weight"),
            *layers(decoder, rows),
            Row("decoder/norm/scale", f"{prefix}.norm.weight"),
            Row("decoder/head/w", head),
        ]
