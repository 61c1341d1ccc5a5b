"""Adapters of PEFT: the same logits, and files both ways, on random tiny models of transformers."""

import json
import shutil
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import peft
import pytest
import tiny_decoders
import tiny_llava
import tiny_text_families
import torch
import transformers
from reference import batch_of, prompt, tiny_qwen3_vl, to_torch
from safetensors.numpy import load_file, save_file

import mllm_jax
from mllm_jax.common.trees import join
from mllm_jax.model.vlm import init_adapters
from mllm_jax.nn.lora import LoraConfig
from mllm_jax.pretrained.peft.files import WEIGHTS

TEXTS = {"qwen3_moe": tiny_text_families, "phi3": tiny_decoders}
ROWS = [(3, ("image", 4, 6), 5), (9,)]


def a_model(name):
    """(transformers' model, inputs of it)"""
    if name.startswith("qwen3_vl"):
        model = tiny_qwen3_vl(experts=name == "qwen3_vl_moe")[1]
        return model, batch_of([prompt(np.random.default_rng(0), *row) for row in ROWS])
    if name in TEXTS:
        tokens = np.random.default_rng(0).integers(0, 128, (2, 9))
        return TEXTS[name].tiny(name), {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    model = tiny_llava.reference_of(name)
    return model, tiny_llava.inputs_of(model)


VISUAL = "visual.*(qkv|attn.proj|linear_fc1)"
TARGETS = {  # of which layers, and other ranks and alphas of some of them
    "qwen3_vl_moe": (
        rf".*(language_model.*(q|v|o)_proj|{VISUAL.replace('fc1', 'fc1(?<!merger.linear_fc1)')})",
        {"o_proj": 3, "experts.down_proj": 2},
        {},
    ),
    "qwen3_moe": (["q_proj"], {"experts.gate_up_proj": 2}, {"experts.down_proj": 7}),
    "phi3": (["qkv_proj", "gate_up_proj", "o_proj"], {r"layers\.1\.self_attn.qkv_proj": 5}, {"gate_up_proj": 9}),
    "qwen3_vl": (
        rf".*(language_model.*(q|v|o|up|down)_proj|{VISUAL})",
        {"o_proj": 3, r"layers\.1\.self_attn\.v_proj": 5, "qkv": 2},
        {"down_proj": 7, r"layers\.2\.self_attn\.v_proj": 3},
    ),
    "llava": (r".*(language_model.*_proj|vision_tower.*(q_proj|k_proj|fc1)|linear_1)", {r"layers\.0.*k_proj": 2}, {}),
    "internvl": (
        r".*(language_model.*mlp.*_proj|attention.(q|k|v)_proj|projection_layer|linear_2)",
        {},
        {"mlp.up_proj": 9},
    ),
}


PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MORE = {  # what else is adapted, or saved whole
    "qwen3_vl_moe": dict(target_parameters=["experts.down_proj"], modules_to_save=["visual.merger"]),
    "qwen3_moe": dict(target_parameters=PARAMETERS, modules_to_save=["embed_tokens", "model.norm"]),
    "phi3": dict(modules_to_save=["lm_head"]),
    "llava": dict(modules_to_save=["embed_tokens", "lm_head"]),
}
SLOW = ("llava", "internvl", "qwen3_vl_moe")
CASES = ["qwen3_vl", "qwen3_moe", "phi3", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(folder of the base model, our model, inputs, folder of adapter/ and merged/, logits with it), of PEFT."""
    published = as_published if request.param == "qwen3_vl_moe" else lambda folder: folder
    folder = tmp_path_factory.mktemp(request.param)
    model, inputs = a_model(request.param)
    model.save_pretrained(folder / "base")
    targets, ranks, alphas = TARGETS[request.param]
    more, patterns = MORE.get(request.param, {}), dict(rank_pattern=ranks, alpha_pattern=alphas)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **patterns, **more)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        expected = adapted(**to_torch(inputs)).logits.numpy()
        with adapted.disable_adapter():
            plain = adapted(**to_torch(inputs)).logits.numpy()
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    assert np.abs(expected - plain).max() > 0.3
    published(folder / "merged")
    shutil.copytree(folder / "base", folder / "ours")
    return folder / "base", mllm_jax.load_pretrained(published(folder / "ours")), inputs, folder, expected


def as_published(folder):
    """Weights with experts in the published layout, not in that of transformers."""
    save_file(
        {
            name: np.ascontiguousarray(x.swapaxes(1, 2)) if ".experts." in name else x
            for name, x in load_file(folder / "model.safetensors").items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def logits_of(vlm, inputs):
    apply = jax.jit(lambda params, batch: vlm.model.apply({"params": params}, batch).logits)
    return np.asarray(apply(vlm.params, mllm_jax.from_hf_inputs(vlm.config, inputs)))


def theirs(base, adapter, inputs):
    """Logits of transformers' and PEFT's model, read from folders."""
    kind = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(base, attn_implementation="eager").eval()
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, adapter)(**to_torch(inputs)).logits.numpy()


def assert_close(found, expected, inputs):
    real = inputs["attention_mask"][..., None] == 1
    np.testing.assert_allclose(np.where(real, found, 0), np.where(real, expected, 0), atol=1e-4, rtol=1e-4)


def test_an_adapter_of_peft_gives_its_logits_and_is_written_as_it_was(case, tmp_path):
    base, vlm, inputs, folder, expected = case
    adapted = mllm_jax.load_adapters(vlm, folder / "adapter")
    assert_close(logits_of(adapted, inputs), expected, inputs)
    mllm_jax.save_adapters(adapted, tmp_path, base=str(base))
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder / "adapter", tmp_path))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    assert_close(theirs(base, tmp_path, inputs), expected, inputs)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_merging_is_that_of_peft_and_can_be_undone(case):
    _, vlm, _, folder, _ = case
    adapted, expected = mllm_jax.load_adapters(vlm, folder / "adapter"), mllm_jax.load_pretrained(folder / "merged")
    merged = mllm_jax.merge_adapters(adapted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), merged.params, expected.params)
    back = mllm_jax.unmerge_adapters(merged, adapted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back.params, adapted.params)


def test_our_own_adapters_survive_the_format(case, tmp_path):
    """Adapters of every weight survive, also where PEFT has separate modules and ours share one A."""
    _, vlm, _, _, _ = case
    lora = LoraConfig(
        rank=3, target_modules=("^(encoder|decoder)/layers.*/w$|^connector/.*/w$",), rank_pattern=(("mlp", 2),)
    )
    made = jax.eval_shape(lambda key: init_adapters(replace(vlm.config, lora=lora), key), jax.random.key(0))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: rng.uniform(0.5, 1, x.shape).astype(np.float32), made)
    own = replace(vlm, params=join(vlm.params, adapters))
    mllm_jax.save_adapters(own, tmp_path)
    read = mllm_jax.load_adapters(vlm, tmp_path)
    weights = (mllm_jax.merge_adapters(x).params for x in (own, read))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *weights)
    with pytest.raises(ValueError, match="has adapters. Save them with save_adapters"):
        mllm_jax.save_pretrained(own, tmp_path / "whole")


@pytest.mark.parametrize("case", ["qwen3_moe", pytest.param("llava", marks=pytest.mark.slow)], indirect=True)
def test_weights_that_are_no_module_are_not_saved_whole(case, tmp_path):
    _, vlm, _, folder, _ = case
    adapted = mllm_jax.load_adapters(vlm, folder / "adapter")
    lora = replace(adapted.config.lora, modules_to_save=("experts_down|class_token",))
    with pytest.raises(
        ValueError, match=r"was trained in full, but PEFT saves only whole modules. .* save_pretrained\("
    ):
        mllm_jax.save_adapters(replace(adapted, config=replace(adapted.config, lora=lora)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_adapters_that_do_not_fit_are_told(case, tmp_path):
    _, vlm, _, folder, _ = case
    folder = folder / "adapter"
    with pytest.raises(FileNotFoundError, match="no adapter_config.json: it is not an adapter in PEFT's format"):
        mllm_jax.load_adapters(vlm, tmp_path)
    with pytest.raises(ValueError, match="the model has no adapters"):
        mllm_jax.save_adapters(vlm, tmp_path / "none")
    stated, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / WEIGHTS)
    write = lambda **changes: (tmp_path / "adapter_config.json").write_text(json.dumps(stated | changes))
    first, second, *_ = (name for name in tensors if "lora_A" in name)
    odd = dict(tensors, **{first.replace("model.model.", "model.modle."): tensors[first], first: tensors[first][:, 1:]})
    odd[second] = np.zeros((), np.float32)
    save_file(odd, tmp_path / WEIGHTS)
    for changes, message in (
        ({"use_dora": True}, "use_dora=True: only False is supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3': only 'LORA' is supported"),
        ({}, "(?s)_proj.*: A and B do not fit each other and a weight.*\n  unexpected: base_model.modle"),
        ({}, "_proj: A has fewer than two axes\n"),
    ):
        write(**changes)
        with pytest.raises(ValueError, match=message):
            mllm_jax.load_adapters(vlm, tmp_path)
