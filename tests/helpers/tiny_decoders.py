"""Random tiny decoders of transformers, of the families that differ from Llama in a few fields."""

import torch
import transformers
from reference import perturb

SMALL = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=512)
SMALL |= dict(num_attention_heads=4, num_key_value_heads=2)
BLENDED = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LISTED = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=64)
LISTED |= dict(short_factor=[1.0, 1.1, 1.2, 1.5, 2.0, 2.5], long_factor=[1.0, 2.0, 3.0, 5.0, 8.0, 9.0])
CASES = {
    "llama": ("Llama", SMALL | dict(rope_parameters=BLENDED | dict(original_max_position_embeddings=64))),
    "llama_biased": (
        "Llama",
        SMALL
        | dict(
            attention_bias=True, mlp_bias=True, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)
        ),
    ),
    "mistral": ("Mistral", SMALL | dict(head_dim=32, sliding_window=5)),
    "qwen2": ("Qwen2", SMALL | dict(tie_word_embeddings=True)),
    "qwen2_windows": (
        "Qwen2",
        SMALL | dict(num_hidden_layers=3, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    ),
    "phi3": (
        "Phi3",
        SMALL
        | dict(sliding_window=6, original_max_position_embeddings=64)
        | dict(rope_parameters=LISTED | dict(partial_rotary_factor=0.75)),
    ),
    "gpt2": ("GPT2", SMALL | dict(n_inner=96)),
    "opt": ("OPT", SMALL | dict(ffn_dim=96)),
    "gemma": ("Gemma", SMALL | dict(num_key_value_heads=1, head_dim=24)),
    "gemma2": (
        "Gemma2",
        SMALL
        | dict(num_hidden_layers=4, head_dim=24, query_pre_attn_scalar=20, sliding_window=5)
        | dict(attn_logit_softcapping=8.0, final_logit_softcapping=6.0),
    ),
}
OTHERS = {
    "llama_dynamic": (
        "Llama",
        SMALL | dict(rms_norm_eps=1e-6, rope_parameters=dict(rope_type="dynamic", rope_theta=1e6, factor=2.0)),
    )
}


def tiny(name: str):
    """A random transformers model; what its init leaves at zero or one is perturbed."""
    kind, fields = (CASES | OTHERS)[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (".layers." in name or ".h." in name) and parameter.ndim == 2:
                parameter.mul_(3.0)  # or a token's embedding outweighs what the layers add, and greedy tokens repeat
    return model
