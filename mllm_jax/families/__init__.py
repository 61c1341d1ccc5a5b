"""Published models: one file per family, looked up by the model_type of a config.json.

Each file has sizes(name), from_hf(json), to_hf(config), weights(config), IGNORE, RENAME.
"""

from mllm_jax.families import deepseek, qwen3, qwen3_vl

FAMILIES = {
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
    "qwen3": qwen3,
    "qwen3_moe": qwen3,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl,
}
