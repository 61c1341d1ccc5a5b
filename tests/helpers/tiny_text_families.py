"""Random tiny DeepSeek and Qwen3 models of transformers, and tokens for any decoder."""

import numpy as np
import torch
import transformers
from reference import perturb

SMALL = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=512)
GROUPED = SMALL | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32)
LATENT = SMALL | dict(num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=32, qk_nope_head_dim=16)
LATENT |= dict(qk_rope_head_dim=8, v_head_dim=12, rms_norm_eps=1e-5, q_lora_rank=24, first_k_dense_replace=1)
LATENT |= dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, n_group=4, topk_group=2)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=40.0, original_max_position_embeddings=64)
CASES = {
    "deepseek_v2": (
        "DeepseekV2",
        LATENT | dict(num_hidden_layers=3, topk_method="group_limited_greedy", routed_scaling_factor=16.0),
    ),
    "deepseek_v2_lite": (
        "DeepseekV2",
        LATENT
        | dict(q_lora_rank=None, first_k_dense_replace=0, topk_method="greedy", n_group=1, topk_group=1)
        | dict(rope_parameters=YARN | dict(mscale=0.707, mscale_all_dim=0.707)),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT | dict(num_mtp_layers=0, rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.5)),
    ),
    "qwen3": ("Qwen3", GROUPED | dict(tie_word_embeddings=True)),
    "qwen3_moe": (
        "Qwen3Moe",
        GROUPED | dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True),
    ),
}
LENGTHS = (24, 9, 17)


def tiny(name: str, **changes):
    """A random transformers model; what its init leaves at zero or one is perturbed."""
    kind, fields = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(fields | changes), eos_token_id=None, bos_token_id=None)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().float()
    perturb(model)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.3)
    return model


def inputs_of(side: str = "right") -> dict[str, np.ndarray]:
    """Padded rows of random tokens; every one is a target."""
    rng, longest = np.random.default_rng(3), max(LENGTHS)
    mask = np.array([[1] * n + [0] * (longest - n) for n in LENGTHS])
    ids = rng.integers(5, 200, mask.shape) * mask
    if side == "left":
        mask, ids = (np.array([np.roll(row, longest - n) for row, n in zip(x, LENGTHS)]) for x in (mask, ids))
    first = np.arange(longest) == mask.argmax(axis=1)[:, None]  # nothing is before it to predict it from
    return {"input_ids": ids, "attention_mask": mask, "labels": np.where((mask == 1) & ~first, ids, -100)}
