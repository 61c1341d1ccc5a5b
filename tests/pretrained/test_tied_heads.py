"""Heads beside tied embeddings: the flag that counts, and checkpoints that contain both tensors."""

import itertools
import json
import logging

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from reference import as_internlm2
from same_bits import assert_same_bits
from tiny_models import FILE, MODELS, TEXT, assert_equal_logits, change_file, class_of, tiny

import mllm_jax
from mllm_jax.common.trees import flatten
from mllm_jax.families import FAMILIES
from mllm_jax.pretrained.api import load_params, published_config
from mllm_jax.weights.matching import WeightsMismatch

KINDS = [kind for kind, (_, last, _) in MODELS.items() if last != "Model"]
FLAGS = list(itertools.product((None, False, True), repeat=2))  # at the top level, in the text config
HEAD, EMBED = "decoder/head/w", "decoder/embed"
CONTENTS = {
    "absent": lambda tensors, head, embed: without(tensors, head),
    "equal": lambda tensors, head, embed: tensors | {head: tensors[embed].clone()},
    "different": lambda tensors, head, embed: tensors | {head: changed(tensors[embed])},
    "instead": lambda tensors, head, embed: without(tensors, embed),
}


OWN_FLAG = ("blip-2", "instructblip")  # whose decoder is tied as its text config states, whatever stands above


def flag_of(kind, folder) -> bool:
    """The flag that transformers' model heeds."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return (config.text_config if kind in OWN_FLAG else config).tie_word_embeddings


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


def changed(tensor):
    """One value of the last row is another."""
    tensor = tensor.clone()
    tensor[-1, -1] += 2.0**-9
    return tensor


def write_flags(folder, top, text=None):
    """States tie_word_embeddings in config.json: at the top level, and in the text config where there is one."""
    config = json.loads((folder / "config.json").read_text())
    for level, flag in ((config, top), (config.get("text_config", {}), text)):
        level.pop("tie_word_embeddings", None)
        if flag is not None:
            level["tie_word_embeddings"] = flag
    (folder / "config.json").write_text(json.dumps(config))


def folder_of(kind, path, content):
    """An untied model with what is asked for as its head, and the names of the head and the embedding."""
    tiny(kind, tie_word_embeddings=False).save_pretrained(path / "untied")
    config = published_config(path / "untied")
    places = {row.ours: row.theirs for row in FAMILIES[kind].weights(config)}
    head, embed = places[HEAD], places[EMBED]
    return change_file(path / "untied", path / content, lambda x: CONTENTS[content](x, head, embed)), head, embed


@pytest.mark.parametrize("kind", KINDS)
def test_the_flag_that_counts_is_transformers(kind, tmp_path):
    tiny(kind).config.save_pretrained(tmp_path)
    seeing = "text_config" in json.loads((tmp_path / "config.json").read_text())
    for top, text in FLAGS if seeing else [(flag, None) for flag in (None, False, True)]:
        write_flags(tmp_path, top, text)
        theirs = flag_of(kind, tmp_path)
        assert published_config(tmp_path).decoder.tie_embeddings == theirs, (top, text)


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_a_text_config_that_says_nothing_is_tied_as_its_own_family(family, tmp_path):
    text = dict(model_type=family, **TEXT)
    for kind in ("llava", "llava_next", "llava_onevision", "internvl", "paligemma"):
        if (kind, family) == ("paligemma", "llama"):
            continue
        tiny(kind, text_config=text).config.save_pretrained(tmp_path / kind)
        for top, own in FLAGS:
            write_flags(tmp_path / kind, top, own)
            theirs = transformers.AutoConfig.from_pretrained(tmp_path / kind).tie_word_embeddings
            assert published_config(tmp_path / kind).decoder.tie_embeddings == theirs, (kind, top, own)


def compare(kind, folder, head, embed, caplog):
    """Ours of a folder and transformers' have the same head and embedding, or one is missing for both."""
    caplog.clear()
    theirs, told = class_of(kind).from_pretrained(folder, output_loading_info=True)
    if missing := told["missing_keys"]:
        with pytest.raises(WeightsMismatch, match=f"missing: {head if 'lm_head.weight' in missing else embed} "):
            mllm_jax.load_pretrained(folder)
        return None
    with caplog.at_level(logging.WARNING, logger="mllm_jax"):
        ours = mllm_jax.load_pretrained(folder)
    layers = {HEAD: theirs.get_output_embeddings(), EMBED: theirs.get_input_embeddings()}
    tied, loaded = layers[HEAD].weight is layers[EMBED].weight, flatten(ours.params)
    assert ours.config.decoder.tie_embeddings == tied == (HEAD not in loaded)
    for path in layers.keys() & loaded.keys():
        np.testing.assert_array_equal(loaded[path], layers[path].weight.detach().numpy())
    stated = flag_of(kind, folder)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (stated and not tied) and all(head in text and embed in text for text in warned)
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_differs_is_kept(kind, tmp_path, caplog):
    """Its model is saved as one that is not tied, at every level that transformers reads."""
    folder, head, embed = folder_of(kind, tmp_path, "different")
    write_flags(folder, True, True)
    ours, theirs = compare(kind, folder, head, embed, caplog)
    assert caplog.records
    mllm_jax.save_pretrained(ours, tmp_path / "ours")
    again, told = class_of(kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not flag_of(kind, tmp_path / "ours") and not told["missing_keys"] and not told["unexpected_keys"]
    found, wanted = again.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    saved = mllm_jax.load_pretrained(tmp_path / "ours")
    assert saved.config == ours.config and not published_config(tmp_path / "ours").decoder.tie_embeddings
    assert_same_bits(saved.params, ours.params)


@pytest.mark.parametrize("content", ["absent", "equal", "instead"])
@pytest.mark.parametrize("kind", ["gpt2", "llava", "paligemma", "qwen2_5_vl"])
def test_what_a_checkpoint_may_hold(kind, content, tmp_path, caplog):
    folder, head, embed = folder_of(kind, tmp_path, content)
    for flag in (True, False):
        write_flags(folder, flag, flag)
        compare(kind, folder, head, embed, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_flags_by_all_contents(kind, content, tmp_path, caplog):
    """Logits too, of a tied and of an untied model, where transformers finds all weights."""
    folder, head, embed = folder_of(kind, tmp_path, content)
    seeing, seen = "text_config" in json.loads((folder / "config.json").read_text()), []
    for top, text in FLAGS if seeing else [(flag, None) for flag in (None, False, True)]:
        write_flags(folder, top, text)
        pair = compare(kind, folder, head, embed, caplog)
        if pair and pair[0].config not in seen:
            assert_equal_logits(kind, folder, pair[0])
            seen.append(pair[0].config)


def test_head_and_embedding_in_two_files_of_two_dtypes(tmp_path, caplog):
    """Values are compared, not bytes."""
    model = tiny("qwen2", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.bfloat16())
    model.save_pretrained(tmp_path)
    write_flags(tmp_path, True)
    tensors = safetensors.torch.load_file(tmp_path / FILE)
    (tmp_path / FILE).rename(tmp_path / "other")
    embed = tensors["model.embed_tokens.weight"]
    for value, tied in ((embed.bfloat16(), True), (changed(embed), False)):
        safetensors.torch.save_file({"lm_head.weight": value}, tmp_path / "b.safetensors")
        safetensors.torch.save_file(without(tensors, "lm_head.weight"), tmp_path / "a.safetensors")
        index = dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
        (tmp_path / f"{FILE}.index.json").write_text(json.dumps({"weight_map": index}))
        caplog.clear()
        vlm = mllm_jax.load_pretrained(tmp_path)
        assert vlm.config.decoder.tie_embeddings == tied and len(caplog.records) == (not tied)


def test_a_tied_config_never_drops_a_head(tmp_path):
    """A caller with a tied config of its own, such as a run, gets an error instead."""
    folder, head, embed = folder_of("llama", tmp_path, "different")
    write_flags(folder, True)
    config = FAMILIES["llama"].from_hf(json.loads((folder / "config.json").read_text()))
    for part in ("", "decoder"):
        with pytest.raises(WeightsMismatch, match=f"tied: {head} differs from {embed}, to which the model ties it. "):
            load_params(folder, config, part=part)


def test_families_that_transformers_has_not(tmp_path, caplog):
    """InternLM2 alone, from a Llama's weights."""
    model = tiny("llama", tie_word_embeddings=False, head_dim=8)
    tensors = as_internlm2(model.state_dict(), model.config)
    config = TEXT | dict(model_type="internlm2", rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, tied in (("output.weight", False), ("model.tok_embeddings.weight", True)):
        tensors["output.weight"] = tensors[name].clone()
        safetensors.torch.save_file(tensors, tmp_path / FILE)
        vlm = mllm_jax.load_pretrained(tmp_path)
        assert vlm.config.decoder.tie_embeddings == tied and (HEAD in flatten(vlm.params)) != tied
    assert len(caplog.records) == 1
