"""LLaVA in its authors' own files: the same models as transformers' under other names, with and without the tower."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from reference import assert_parity, perturb, to_torch
from tiny_llava import CLIP, IMAGE, TEXT, inputs_of, llava_config, random_model

import mllm_jax
from mllm_jax.families import FAMILIES, kind_of
from mllm_jax.families.towers import in_vlms
from mllm_jax.families.vlms import llava, llava_llama
from mllm_jax.model.vlm import count_params

ROPE = dict(rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False)
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48], [48, 16]]  # (width, height)
SAID = {
    "1.0": dict(model_type="llava"),
    "1.5": dict(model_type="llava_llama", mm_projector_type="mlp2x_gelu", image_aspect_ratio="pad"),
    "next": dict(
        model_type="llava_mistral",
        mm_projector_type="mlp2x_gelu",
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=PINPOINTS,
        sliding_window=None,
    ),
}


@pytest.fixture
def tower(monkeypatch, tmp_path):
    """A tiny tower in a folder, as CLIP's files have it, whose name is known."""
    monkeypatch.setitem(llava_llama.TOWERS, "clip-tiny", in_vlms.CLIP.from_hf(CLIP))
    torch.manual_seed(1)
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=CLIP, text_config=text))
    perturb(model)
    model.save_pretrained(tmp_path / "clip-tiny")
    return tmp_path / "clip-tiny", model.vision_model.state_dict()


def reference(name, tensors):
    """Transformers' model with that tower."""
    if name == "next":
        text = dict(model_type="mistral", sliding_window=None, rms_norm_eps=1e-6, **TEXT)
        pinpoints = [[height, width] for width, height in PINPOINTS]
        model = random_model(llava_config("LlavaNext", text_config=text, image_grid_pinpoints=pinpoints))
    else:
        model = random_model(llava_config())
    if name == "1.0":
        model.model.multi_modal_projector = torch.nn.Linear(48, 64)
    whole = f"{next(iter(model.model.vision_tower.state_dict())).partition('embeddings')[0]}"
    model.model.vision_tower.load_state_dict({whole + key: value for key, value in tensors.items()})
    return model


def as_published(model, with_tower: bool) -> dict[str, torch.Tensor]:
    names = {
        "model.language_model.": "model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.multi_modal_projector.": "model.mm_projector.",
        "model.vision_tower.vision_model.": "model.vision_tower.vision_tower.vision_model.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    }
    found = {}
    for name, tensor in model.state_dict().items():
        old = next((old for old in names if name.startswith(old)), "")
        found[names.get(old, "") + name.removeprefix(old)] = tensor.contiguous()
    return {name: tensor for name, tensor in found.items() if with_tower or "vision_tower" not in name}


def write(folder, name, tensors, tower):
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    told = {**TEXT, **ROPE, "mm_vision_tower": str(tower), "mm_vision_select_layer": -2, "mm_hidden_size": 48}
    (folder / "config.json").write_text(json.dumps(told | SAID[name]))
    return folder


@pytest.mark.parametrize("name", SAID)
def test_files(name, tower, tmp_path, record_property):
    folder, tensors = tower
    model = reference(name, tensors)
    published = as_published(model, with_tower=name == "next")
    ours = mllm_jax.load_pretrained(write(tmp_path / "own", name, published, folder))
    assert ours.config.family == ("llava_mistral" if name == "next" else "llava_llama")

    mllm_jax.save_pretrained(ours, tmp_path / "again")
    whole, again = as_published(model, True), safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == whole.keys() and all(torch.equal(again[key], whole[key]) for key in whole)
    reloaded = mllm_jax.load_pretrained(tmp_path / "again")
    assert reloaded.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, reloaded.params, ours.params)

    if name != "1.0":  # which transformers has no files of
        model.save_pretrained(tmp_path / "transformers")
        other = mllm_jax.load_pretrained(tmp_path / "transformers")
        assert ours.config.inputs == replace(other.config.inputs, square=name == "1.5")
        for part in ("encoder", "connector", "decoder"):
            assert getattr(ours.config, part) == getattr(other.config, part)
        jax.tree.map(np.testing.assert_array_equal, ours.params, other.params)
        return
    inputs = inputs_of(model)
    with torch.no_grad():
        expected = model(**to_torch(inputs)).logits.numpy()
    given = inputs | {"input_ids": np.where(inputs["input_ids"] == IMAGE, llava_llama.IMAGE, inputs["input_ids"])}
    out = jax.jit(ours.model.apply)({"params": ours.params}, mllm_jax.from_hf_inputs(ours.config, given))
    real = inputs["attention_mask"] == 1
    assert_parity(record_property, "llava_llama", np.asarray(out.logits)[real], expected[real])


def test_where_the_tower_is(tower, tmp_path):
    folder, tensors = tower
    published = as_published(reference("1.5", tensors), with_tower=False)
    own = write(tmp_path / "own", "1.5", published, "nobody/clip-tiny")
    with pytest.raises(
        FileNotFoundError, match="the weights of its vision tower are missing.*tower=FOLDER.*nobody/clip-tiny"
    ):
        mllm_jax.load_pretrained(own)
    found = mllm_jax.load_pretrained(own, tower=folder).params["encoder"]["class_token"]
    np.testing.assert_array_equal(found, tensors["embeddings.class_embedding"].numpy())


def test_published_sizes():
    for name, config in llava_llama.SIZES.items():
        total, same = sum(count_params(config).values()), llava.SIZES.get(name)
        assert FAMILIES["llava_llama"].from_hf(FAMILIES["llava_llama"].to_hf(config)) == config
        if same is None:
            assert total == {"1.0-7b": 7045793792, "1.0-13b": 13324292096}[name]
        else:  # transformers' files have tokens more, of which one stands for an image
            more = (same.decoder.vocab - config.decoder.vocab) * 2 * config.decoder.width
            assert total == sum(count_params(same).values()) - more


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(mm_vision_tower="openai/clip-vit-large-patch14-224"),
            "mm_vision_tower='openai/clip-.*-224': not supported. Did you mean 'clip-vit-large-patch14'",
        ),
        (dict(mm_projector_type="mlp2x_res"), 'mm_projector_type="mlp2x_res": must be'),
        (dict(mm_patch_merge_type="spatial_unpad"), "spatial_unpad and anyres require each other"),
        (dict(mm_vision_select_feature="cls_patch"), 'mm_vision_select_feature="cls_patch": must be "patch"'),
    ],
    ids=str,
)
def test_what_config_json_may_not_say(change, message):
    told = FAMILIES["llava_llama"].to_hf(FAMILIES["llava_llama"].config("1.5-7b")) | change
    with pytest.raises(ValueError, match=message):
        FAMILIES["llava_llama"].from_hf(told)


def test_two_formats_of_one_name():
    assert kind_of({"model_type": "llava", "mm_vision_tower": "x"}) == "llava_llama"
    assert kind_of(FAMILIES["llava"].to_hf(FAMILIES["llava"].config("1.5-7b"))) == "llava"
