"""Rotary positions in all layouts of config.json: transformers' tables, and full models that read images."""

import copy
import importlib

import numpy as np
import pytest
import torch
import transformers
from reference import END, IMAGE, START, VIDEO, batch_of, perturb, prompt, to_torch

import mllm_jax
from mllm_jax.common.fields import FieldError
from mllm_jax.families import FAMILIES
from mllm_jax.families.decoders import qwen2, qwen3

SMALL = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, max_position_embeddings=64)
HEADS = SMALL | dict(head_dim=16)
CLASSES = {  # transformers' config, module and class of rotary positions, and our reader of the same file
    "llama": ("LlamaConfig", "llama", "LlamaRotaryEmbedding", SMALL),
    "mistral": ("MistralConfig", "mistral", "MistralRotaryEmbedding", SMALL),
    "qwen2": ("Qwen2Config", "qwen2", "Qwen2RotaryEmbedding", HEADS),
    "qwen3": ("Qwen3Config", "qwen3", "Qwen3RotaryEmbedding", HEADS),
    "qwen3_moe": ("Qwen3MoeConfig", "qwen3_moe", "Qwen3MoeRotaryEmbedding", HEADS),
    "gemma": ("GemmaConfig", "gemma", "GemmaRotaryEmbedding", HEADS),
    "gemma2": ("Gemma2Config", "gemma2", "Gemma2RotaryEmbedding", HEADS),
    "phi3": ("Phi3Config", "phi3", "Phi3RotaryEmbedding", HEADS | dict(pad_token_id=0)),
    "qwen2_vl": ("Qwen2VLTextConfig", "qwen2_vl", "Qwen2VLRotaryEmbedding", HEADS),
    "qwen2_5_vl": ("Qwen2_5_VLTextConfig", "qwen2_5_vl", "Qwen2_5_VLRotaryEmbedding", HEADS),
    "qwen3_vl": ("Qwen3VLTextConfig", "qwen3_vl", "Qwen3VLTextRotaryEmbedding", HEADS),
    "qwen3_vl_moe": ("Qwen3VLMoeTextConfig", "qwen3_vl_moe", "Qwen3VLMoeTextRotaryEmbedding", HEADS),
}
SECTIONS = {"qwen2_vl": [2, 3, 3], "qwen2_5_vl": [2, 3, 3], "qwen3_vl": [3, 3, 2], "qwen3_vl_moe": [3, 3, 2]}
LENGTH = "original_max_position_embeddings"
LISTS = dict(short_factor=[1.0 + n / 9 for n in range(8)], long_factor=[1.0 + n for n in range(8)])
YARN = {"type": "yarn", "factor": 4.0, LENGTH: 32}
BLENDED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: 32}
LAYOUTS = {  # what stands in config.json of rotary positions
    "nothing": {},
    "theta beside": {"rope_theta": 3e4},
    "theta inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
    "theta beside parameters without": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 3e4},
    "theta twice": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}, "rope_theta": 3e4},
    "scaling": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 3e4},
    "scaling without theta": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "scaling null": {"rope_scaling": None, "rope_theta": 3e4, "rope_parameters": None},
    "scaling beside parameters": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 2e4},
    },
    "both types": {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 4.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_parameters": BLENDED},
    "llama3 length beside": {"rope_parameters": BLENDED, LENGTH: 16},
    "llama3 length of texts": {"rope_scaling": {k: v for k, v in BLENDED.items() if k != LENGTH}},
    "yarn": {"rope_scaling": YARN},
    "yarn length of texts": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn without factor": {"rope_scaling": {"type": "yarn", "factor": None, LENGTH: 16}},
    "yarn attention_factor": {"rope_scaling": YARN | {"attention_factor": 0.7}},
    "yarn attention_factor null": {"rope_scaling": YARN | {"attention_factor": None, "beta_fast": None}},
    "yarn both mscale": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}},
    "yarn one mscale": {"rope_scaling": YARN | {"mscale": 0.7}},
    "yarn betas": {"rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 2, "factor": 9}},
    "yarn not truncated": {"rope_scaling": YARN | {"truncate": False}},
    "longrope": {"rope_scaling": {"type": "longrope", **LISTS, LENGTH: 32}, LENGTH: 32},
    "longrope factor": {"rope_scaling": {"type": "longrope", **LISTS, LENGTH: 32, "factor": 3.0}, LENGTH: 32},
    "longrope attention_factor": {
        "rope_scaling": {"type": "longrope", **LISTS, LENGTH: 32, "attention_factor": 1.3},
        LENGTH: 32,
    },
}


def table_of(kind: str, stated: dict, position: np.ndarray) -> np.ndarray:
    """Cosines and sines [2 B T H/2] of transformers' class, for positions [B T 3]."""
    config_class, module, rotary_class, fields = CLASSES[kind]
    config = getattr(transformers, config_class, None) or getattr(
        importlib.import_module(f"transformers.models.{module}"), config_class
    )
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    rotary = getattr(modeling, rotary_class)(config(**fields, **copy.deepcopy(stated)))
    ids = torch.from_numpy(position).permute(2, 0, 1)
    found = rotary(torch.ones(1), ids if kind in SECTIONS else ids[0])
    return np.stack([part[..., : part.shape[-1] // 2].numpy() for part in found])


def ours(kind: str, stated: dict):
    """The attention of our config of the same file."""
    text = CLASSES[kind][3] | copy.deepcopy(stated)
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        return qwen2.seeing_decoder_from_hf(text).attention
    if kind in ("qwen3_vl", "qwen3_vl_moe"):
        return qwen3.seeing_decoder_from_hf(text, kind).attention
    return FAMILIES[kind].from_hf(text | {"model_type": kind}).decoder.attention


@pytest.mark.parametrize("kind", CLASSES)
def test_tables_equal_transformers(kind):
    """Beyond the length of the first training; a layout that transformers refuses is refused by name."""
    position = np.sort(np.random.default_rng(0).integers(0, 150, (1, 40, 3)), axis=1)
    position = position if kind in SECTIONS else position[..., :1].repeat(3, -1)
    read = 0
    for name, stated in LAYOUTS.items():
        stated = copy.deepcopy(stated)
        if kind in SECTIONS:
            place = next((p for p in ("rope_scaling", "rope_parameters") if stated.get(p)), "rope_parameters")
            stated[place] = (stated.get(place) or {}) | {"mrope_section": SECTIONS[kind]}
        try:
            expected = table_of(kind, stated, position)
        except Exception:
            with pytest.raises(FieldError):
                ours(kind, stated)
            continue
        read += 1
        found = np.stack(ours(kind, stated).rope(position, np.ones(position.shape[:2], np.int32)))
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=name)
    assert read > (8 if kind == "phi3" else 20)


def test_heads_that_turn_in_part():
    """Only Phi reads partial_rotary_factor, at both places; other families refuse it."""
    position = np.arange(30)[None, :, None].repeat(3, -1)
    for stated in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.75}}):
        found = np.stack(ours("phi3", stated).rope(position, np.ones((1, 30), np.int32)))
        np.testing.assert_allclose(found, table_of("phi3", stated, position), atol=2e-5)
        with pytest.raises(FieldError, match="partial_rotary_factor=0.*: must be 1"):
            ours("llama", stated)


def recipe(factor: float, length: int, sections: list[int], **more) -> dict:
    """The setting for long texts from the READMEs of Qwen2.5-VL and Qwen3-VL."""
    return {"type": "yarn", "mrope_section": sections, "factor": factor, LENGTH: length, **more}


VISION = dict(depth=2, hidden_size=48, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
VISION |= dict(intermediate_size=72, out_hidden_size=64)
SEEING = {
    "Qwen2_5_VL": (
        SMALL | dict(rope_scaling=recipe(3, 16, [2, 3, 3])),
        VISION | dict(window_size=16, fullatt_block_indexes=[1]),
    ),
    "Qwen3VL": (
        HEADS | dict(rope_scaling=recipe(3.0, 16, [3, 3, 2], mrope_interleaved=True, attention_factor=1.25)),
        VISION | dict(num_position_embeddings=36, deepstack_visual_indexes=[0]),
    ),
}


@pytest.mark.parametrize("name", SEEING)
def test_yarn_with_images(name, tmp_path):
    """Logits, and greedy tokens through the cache, of texts that are longer than those of the first training."""
    text, vision = SEEING[name]
    tokens = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    text = text | dict(bos_token_id=None, eos_token_id=None)
    config = getattr(transformers, f"{name}Config")(text_config=copy.deepcopy(text), vision_config=vision, **tokens)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval().float()
    perturb(model)
    assert model.model.language_model.rotary_emb.rope_type == "yarn"
    model.save_pretrained(tmp_path)
    vlm = mllm_jax.load_pretrained(tmp_path)
    rng = np.random.default_rng(3)
    inputs = batch_of([prompt(rng, 20, ("image", 12, 6), 24), prompt(rng, 9, ("image", 4, 4), 3)], "left")
    batch = mllm_jax.from_hf_inputs(vlm.config, inputs)
    with torch.no_grad():
        expected = model(**to_torch(inputs)).logits.numpy()
        ids = model.generate(**to_torch(inputs), max_new_tokens=8, do_sample=False, pad_token_id=0).numpy()
    real = inputs["attention_mask"] == 1
    found = np.asarray(vlm.model.apply({"params": vlm.params}, batch).logits)
    np.testing.assert_allclose(found[real], expected[real], atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(mllm_jax.generate_ids(vlm, batch, 8), ids[:, inputs["input_ids"].shape[1] :])
    mllm_jax.save_pretrained(vlm, tmp_path / "again")
    assert mllm_jax.load_pretrained(tmp_path / "again").config == vlm.config


@pytest.mark.parametrize(
    "stated",
    [
        {"rope_theta": 3e4},
        {"rope_scaling": YARN | {"attention_factor": 0.7}, "rope_theta": 3e4},
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}},
    ],
    ids=["plain", "attention_factor", "mscale"],
)
def test_latent_attention_turns_as_in_transformers(stated):
    modeling = importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
    fields = SMALL | dict(num_key_value_heads=4, num_experts_per_tok=2, n_routed_experts=8, n_group=4, topk_group=2)
    fields |= dict(qk_rope_head_dim=16, moe_intermediate_size=32)
    rotary = modeling.DeepseekV3RotaryEmbedding(transformers.DeepseekV3Config(**fields, **copy.deepcopy(stated)))
    position = np.arange(150)[None, :, None].repeat(3, -1)
    expected = rotary(torch.ones(1), torch.from_numpy(position[..., 0]))
    attention = FAMILIES["deepseek_v3"].from_hf(fields | stated | {"model_type": "deepseek_v3"}).decoder.attention
    for found, wanted in zip(attention.rope(position, np.ones((1, 150), np.int32)), expected):
        np.testing.assert_allclose(found, wanted[..., :8], atol=2e-5)
