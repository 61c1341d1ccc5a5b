"""Qwen3, dense and with experts (arXiv 2505.09388): text alone, and the decoder of Qwen3-VL.

Tensor names as in the published safetensors files.
"""

from dataclasses import replace

from mllm_jax.decoder import DecoderConfig
from mllm_jax.families import rows
from mllm_jax.families.decoders import expect, read_decoder, write_decoder
from mllm_jax.model import ModelConfig
from mllm_jax.nn.moe import MoeConfig
from mllm_jax.nn.self_attention import AttentionConfig
from mllm_jax.weights.table import Row

_TEXT = AttentionConfig(heads=32, kv_heads=4, head_dim=128, rope_theta=1e6, rope_sections=(64, 0, 0))
_MOE = DecoderConfig(
    vocab=151936,
    width=2048,
    layers=48,
    attention=_TEXT,
    mlp=6144,
    moe=MoeConfig(experts=128, top_k=8, mlp=768),
    family="qwen3_moe",
)


def _dense(width: int, layers: int, heads: int, mlp: int, tie: bool = False) -> DecoderConfig:
    attention = replace(_TEXT, heads=heads, kv_heads=8)
    return DecoderConfig(151936, width, layers, attention, mlp, tie_embeddings=tie, family="qwen3")


SIZES = {
    "0.6b": _dense(1024, 28, 16, 3072, tie=True),
    "1.7b": _dense(2048, 28, 16, 6144, tie=True),
    "4b": _dense(2560, 36, 32, 9728, tie=True),
    "8b": _dense(4096, 36, 32, 12288),
    "14b": _dense(5120, 40, 40, 17408),
    "32b": _dense(5120, 64, 64, 25600),
    "30b-a3b": _MOE,
    "235b-a22b": replace(
        _MOE,
        width=4096,
        layers=94,
        attention=replace(_TEXT, heads=64),
        mlp=12288,
        moe=replace(_MOE.moe, mlp=1536),
    ),
}


def sizes(name: str) -> ModelConfig:
    """The config of a published size: "0.6b", "1.7b", "4b", "8b", "14b", "32b"; with experts "30b-a3b", "235b-a22b"."""
    if name not in SIZES:
        raise ValueError(f"Qwen3 has no size {name!r}; sizes: {', '.join(SIZES)}")
    return ModelConfig(None, None, SIZES[name], family=_kind(SIZES[name]))


def _kind(decoder: DecoderConfig) -> str:
    return "qwen3_moe" if decoder.moe else "qwen3"


def from_hf(config: dict) -> ModelConfig:
    """The model that a `config.json` of model_type "qwen3" or "qwen3_moe" describes."""
    return ModelConfig(None, None, decoder_from_hf(config), family=config["model_type"])


def to_hf(config: ModelConfig) -> dict:
    """The inverse of `from_hf`. Raises ValueError for what a config.json of Qwen3 cannot say."""
    kind = _kind(config.decoder)
    architecture = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[kind]
    written = {"architectures": [architecture], "model_type": kind, **decoder_to_hf(config.decoder)}
    if (reads := from_hf(written).decoder) != config.decoder:
        raise ValueError(
            f"Qwen3's config.json cannot say all of this decoder: {config.decoder} would be read as {reads}"
        )
    return written


def decoder_from_hf(text: dict, sections: tuple[int, ...] | None = None) -> DecoderConfig:
    """The decoder of a text config of the Qwen3 family. ValueError for what this model cannot do.

    sections: those of M-RoPE where the config says none; by default all slots read the one position of text.
    """
    expect(text, "Qwen3", attention_bias=False, hidden_act="silu", use_sliding_window=False)
    dense = sorted(text.get("mlp_only_layers") or ())
    if dense != list(range(len(dense))):
        raise ValueError(f"only first layers can be without experts; config.json says mlp_only_layers={dense}")
    moe = None
    count = text.get("num_experts", text.get("num_local_experts"))  # the second as transformers 5 writes it
    if count and text.get("model_type") != "qwen3":  # which has none, whatever else it says
        moe = MoeConfig(
            experts=count,
            top_k=text["num_experts_per_tok"],
            mlp=text["moe_intermediate_size"],
            renormalise=text.get("norm_topk_prob", True),
        )
    return read_decoder(
        text,
        rope={"theta": 5e6, "sections": sections},
        qk_norm=True,
        moe=moe,
        dense_first=len(dense) if moe else 0,
        moe_every=text.get("decoder_sparse_step", 1) if moe else 1,
    )


def decoder_to_hf(decoder: DecoderConfig) -> dict:
    """The inverse of `decoder_from_hf`; what transformers needs."""
    moe = decoder.moe
    written = write_decoder(decoder, length=262144) | {"hidden_act": "silu", "attention_bias": False}
    if moe is None:
        return written
    return written | {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.mlp,
        "norm_topk_prob": moe.renormalise,
        "decoder_sparse_step": decoder.moe_every,
        "mlp_only_layers": list(range(decoder.dense_first)),
    }


def weights(config: ModelConfig) -> list[Row]:
    """Our names and theirs, for this config; see weights/table.py."""
    return decoder_weights(config.decoder)


decoder_weights = rows.decoder
IGNORE = ()
RENAME = rows.BARE
