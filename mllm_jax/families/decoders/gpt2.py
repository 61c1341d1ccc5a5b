"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019)."""

from dataclasses import replace

from mllm_jax.common.fields import check_heads, count, flag, nullable, only, positive, read, word
from mllm_jax.common.fields import layers as count_layers
from mllm_jax.families.base import DecoderFamily
from mllm_jax.families.shared.decoder_config import activation_from_hf, activation_to_hf
from mllm_jax.families.shared.rows import joint_qkv, layer_norm, layers, linear
from mllm_jax.model.decoder import DecoderConfig, LayerKind
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.weights.table import Row

_ATTENTION = AttentionConfig(12, 12, 64, rope_theta=None, qk_norm=False, qkv_bias=True, out_bias=True)
_SMALL = DecoderConfig(
    vocab=50257,
    width=768,
    layers=12,
    attention=_ATTENTION,
    mlp=3072,
    activation="gelu_tanh",
    mlp_gated=False,
    mlp_bias=True,
    norm="layer",
    norm_eps=1e-5,
    tie_embeddings=True,
    positions=1024,
    family="gpt2",
)


def _size(width: int, layers: int, heads: int) -> DecoderConfig:
    attention = replace(_ATTENTION, heads=heads, kv_heads=heads)
    return replace(_SMALL, width=width, layers=layers, attention=attention, mlp=4 * width)


SIZES = {
    "124m": _SMALL,
    "355m": _size(1024, 24, 16),
    "774m": _size(1280, 36, 20),
    "1.5b": _size(1600, 48, 25),
}


FIELDS = {
    "vocab_size": count(50257),
    "n_positions": count(1024),
    "n_embd": count(768),
    "n_layer": count_layers(12),
    "n_head": count(12),
    "n_inner": nullable(count(None)),
    "activation_function": word("gelu_new"),
    "layer_norm_epsilon": positive(1e-5),
    "tie_word_embeddings": flag(True),
    "scale_attn_weights": only(True),
    "scale_attn_by_inverse_layer_idx": only(False),
    "add_cross_attention": only(False),
}


class Gpt2(DecoderFamily):
    name = "GPT-2"
    architectures = {"gpt2": "GPT2LMHeadModel"}
    decoders = SIZES
    ignore = (r".*\.attn\.(masked_)?bias",)  # causal masks in old files
    rename = ((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),)  # published files have no prefix

    def decoder_from_hf(self, text: dict) -> DecoderConfig:
        text = read(text, FIELDS)
        check_heads(text, "n_embd", "n_head")
        width, heads = text["n_embd"], text["n_head"]
        return replace(
            _SMALL,
            vocab=text["vocab_size"],
            width=width,
            layers=text["n_layer"],
            attention=replace(_ATTENTION, heads=heads, kv_heads=heads, head_dim=width // heads),
            mlp=text["n_inner"] or 4 * width,
            activation=activation_from_hf(text["activation_function"]),
            norm_eps=text["layer_norm_epsilon"],
            tie_embeddings=text["tie_word_embeddings"],
            positions=text["n_positions"],
        )

    def decoder_to_hf(self, decoder: DecoderConfig) -> dict:
        return {
            "vocab_size": decoder.vocab,
            "n_embd": decoder.width,
            "n_layer": decoder.layers,
            "n_head": decoder.attention.heads,
            "n_inner": decoder.mlp,
            "n_positions": decoder.positions,
            "activation_function": activation_to_hf(decoder.activation, "gelu_new"),
            "layer_norm_epsilon": decoder.norm_eps,
            "tie_word_embeddings": decoder.tie_embeddings,
        }

    def decoder_weights(
        self, decoder: DecoderConfig, prefix: str = "transformer", head: str = "lm_head.weight"
    ) -> list[Row]:
        # GPT-2's weights are [in, out], unlike torch.nn.Linear.
        layer = f"{prefix}.h.{{n}}"

        def rows(kind: LayerKind) -> list[Row]:
            return [
                *layer_norm("norm1", f"{layer}.ln_1"),
                *layer_norm("norm2", f"{layer}.ln_2"),
                *joint_qkv(decoder, f"{layer}.attn.c_attn", "d (n h) -> d n h", "(n h) -> n h"),
                *linear("attention/out", f"{layer}.attn.c_proj", "(n h) d -> n h d", ""),
                *linear("mlp/up", f"{layer}.mlp.c_fc", "", ""),
                *linear("mlp/down", f"{layer}.mlp.c_proj", "", ""),
            ]

        return [
            Row("decoder/embed", f"{prefix}.wte.weight"),
            Row("decoder/position_embed", f"{prefix}.wpe.weight"),
            *layers(decoder, rows),
            *layer_norm("decoder/norm", f"{prefix}.ln_f"),
            Row("decoder/head/w", head),
        ]
