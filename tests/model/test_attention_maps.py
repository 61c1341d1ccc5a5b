"""Attention probabilities equal transformers' `output_attentions`, in fp32, on random tiny weights."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from examples import random_example, random_params, tiny_config
from reference import batch_of, perturb, prompt, tiny_qwen3_vl, to_torch
from tiny_llava import inputs_of, reference_of

import mllm_jax
from mllm_jax.data.pipeline.packing import collate, smallest_budget


def assert_equal(model, inputs, folder):
    """Compares at every token of every row except padding."""
    model.save_pretrained(folder)
    ours = mllm_jax.load_pretrained(folder)
    with torch.no_grad():
        wanted = np.stack(model(**to_torch(inputs), output_attentions=True).attentions)
    batch = mllm_jax.from_hf_inputs(ours.config, inputs)
    rows, length = batch.tokens.shape
    found = np.asarray(mllm_jax.attention_of(ours, batch, np.tile(np.arange(length), (rows, 1))))
    real = inputs["attention_mask"] == 1
    assert found.shape == wanted.shape and wanted.max() > 0.3
    found, wanted = (np.moveaxis(x, (1, 3), (0, 1))[real] for x in (found, wanted))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


def test_qwen3_vl(tmp_path):
    rng = np.random.default_rng(0)
    prompts = [prompt(rng, 4, ("image", 4, 6), 5), prompt(rng, 7, ("image", 2, 2), 2, ("video", 2, 2, 4), 3)]
    assert_equal(tiny_qwen3_vl()[1], batch_of(prompts, side="left"), tmp_path)


def test_llava(tmp_path):
    model = reference_of("llava")
    assert_equal(model, inputs_of(model), tmp_path)


def test_windows_and_caps(tmp_path):
    """Gemma 2, whose layers differ in turn: of five, two patterns of two and one more."""
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=8)
    caps = dict(sliding_window=5, attn_logit_softcapping=3.0, final_logit_softcapping=20.0)
    small = dict(vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=5)
    config = transformers.Gemma2Config(**small, **heads, **caps)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval().float()
    perturb(model)
    ids = np.random.default_rng(0).integers(5, 199, (2, 14))
    assert_equal(model, {"input_ids": ids, "attention_mask": np.ones_like(ids)}, tmp_path)


def packed(config):
    rng = np.random.default_rng(1)
    examples = [random_example(rng, 9, (4, 4)), random_example(rng, 6), random_example(rng, 12, (2, 6))]
    alone = collate([[example] for example in examples], smallest_budget(examples), **config.layout)
    room = smallest_budget(examples)._replace(tokens=64, patch_rows=2)
    return examples, alone, collate([examples, []], room, **config.layout)


def test_packed_conversations_look_at_themselves_alone():
    config = tiny_config(remat="full")
    vlm = SimpleNamespace(config=config, params=random_params(config))
    examples, alone, together = packed(config)
    last = np.array([len(example.tokens) - 1 for example in examples])
    ends = np.cumsum(last + 1) - 1
    each = np.asarray(mllm_jax.attention_of(vlm, alone, last[:, None]))
    whole = np.asarray(mllm_jax.attention_of(vlm, together, np.stack([ends, np.zeros(3, int)])))[:, 0]
    for number, (length, end) in enumerate(zip(last + 1, ends)):
        own = slice(end + 1 - length, end + 1)
        np.testing.assert_allclose(whole[:, :, number, own], each[:, number, :, 0, :length], atol=1e-6)
        assert whole[:, :, number, own].sum(-1) == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_asked_is_told():
    config = tiny_config()
    _, alone, _ = packed(config)
    vlm = SimpleNamespace(config=config, params=None)
    for at in (np.zeros(3, int), np.zeros((2, 1), int), np.full((3, 1), 999), np.zeros((3, 1))):
        with pytest.raises(ValueError, match=r"at=.* not columns of the batch. Pass integers \[3, any\] from 0 to"):
            mllm_jax.attention_of(vlm, alone, at)
    tower = SimpleNamespace(config=replace(config, decoder=None, connector=None), params=None)
    with pytest.raises(ValueError, match="attention_of needs a decoder"):
        mllm_jax.attention_of(tower, alone, np.zeros((3, 1), int))
