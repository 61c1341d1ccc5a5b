"""A tiny random model of transformers for every family that it knows, and inputs that use all of it."""

import jax
import numpy as np
import safetensors.torch
import torch
import transformers
from reference import batch_of, perturb, prompt, to_torch

import mllm_jax

IMAGE, VIDEO, START, END = 150, 151, 152, 153
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT = SIZES | dict(vocab_size=200, num_key_value_heads=2, max_position_embeddings=64)
NO_TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
LATENT = TEXT | NO_TOKENS | dict(num_key_value_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8)
LATENT |= dict(v_head_dim=12, q_lora_rank=12, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2)
LATENT |= dict(moe_intermediate_size=24, n_group=2, topk_group=1)
SQUARE = SIZES | dict(image_size=16, patch_size=4)
CLIP = SQUARE | dict(model_type="clip_vision_model")
SIGLIP = SQUARE | dict(model_type="siglip_vision_model", vision_use_head=False)
INTERN = SIZES | dict(image_size=[16, 16], patch_size=[4, 4], attention_bias=True)
NAFLEX = SIZES | dict(patch_size=4, num_patches=16)
TWIN = SIZES | dict(vocab_size=200, max_position_embeddings=12)
TOKENS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
ROPE = dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 1, 1])
INTERLEAVED = ROPE | dict(mrope_section=[4, 2, 2], mrope_interleaved=True)
QWEN = dict(depth=2, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
QWEN3 = QWEN | dict(hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=36)
QWEN3 |= dict(deepstack_visual_indexes=[0])
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
FILE = "model.safetensors"
CONDITIONAL = "ForConditionalGeneration"


def _seeing(vision: dict, text: str, **fields) -> dict:
    return dict(vision_config=vision, text_config=dict(model_type=text, **TEXT, **NO_TOKENS), **fields)


def _qwen(vision: dict, **text) -> dict:
    return dict(vision_config=vision, text_config=TEXT | NO_TOKENS | text, **TOKENS)


MODELS = {  # model_type -> how transformers' classes begin, how the model's ends, its config
    "llama": ("Llama", "ForCausalLM", TEXT | NO_TOKENS),
    "mistral": ("Mistral", "ForCausalLM", TEXT | NO_TOKENS),
    "qwen2": ("Qwen2", "ForCausalLM", TEXT | NO_TOKENS),
    "qwen3": ("Qwen3", "ForCausalLM", TEXT | NO_TOKENS | dict(head_dim=16)),
    "qwen3_moe": ("Qwen3Moe", "ForCausalLM", TEXT | NO_TOKENS | MOE | dict(head_dim=16)),
    "gemma": ("Gemma", "ForCausalLM", TEXT | NO_TOKENS | dict(head_dim=16)),
    "gemma2": ("Gemma2", "ForCausalLM", TEXT | NO_TOKENS | dict(head_dim=16, query_pre_attn_scalar=16)),
    "phi3": ("Phi3", "ForCausalLM", TEXT | NO_TOKENS),
    "gpt2": ("GPT2", "LMHeadModel", TEXT | NO_TOKENS | dict(n_inner=48)),
    "opt": ("OPT", "ForCausalLM", TEXT | NO_TOKENS | dict(ffn_dim=48, word_embed_proj_dim=32)),
    "deepseek_v2": ("DeepseekV2", "ForCausalLM", LATENT | dict(topk_method="group_limited_greedy")),
    "deepseek_v3": ("DeepseekV3", "ForCausalLM", LATENT | dict(num_mtp_layers=0)),
    "llava": ("Llava", CONDITIONAL, _seeing(CLIP, "llama", image_token_index=IMAGE, image_seq_length=16)),
    "llava_next": (
        "LlavaNext",
        CONDITIONAL,
        _seeing(CLIP, "mistral", image_token_index=IMAGE, image_seq_length=16, image_grid_pinpoints=PINPOINTS),
    ),
    "llava_onevision": (
        "LlavaOnevision",
        CONDITIONAL,
        _seeing(SIGLIP, "qwen2", image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS),
    ),
    "internvl": ("InternVL", CONDITIONAL, _seeing(INTERN, "qwen2", image_token_id=IMAGE)),
    "paligemma": ("PaliGemma", CONDITIONAL, _seeing(SIGLIP, "gemma", image_token_index=IMAGE, projection_dim=32)),
    "blip-2": (
        "Blip2",
        CONDITIONAL,
        dict(
            vision_config=SQUARE | dict(layer_norm_eps=1e-6),
            qformer_config=SIZES | dict(num_hidden_layers=3, encoder_hidden_size=32),
            text_config=dict(model_type="opt", **TEXT, **NO_TOKENS, ffn_dim=48, word_embed_proj_dim=32),
            num_query_tokens=5,
            image_token_index=IMAGE,
        ),
    ),
    "instructblip": (
        "InstructBlip",
        CONDITIONAL,
        dict(
            vision_config=SQUARE | dict(layer_norm_eps=1e-6),
            qformer_config=SIZES
            | dict(num_hidden_layers=3, encoder_hidden_size=32, vocab_size=60, max_position_embeddings=12),
            text_config=dict(model_type="llama", **TEXT, **NO_TOKENS),
            num_query_tokens=5,
            image_token_index=IMAGE,
        ),
    ),
    "qwen2_vl": (
        "Qwen2VL",
        CONDITIONAL,
        _qwen(QWEN | dict(embed_dim=32, hidden_size=32, mlp_ratio=2), rope_parameters=ROPE),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        CONDITIONAL,
        _qwen(
            QWEN
            | dict(hidden_size=32, intermediate_size=48, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1]),
            rope_parameters=ROPE,
        ),
    ),
    "qwen3_vl": ("Qwen3VL", CONDITIONAL, _qwen(QWEN3, head_dim=16, rope_parameters=INTERLEAVED)),
    "qwen3_vl_moe": ("Qwen3VLMoe", CONDITIONAL, _qwen(QWEN3, head_dim=16, rope_parameters=INTERLEAVED, **MOE)),
    "clip": (
        "CLIP",
        "Model",
        dict(
            text_config=TWIN | dict(projection_dim=24, eos_token_id=190, bos_token_id=1, pad_token_id=0),
            vision_config=SQUARE | dict(projection_dim=24),
            projection_dim=24,
        ),
    ),
    "siglip": ("Siglip", "Model", dict(text_config=TWIN, vision_config=SQUARE)),
    "siglip2": ("Siglip2", "Model", dict(text_config=TWIN, vision_config=NAFLEX)),
    "clip_vision_model": ("CLIPVision", "Model", SQUARE),
    "siglip_vision_model": ("SiglipVision", "Model", SQUARE),
    "siglip2_vision_model": ("Siglip2Vision", "Model", NAFLEX),
    "dinov2": (
        "Dinov2",
        "Model",
        dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4, use_swiglu_ffn=True
        ),
    ),
    "dinov2_with_registers": (
        "Dinov2WithRegisters",
        "Model",
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4, mlp_ratio=2),
    ),
}


def class_of(kind: str):
    first, last, _ = MODELS[kind]
    return getattr(transformers, first + last)


def tiny(kind: str, **changes):
    """A random model in fp32; what its init leaves at zero or one is perturbed."""
    first, _, fields = MODELS[kind]
    config = getattr(transformers, f"{first}Config")(**fields | changes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = class_of(kind)(config).eval().float()
    perturb(model)
    return model


def inputs_of(kind: str, model) -> dict[str, np.ndarray]:
    """A row of text, with an image where the model sees; of a tower two images, of a dual encoder two texts too."""
    rng = np.random.default_rng(0)
    first, last, _ = MODELS[kind]
    if last == "Model":
        texts = {"input_ids": rng.integers(3, 189, (2, 12))} if hasattr(model.config, "text_config") else {}
        if kind == "clip":
            texts["input_ids"][:, -1] = 190
        if not first.startswith("Siglip2"):
            return texts | {"pixel_values": rng.standard_normal((2, 3, 16, 16)).astype(np.float32)}
        shapes = np.array([[4, 6], [3, 8]])
        mask = (np.arange(24) < shapes.prod(1)[:, None]).astype(np.int64)
        pixels = rng.standard_normal((2, 24, 48)).astype(np.float32) * mask[..., None]
        return texts | {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if first.startswith("Qwen") and last == CONDITIONAL:
        return batch_of([prompt(rng, 3, ("image", 4, 6), 4)])
    tokens, pixels = rng.integers(5, 149, (2, 6)), {}
    if last == CONDITIONAL:
        tiles = 3 if kind in ("llava_next", "llava_onevision") else 1  # one of each half of 20 x 30, and the whole
        pixels = {"pixel_values": rng.standard_normal((tiles, 3, 16, 16)).astype(np.float32)}
        count = {"internvl": 4, "blip-2": 5, "instructblip": 5}.get(kind, 16)
        if tiles > 1:
            pixels = {"pixel_values": pixels["pixel_values"][None], "image_sizes": np.array([[16, 30]])}
            with torch.no_grad():
                count = len(model.model.get_image_features(**to_torch(pixels)).pooler_output[0])
        if kind == "instructblip":
            texts = np.array([[*rng.integers(1, 60, 7), 0, 0]])
            pixels |= {"qformer_input_ids": texts, "qformer_attention_mask": (texts > 0).astype(np.int64)}
        tokens = [[*tokens[0], *[IMAGE] * count, *tokens[1]]]
    ids = np.array(tokens)
    return pixels | {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def outputs_of(kind: str, model, inputs) -> list[np.ndarray]:
    """Outputs of transformers' model: logits, embeddings, or features."""
    with torch.no_grad():
        out = model(**to_torch(inputs))
    names = ("logits",) if "logits" in out else ("image_embeds", "text_embeds", "last_hidden_state")
    return [out[name].numpy() for name in names if name in out]


def ours_of(vlm, inputs) -> list[np.ndarray]:
    """The same of ours."""
    out = jax.jit(vlm.model.apply)({"params": vlm.params}, mllm_jax.from_hf_inputs(vlm.config, inputs))
    if out.image_embeddings is not None:
        return [np.asarray(out.image_embeddings), np.asarray(out.text_embeddings)]
    return [np.asarray(out.features if out.logits is None else out.logits)]


def assert_equal_logits(kind: str, folder, vlm):
    """Ours give what transformers gives that reads the same folder."""
    model = class_of(kind).from_pretrained(folder, attn_implementation="eager").eval()
    inputs = inputs_of(kind, model)
    for found, expected in zip(ours_of(vlm, inputs), outputs_of(kind, model, inputs), strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected[:, : found.shape[1]], atol=1e-4, rtol=1e-4)


def change_file(source, target, change):
    """Copies a model's folder with other tensors in its file."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = change(safetensors.torch.load_file(source / FILE))
    safetensors.torch.save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, target / FILE)
    return target
