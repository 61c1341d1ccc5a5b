"""Weights of every family in all layouts that transformers writes or reads."""

import re

import pytest
import safetensors.torch
import torch
from reference import published
from same_bits import assert_same_bits
from tiny_models import FILE, MODELS, assert_equal_logits, change_file, class_of, tiny

import mllm_jax


def renamed(*pairs):
    """A change of names by (regular expression, replacement) pairs."""

    def change(tensors):
        names = {name: name for name in tensors}
        for old, new in pairs:
            names = {name: re.sub(old, new, now) for name, now in names.items()}
        assert any(old != new for old, new in names.items())
        return {names[name]: tensor for name, tensor in tensors.items()}

    return change


def beside(**extra):
    """The change that adds buffers as old files hold them."""
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in extra.items()}


INSIDE = renamed((r"^language_model\.model\.", "model.language_model.model."))
NUMBERS = torch.arange(12)[None]
OLDER = {  # kind -> changes of what transformers 5 saves to what was published before, or is read beside it
    "llama": [beside(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))],
    "gpt2": [
        renamed((r"^transformer\.", "")),
        beside(h__0__attn__bias=torch.ones(1, 1, 64, 64, dtype=torch.bool), h__0__attn__masked_bias=torch.tensor(-1e4)),
    ],
    "llava": [renamed((r"^vision_tower\.", "vision_tower.vision_model.")), INSIDE],
    "llava_next": [renamed((r"^vision_tower\.", "vision_tower.vision_model.")), INSIDE],
    "llava_onevision": [renamed((r"^vision_tower\.", "vision_tower.vision_model.")), INSIDE],
    "internvl": [INSIDE],
    "paligemma": [renamed((r"^vision_tower\.", "vision_tower.vision_model.")), INSIDE],
    "qwen2_vl": [renamed((r"^model\.", "model.language_model.model."))],
    "qwen2_5_vl": [renamed((r"^model\.", "model.language_model.model."))],
    "qwen3_vl": [renamed((r"^model\.language_model\.", "model.language_model.model."))],
    "qwen3_vl_moe": [published],
    "clip": [beside(text_model__embeddings__position_ids=NUMBERS, vision_model__embeddings__position_ids=NUMBERS)],
    "siglip": [beside(text_model__embeddings__position_ids=NUMBERS)],
    "clip_vision_model": [renamed((r"^", "vision_model."))],
    "siglip_vision_model": [renamed((r"^", "vision_model."))],
    "siglip2_vision_model": [renamed((r"^", "vision_model."))],
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_layout_holds_the_same_weights(kind, tmp_path):
    """Loads weights as saved, in transformers' in-memory names, saved again, and in older layouts."""
    model = tiny(kind)
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    folders = [tmp_path / "saved", tmp_path / "memory"]
    for number, change in enumerate(OLDER.get(kind, ())):
        folders.append(change_file(tmp_path / "saved", tmp_path / f"older{number}", change))
    ours, theirs = mllm_jax.load_pretrained(folders[0]), model.state_dict()
    for folder in folders:
        again = class_of(kind).from_pretrained(folder)
        read = again.state_dict()
        assert read.keys() == theirs.keys() and all(torch.equal(read[name], theirs[name]) for name in read), folder.name
        again.save_pretrained(folder / "again")
        for own in (folder, folder / "again"):
            assert_same_bits(mllm_jax.load_pretrained(own).params, ours.params)
    mllm_jax.save_pretrained(ours, tmp_path / "ours")
    read = class_of(kind).from_pretrained(tmp_path / "ours").state_dict()
    assert read.keys() == theirs.keys() and all(torch.equal(read[name], theirs[name]) for name in read)
    assert_same_bits(mllm_jax.load_pretrained(tmp_path / "ours").params, ours.params)


@pytest.mark.parametrize(
    "kind", [kind if kind == "qwen3_vl_moe" else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
def test_logits_of_what_transformers_saved(kind, tmp_path):
    tiny(kind).save_pretrained(tmp_path)
    assert_equal_logits(kind, tmp_path, mllm_jax.load_pretrained(tmp_path))


@pytest.mark.parametrize("width", [48, 24], ids=["gate_up", "down"])
def test_experts_of_equal_sides_are_read_as_transformers_reads_them(width, tmp_path):
    """Shapes do not tell whether these are transposed; nor does what is written."""
    moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16, hidden_size=width)
    model = tiny("qwen3_vl_moe")
    text = model.config.text_config.to_dict() | moe
    vision = model.config.vision_config.to_dict() | {"out_hidden_size": width}
    model = tiny("qwen3_vl_moe", text_config=text, vision_config=vision)
    model.save_pretrained(tmp_path / "theirs")
    vlm = mllm_jax.load_pretrained(tmp_path / "theirs")
    mllm_jax.save_pretrained(vlm, tmp_path / "ours")
    read, theirs = class_of("qwen3_vl_moe").from_pretrained(tmp_path / "ours").state_dict(), model.state_dict()
    assert all(torch.equal(read[name], theirs[name]) for name in theirs)
    assert_same_bits(mllm_jax.load_pretrained(tmp_path / "ours").params, vlm.params)


@pytest.mark.parametrize("kind", [kind for kind, (_, last, _) in MODELS.items() if last == "ForCausalLM"])
def test_a_model_without_a_head_has_shorter_names(kind, tmp_path):
    model = tiny(kind, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    whole, bare = (mllm_jax.load_pretrained(tmp_path / name) for name in ("whole", "bare"))
    assert not any(name.startswith("model.") for name in safetensors.torch.load_file(tmp_path / "bare" / FILE))
    assert_same_bits(bare.params, whole.params)
