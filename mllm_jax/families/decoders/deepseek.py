"""DeepSeek-V2, V2-Lite (arXiv 2405.04434) and V3 (arXiv 2412.19437): latent attention, and experts after dense layers.

Tensor names follow the published safetensors files.
"""

from dataclasses import replace

from mllm_jax.common.fields import MOST_EXPERTS, FieldError, Json, count, flag, nullable, only, positive, read, word
from mllm_jax.families.base import DecoderFamily
from mllm_jax.families.shared import rows as common
from mllm_jax.families.shared.decoder_config import decoder_fields
from mllm_jax.families.shared.rope import rope_of, stretch_from_hf, stretch_to_hf
from mllm_jax.model.decoder import DecoderConfig, LayerKind
from mllm_jax.nn.attention.mla import MlaConfig
from mllm_jax.nn.moe.layer import MoeConfig
from mllm_jax.nn.rope import YarnRopeScaling
from mllm_jax.weights.table import Row

V2, V3 = "deepseek_v2", "deepseek_v3"
_YARN = YarnRopeScaling(factor=40.0, length=4096, mscale=0.707, mscale_all_dim=0.707)
_LITE = DecoderConfig(
    vocab=102400,
    width=2048,
    layers=27,
    attention=MlaConfig(heads=16, rope_scaling=_YARN),
    mlp=10944,
    moe=MoeConfig(experts=64, top_k=6, mlp=1408, shared_expert_dim=2 * 1408, norm_topk_prob=False),
    num_dense_layers=1,
)

SIZES = {
    "v2-lite": _LITE,
    "v2": replace(
        _LITE,
        width=5120,
        layers=60,
        attention=MlaConfig(heads=128, q_rank=1536, rope_scaling=_YARN),
        mlp=12288,
        moe=MoeConfig(
            experts=160,
            top_k=6,
            mlp=1536,
            shared_expert_dim=2 * 1536,
            norm_topk_prob=False,
            scale=16.0,
            n_group=8,
            topk_group=3,
        ),
    ),
    "v3": replace(
        _LITE,
        vocab=129280,
        width=7168,
        layers=61,
        attention=MlaConfig(heads=128, q_rank=1536, rope_scaling=replace(_YARN, mscale=1.0, mscale_all_dim=1.0)),
        mlp=18432,
        moe=MoeConfig(
            experts=256,
            top_k=8,
            mlp=2048,
            shared_expert_dim=2048,
            score_func="sigmoid",
            bias=True,
            scale=2.5,
            n_group=8,
            topk_group=4,
            group_best=2,
        ),
        num_dense_layers=3,
    ),
}


_EXPERTS = {
    "attention_bias": only(False),
    "moe_layer_freq": only(1),
    "kv_lora_rank": count(512),
    "q_lora_rank": nullable(count(1536)),
    "qk_nope_head_dim": count(128),
    "qk_rope_head_dim": count(64),
    "v_head_dim": count(128),
    "routed_scaling_factor": positive(1.0),
}
FIELDS = {  # by model_type
    V2: decoder_fields(vocab=102400, width=4096, mlp=11008, depth=32, heads=32, kv_heads=None, length=2048)
    | _EXPERTS
    | {
        "mlp_bias": only(False),
        "first_k_dense_replace": count(0, low=0),
        "n_routed_experts": count(64, high=MOST_EXPERTS),
        "n_shared_experts": count(2, low=0, high=MOST_EXPERTS),
        "moe_intermediate_size": count(1407),
        "num_experts_per_tok": count(),
        "topk_method": word("greedy", ("greedy", "group_limited_greedy")),
        "n_group": nullable(count(None)),
        "topk_group": nullable(count(None)),
        "norm_topk_prob": only(False),  # ignored by transformers, used by DeepSeek's code
    },
    V3: decoder_fields(vocab=129280, width=7168, mlp=18432, depth=61, heads=128, kv_heads=128, length=4096)
    | _EXPERTS
    | {
        "rope_interleave": only(True),
        "first_k_dense_replace": count(3, low=0),
        "n_routed_experts": count(256, high=MOST_EXPERTS),
        "n_shared_experts": count(1, low=0, high=MOST_EXPERTS),
        "moe_intermediate_size": count(2048),
        "num_experts_per_tok": count(8),
        "routed_scaling_factor": positive(2.5),
        "n_group": count(8),
        "topk_group": count(4),
        "norm_topk_prob": flag(True),
    },
}


def _moe_from_hf(config: Json, bias: bool) -> MoeConfig:
    grouped = bias or config["topk_method"] == "group_limited_greedy"
    for name in ("n_group", "topk_group") if grouped else ():
        if config[name] is None:
            raise FieldError(name, "must be an integer if experts are chosen in groups.", None)
    groups, experts, top_k = (
        config["n_group"] if grouped else 1,
        config["n_routed_experts"],
        config["num_experts_per_tok"],
    )
    topk_group = config["topk_group"] if groups > 1 else 1
    if experts % groups:
        raise FieldError("n_group", f"must divide n_routed_experts={experts}.", groups)
    if topk_group > groups:
        raise FieldError("topk_group", f"must be at most n_group={groups}.", topk_group)
    if top_k > (limit := experts // groups * topk_group):
        raise FieldError("num_experts_per_tok", f"must be at most {limit}, the experts of topk_group groups.", top_k)
    return MoeConfig(
        experts=experts,
        top_k=top_k,
        mlp=config["moe_intermediate_size"],
        shared_expert_dim=config["n_shared_experts"] * config["moe_intermediate_size"],
        score_func="sigmoid" if bias else "softmax",
        bias=bias,
        norm_topk_prob=bias and config["norm_topk_prob"],
        scale=float(config["routed_scaling_factor"]),
        n_group=groups,
        topk_group=topk_group,
        group_best=2 if bias and groups > 1 else 1,
    )


class Deepseek(DecoderFamily):
    name = "DeepSeek"
    architectures = {V2: "DeepseekV2ForCausalLM", V3: "DeepseekV3ForCausalLM"}
    decoders = SIZES
    # V3's published files contain a layer for multi-token prediction, which the model does not use.
    ignore = (r"model\.layers\.61\..*",)

    def model_type(self, decoder: DecoderConfig) -> str:
        return V3 if decoder.moe.score_func == "sigmoid" else V2

    def decoder_from_hf(self, config: dict) -> DecoderConfig:
        kind = config["model_type"]
        config = read(config, FIELDS[kind])
        if config["num_key_value_heads"] not in (None, config["num_attention_heads"]):
            raise FieldError("num_key_value_heads", "must be num_attention_heads.", config["num_key_value_heads"])
        rope = rope_of(config, {"default": "default", "yarn": "yarn"})
        if bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim")):
            raise FieldError(
                "mscale", "has no agreed meaning without mscale_all_dim. Set both or neither.", rope["mscale"]
            )
        rope_dim = config["qk_rope_head_dim"]
        return DecoderConfig(
            vocab=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            attention=MlaConfig(
                heads=config["num_attention_heads"],
                kv_rank=config["kv_lora_rank"],
                nope_dim=config["qk_nope_head_dim"],
                rope_dim=rope_dim,
                v_dim=config["v_head_dim"],
                q_rank=config["q_lora_rank"] or 0,
                rope_theta=float(rope["rope_theta"]),
                rope_scaling=stretch_from_hf(rope, config["max_position_embeddings"], rope_dim // 2),
            ),
            mlp=config["intermediate_size"],
            moe=_moe_from_hf(config, bias=kind == V3),
            num_dense_layers=config["first_k_dense_replace"],
            norm_eps=config["rms_norm_eps"],
            tie_embeddings=config["tie_word_embeddings"],
        )

    def decoder_to_hf(self, decoder: DecoderConfig) -> dict:
        attention, moe = decoder.attention, decoder.moe
        if not isinstance(attention, MlaConfig) or moe is None:
            raise ValueError(
                f"decoder: DeepSeek's config.json requires latent attention and experts. Change its fields: {decoder}"
            )
        kind, yarn = self.model_type(decoder), attention.rope_scaling
        rope = {"rope_type": "default", "rope_theta": attention.rope_theta, **stretch_to_hf(yarn)}
        method = {V3: "noaux_tc", V2: "group_limited_greedy" if moe.n_group > 1 else "greedy"}[kind]
        fields = {
            "vocab_size": decoder.vocab,
            "hidden_size": decoder.width,
            "num_hidden_layers": decoder.layers,
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.heads,
            "kv_lora_rank": attention.kv_rank,
            "q_lora_rank": attention.q_rank or None,
            "qk_nope_head_dim": attention.nope_dim,
            "qk_rope_head_dim": attention.rope_dim,
            "v_head_dim": attention.v_dim,
            "intermediate_size": decoder.mlp,
            "hidden_act": "silu",
            "attention_bias": False,
            "rms_norm_eps": decoder.norm_eps,
            "max_position_embeddings": int(yarn.factor * yarn.length) if yarn else 163840,
            "tie_word_embeddings": decoder.tie_embeddings,
            "rope_parameters": rope,
            "n_routed_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.mlp,
            "n_shared_experts": moe.shared_expert_dim // moe.mlp,
            "first_k_dense_replace": decoder.num_dense_layers,
            "scoring_func": moe.score_func,
            "topk_method": method,
            "n_group": moe.n_group,
            "topk_group": moe.topk_group,
            "norm_topk_prob": moe.norm_topk_prob,
            "routed_scaling_factor": moe.scale,
        }
        return fields | ({"num_nextn_predict_layers": 0} if kind == V3 else {})

    def decoder_weights(self, decoder: DecoderConfig, prefix: str = "model", head: str = "lm_head.weight") -> list[Row]:
        layer = f"{prefix}.layers.{{n}}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"

        def rows(kind: LayerKind) -> list[Row]:
            block = common.gated_mlp("mlp", mlp)
            if kind.experts:
                block = [
                    Row("mlp/router/w", f"{mlp}.gate.weight", "e d -> d e"),
                    # float32: in bf16, rounding of this bias would change which experts are selected.
                    Row("mlp/bias", f"{mlp}.gate.e_score_correction_bias", dtype="float32"),
                    *common.experts_one_by_one("mlp", f"{mlp}.experts"),
                    *common.gated_mlp("mlp/shared", f"{mlp}.shared_experts"),
                ]
            return [
                Row("norm1/scale", f"{layer}.input_layernorm.weight"),
                Row("norm2/scale", f"{layer}.post_attention_layernorm.weight"),
                *common.linear("attention/q", f"{attention}.q_proj", "(n h) d -> d n h"),
                *common.linear("attention/q_down", f"{attention}.q_a_proj", "z d -> d z"),
                Row("attention/q_norm/scale", f"{attention}.q_a_layernorm.weight"),
                *common.linear("attention/q_up", f"{attention}.q_b_proj", "(n h) z -> z n h"),
                *common.linear("attention/kv_down", f"{attention}.kv_a_proj_with_mqa", "z d -> d z"),
                Row("attention/kv_norm/scale", f"{attention}.kv_a_layernorm.weight"),
                *common.linear("attention/kv_up", f"{attention}.kv_b_proj", "(n h) z -> z n h"),
                *common.linear("attention/out", f"{attention}.o_proj", "d (n h) -> n h d"),
                *block,
            ]

        return [
            Row("decoder/embed", f"{prefix}.embed_tokens.weight"),
            *common.layers(decoder, rows),
            Row("decoder/norm/scale", f"{prefix}.norm.weight"),
            Row("decoder/head/w", head),
        ]
