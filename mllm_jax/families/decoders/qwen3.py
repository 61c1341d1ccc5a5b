"""Qwen3, dense and with experts (arXiv 2505.09388): text-only models, and the decoder of Qwen3-VL.

Tensor names as in the published safetensors files.
"""

from dataclasses import replace

from mllm_jax.common.fields import MOST_EXPERTS, FieldError, count, flag, listed, nullable, only, read
from mllm_jax.families.base import DecoderFamily
from mllm_jax.families.shared.decoder_config import decoder_fields, read_decoder, write_decoder
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.moe.layer import MoeConfig

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


def _experts(experts: int, top_k: int, mlp: int) -> dict:
    return {
        "num_experts": count(experts, low=0, high=MOST_EXPERTS),
        "num_local_experts": count(None, low=0, high=MOST_EXPERTS),  # name of num_experts in transformers 5
        "num_experts_per_tok": count(top_k),
        "moe_intermediate_size": count(mlp),
        "decoder_sparse_step": count(1),
        "mlp_only_layers": nullable(listed(count(low=0), None)),
    }


_COMMON = {"attention_bias": only(False), "use_sliding_window": only(False)}
FIELDS = {  # by model_type of a text-only model
    "qwen3": decoder_fields(vocab=151936, width=4096, mlp=22016, depth=32, heads=32, kv_heads=32, length=32768)
    | _COMMON
    | {"head_dim": count(128), "layer_types": nullable(listed(only("full_attention"), None))},
    "qwen3_moe": decoder_fields(vocab=151936, width=2048, mlp=6144, depth=24, heads=32, kv_heads=4, length=32768)
    | _COMMON
    | _experts(128, 8, 768)
    | {"num_key_value_heads": count(4), "norm_topk_prob": flag(False)},
}
SEEING_FIELDS = {  # by model_type of the multimodal model
    "qwen3_vl": decoder_fields(
        vocab=151936, width=4096, mlp=22016, depth=32, heads=32, kv_heads=32, length=128000, theta=5e5
    )
    | _COMMON
    | {"head_dim": count(128)},
    "qwen3_vl_moe": decoder_fields(
        vocab=151936, width=2048, mlp=5632, depth=24, heads=16, kv_heads=16, length=128000, theta=5e5, tie=True
    )
    | _COMMON
    | _experts(60, 4, 1408)
    | {"num_key_value_heads": count(16), "norm_topk_prob": only(True)},
}


def seeing_decoder_from_hf(text: dict, kind: str) -> DecoderConfig:
    """Returns the decoder of a text_config of Qwen3-VL; `kind` is the model_type of the multimodal model.

    Raises:
      ValueError: an unsupported value.
    """
    return _decoder(read(text, SEEING_FIELDS[kind]), {"sections": (24, 20, 20)})


def _decoder(text: dict, rope: dict) -> DecoderConfig:
    if (kinds := text.get("layer_types")) is not None and len(kinds) != text["num_hidden_layers"]:
        raise FieldError("layer_types", f"must name {text['num_hidden_layers']} layers.", kinds)
    if "num_experts" not in text:
        return read_decoder(text, rope=rope, qk_norm=True)
    dense, experts = sorted(text["mlp_only_layers"] or ()), text["num_local_experts"]
    if dense != list(range(len(dense))):
        raise FieldError("mlp_only_layers", "must be the first layers.", dense)
    experts = text["num_experts"] if experts is None else experts
    if not experts:
        return read_decoder(text, rope=rope, qk_norm=True)
    if text["num_experts_per_tok"] > experts:
        raise FieldError("num_experts_per_tok", f"must be at most num_experts={experts}.", text["num_experts_per_tok"])
    moe = MoeConfig(
        experts=experts,
        top_k=text["num_experts_per_tok"],
        mlp=text["moe_intermediate_size"],
        norm_topk_prob=text["norm_topk_prob"],
    )
    moe_layer_freq = text["decoder_sparse_step"]
    return read_decoder(
        text, rope=rope, qk_norm=True, moe=moe, num_dense_layers=len(dense), moe_layer_freq=moe_layer_freq
    )


class Qwen3(DecoderFamily):
    name = "Qwen3"
    architectures = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    decoders = SIZES

    def model_type(self, decoder: DecoderConfig) -> str:
        return "qwen3_moe" if decoder.moe else "qwen3"

    def decoder_from_hf(self, text: dict) -> DecoderConfig:
        return _decoder(read(text, FIELDS[text["model_type"]]), {})

    def decoder_to_hf(self, decoder: DecoderConfig) -> dict:
        moe = decoder.moe
        fields = write_decoder(decoder, length=262144) | {"hidden_act": "silu", "attention_bias": False}
        if moe is None:
            return fields
        return fields | {
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.mlp,
            "norm_topk_prob": moe.norm_topk_prob,
            "decoder_sparse_step": decoder.moe_layer_freq,
            "mlp_only_layers": list(range(decoder.num_dense_layers)),
        }
