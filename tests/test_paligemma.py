"""PaliGemma and PaliGemma 2: logits, gradients, greedy tokens and files equal transformers' on random tiny weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from reference import perturb

import mllm_jax
from mllm_jax.families import paligemma
from mllm_jax.weights.table import expand, flatten, to_ours

IMAGE, NEW = 150, 8
TEXT = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=24)
TEXT |= dict(num_hidden_layers=2, max_position_embeddings=512)
VISION = dict(model_type="siglip_vision_model", image_size=16, patch_size=4, vision_use_head=False)
VISION |= dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
CAPS = dict(attn_logit_softcapping=8.0, final_logit_softcapping=6.0)
CASES = {
    "paligemma": dict(model_type="gemma", num_key_value_heads=1, **TEXT),
    # A window that is shorter than a picture: it does not count between tokens of a prefix.
    "paligemma2": dict(
        model_type="gemma2", num_key_value_heads=2, sliding_window=7, query_pre_attn_scalar=20, **TEXT, **CAPS
    ),
}
PROMPTS = [(1, 5, 9), (2, 3, 2), (0, 6, 4)]  # pictures, tokens of the question, tokens of the answer


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """Our model, read from files that transformers wrote; theirs."""
    config = transformers.PaliGemmaConfig(
        vision_config=VISION,
        text_config=CASES[request.param],
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration(config).eval().float()
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Or a token's embedding outweighs what the layers add, and greedy tokens repeat.
            if "language_model.layers" in name and parameter.ndim == 2:
                parameter.mul_(3.0)
            elif name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
                parameter.add_(2.0)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return mllm_jax.load_pretrained(folder), model


def inputs_of(side="right", answers=True, labels=False):
    """Padded rows of pictures, questions and answers; `token_type_ids` is 1 in answers and, as padding, 0."""
    rng, rows, pixels = np.random.default_rng(3), [], []
    for pictures, question, answer in PROMPTS:
        pixels += list(rng.standard_normal((pictures, 3, 16, 16)).astype(np.float32))
        ids = [IMAGE] * 16 * pictures + rng.integers(5, 149, question + answer).tolist()
        kinds = [0] * (len(ids) - answer) + [1] * answer
        rows.append((ids, kinds) if answers else (ids[: len(ids) - answer], kinds[: len(ids) - answer]))
    length = max(len(ids) for ids, _ in rows)
    inputs = {
        name: np.zeros((len(rows), length), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    for row, (ids, kinds) in enumerate(rows):
        here = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        for name, value in zip(inputs, (ids, 1, kinds)):
            inputs[name][row, here] = value
    if labels:
        inputs["labels"] = np.where(inputs["token_type_ids"] == 1, inputs["input_ids"], -100)
    return inputs | {"pixel_values": np.stack(pixels)}


def theirs(model, inputs):
    return model(**{name: torch.from_numpy(value) for name, value in inputs.items()})


def without_types(inputs):
    return {name: value for name, value in inputs.items() if name != "token_type_ids"}


def test_logits_and_gradients(pair):
    vlm, model = pair

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params, batch):
        logits = vlm.model.apply({"params": params}, batch).logits
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch.targets)[..., None], -1)[..., 0]
        return jnp.sum(nll * batch.weight) / jnp.maximum(jnp.sum(batch.weight), 1), logits

    def logits_of(inputs):
        (_, logits), grads = loss(vlm.params, mllm_jax.from_hf_inputs(vlm.config, inputs))
        return np.asarray(logits)[inputs["attention_mask"] == 1], grads

    # Without token_type_ids all is causal, as in transformers.
    causal = without_types(inputs_of())
    with torch.no_grad():
        expected = theirs(model, causal).logits.numpy()[causal["attention_mask"] == 1]
    np.testing.assert_allclose(logits_of(causal)[0], expected, atol=1e-4, rtol=1e-4)
    for side in ("left", "right"):
        inputs = inputs_of(side, labels=True)
        model.zero_grad()
        out = theirs(model, inputs)
        out.loss.backward()
        want = out.logits.detach().numpy()[inputs["attention_mask"] == 1]
        got, grads = logits_of(inputs)
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
        assert np.abs(want - expected).max() > 0.1  # a prefix is not the same as none

    found = dict(model.state_dict(keep_vars=True))
    for name, entry in expand(paligemma.weights(vlm.config), vlm.params).items():
        name = name.replace("vision_model.", "").replace("language_model.model.", "language_model.")
        want = to_ours(found[f"model.{name}"].grad.numpy(), entry)
        got = flatten(grads)[entry.path][entry.index]
        scale = np.linalg.norm(want)
        # A key's bias adds the same to all scores of a query, so that its gradient is zero but for rounding.
        floor = 1e-5 if name.endswith("k_proj.bias") else 0
        assert scale > 0 and np.linalg.norm(got - want) <= max(1e-3 * scale, floor), name


def test_greedy_tokens(pair):
    vlm, model = pair
    inputs = inputs_of("left", answers=False)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        expected = model.generate(
            **tensors, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
        ).numpy()
    expected = expected[:, inputs["input_ids"].shape[1] :]
    assert len(np.unique(expected)) > 5
    for side in ("left", "right"):
        batch = mllm_jax.from_hf_inputs(vlm.config, inputs_of(side, answers=False))
        np.testing.assert_array_equal(mllm_jax.generate_ids(vlm, batch, NEW), expected)


def test_transformers_loads_what_is_saved(pair, tmp_path):
    vlm, model = pair
    mllm_jax.save_pretrained(vlm, tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(again) is type(model)
    ours, own = again.state_dict(), model.state_dict()
    assert ours.keys() == own.keys() and all(torch.equal(ours[name], own[name]) for name in own)
    with torch.no_grad():
        np.testing.assert_array_equal(theirs(again, inputs_of()).logits, theirs(model, inputs_of()).logits)
    assert mllm_jax.load_pretrained(tmp_path).config == vlm.config
