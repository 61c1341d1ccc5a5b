"""Decoders of many families are one: logits, gradients, greedy tokens and files equal transformers' in fp32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from reference import perturb
from test_text_families import LENGTHS, NEW, inputs_of

import mllm_jax
from mllm_jax.families import FAMILIES
from mllm_jax.weights.table import expand, flatten, to_ours

SMALL = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=512)
SMALL |= dict(num_attention_heads=4, num_key_value_heads=2)
BLENDED = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
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
    "gemma": ("Gemma", SMALL | dict(num_key_value_heads=1, head_dim=24)),
    "gemma2": (
        "Gemma2",
        SMALL
        | dict(num_hidden_layers=4, head_dim=24, query_pre_attn_scalar=20, sliding_window=5)
        | dict(attn_logit_softcapping=8.0, final_logit_softcapping=6.0),
    ),
}


def tiny(name: str):
    """A random transformers model; what its init leaves at zero or one is perturbed."""
    kind, fields = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                parameter.mul_(3.0)  # or a token's embedding outweighs what the layers add, and greedy tokens repeat
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """transformers' model, and the same read from its folder."""
    model = tiny(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return mllm_jax.load_pretrained(folder), model


def theirs(model, inputs):
    """With positions that count the tokens of a row, as ours do."""
    positions = np.maximum(np.cumsum(inputs["attention_mask"], axis=1) - 1, 0)
    return model(**{name: torch.from_numpy(value) for name, value in (inputs | {"position_ids": positions}).items()})


def test_logits_and_gradients(pair):
    vlm, model = pair

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params, batch):
        logits = vlm.model.apply({"params": params}, batch).logits
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch.targets)[..., None], -1)[..., 0]
        return jnp.sum(nll * batch.weight) / jnp.sum(batch.weight), logits

    for side in ("right", "left"):
        inputs = inputs_of(side)
        model.zero_grad()
        expected = theirs(model, inputs)
        expected.loss.backward()
        (_, logits), grads = loss(vlm.params, mllm_jax.from_hf_inputs(vlm.config, inputs))
        real, expected_logits = inputs["attention_mask"] == 1, expected.logits.detach().numpy()
        assert np.abs(expected_logits[real]).max() > 0.5
        np.testing.assert_allclose(np.asarray(logits)[real], expected_logits[real], atol=1e-4, rtol=1e-4)

    found, seen = {name: p.grad for name, p in model.named_parameters()}, set()
    for name, entry in expand(FAMILIES[vlm.config.family].weights(vlm.config), vlm.params).items():
        got, want = flatten(grads)[entry.path][entry.index], to_ours(found[name].numpy(), entry)
        scale = np.linalg.norm(want)
        # A key's bias adds the same to all scores of a query, so that its gradient is zero but for rounding.
        floor = 1e-6 if entry.path.endswith("attention/k/b") else 0
        assert scale > 0 and np.linalg.norm(got - want) <= max(1e-3 * scale, floor), name
        seen.add(entry.path)
    assert seen == set(flatten(vlm.params))


def test_greedy_tokens(pair):
    vlm, model = pair
    inputs = {name: value for name, value in inputs_of("left").items() if name != "labels"}
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        expected = model.generate(**tensors, max_new_tokens=NEW, do_sample=False, pad_token_id=0).numpy()
    expected = expected[:, max(LENGTHS) :]
    assert len(np.unique(expected)) > 5
    for side in ("left", "right"):
        batch = mllm_jax.from_hf_inputs(vlm.config, {k: v for k, v in inputs_of(side).items() if k != "labels"})
        np.testing.assert_array_equal(mllm_jax.generate_ids(vlm, batch, NEW), expected)


def test_transformers_loads_what_is_saved(pair, tmp_path):
    vlm, model = pair
    mllm_jax.save_pretrained(vlm, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(again) is type(model)
    ours, own = again.state_dict(), model.state_dict()
    assert ours.keys() == own.keys() and all(torch.equal(ours[name], own[name]) for name in own)
    with torch.no_grad():
        np.testing.assert_array_equal(theirs(again, inputs_of()).logits, theirs(model, inputs_of()).logits)
    assert mllm_jax.load_pretrained(tmp_path).config == vlm.config
