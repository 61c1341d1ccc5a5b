"""PaliGemma and PaliGemma 2: logits, gradients, greedy tokens and files equal transformers' on random tiny weights."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers
from reference import assert_export, assert_step, loss_of, perturb, to_torch

import mllm_jax
from mllm_jax.families import FAMILIES
from mllm_jax.model.vlm import abstract_boxed, abstract_params, count_params
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.sharding.weights import shardings
from mllm_jax.weights.table import expand

IMAGE, NEW = 150, 8
TEXT = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=24)
TEXT |= dict(num_hidden_layers=2, max_position_embeddings=512)
VISION = dict(model_type="siglip_vision_model", image_size=16, patch_size=4, vision_use_head=False)
VISION |= dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
CAPS = dict(attn_logit_softcapping=8.0, final_logit_softcapping=6.0)
CASES = {
    "paligemma": dict(model_type="gemma", num_key_value_heads=1, **TEXT),
    # A window that is shorter than an image: it does not count between tokens of a prefix.
    "paligemma2": dict(
        model_type="gemma2", num_key_value_heads=2, sliding_window=7, query_pre_attn_scalar=20, **TEXT, **CAPS
    ),
}
PROMPTS = [(1, 5, 9), (2, 3, 2), (0, 6, 4)]  # images, tokens of the question, tokens of the answer


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
    """Padded rows of images, questions and answers; `token_type_ids` is 1 in answers and, as padding, 0."""
    rng, rows, pixels = np.random.default_rng(3), [], []
    for images, question, answer in PROMPTS:
        pixels += list(rng.standard_normal((images, 3, 16, 16)).astype(np.float32))
        ids = [IMAGE] * 16 * images + rng.integers(5, 149, question + answer).tolist()
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


def test_logits_and_gradients(pair, tmp_path, record_property):
    vlm, model = pair
    batches = [inputs_of(side, labels=True) for side in ("left", "right")]
    assert_step(record_property, vlm, model, batches, tmp_path)

    # Without token_type_ids all is causal, as in transformers; a prefix is not the same as none.
    real = batches[-1]["attention_mask"] == 1
    causal = {name: value for name, value in batches[-1].items() if name != "token_type_ids"}
    with torch.no_grad():
        expected = model(**to_torch(causal)).logits.numpy()[real]
        assert np.abs(model(**to_torch(batches[-1])).logits.numpy()[real] - expected).max() > 0.1
    (_, logits), _ = loss_of(vlm.model)(vlm.params, mllm_jax.from_hf_inputs(vlm.config, causal))
    np.testing.assert_allclose(np.asarray(logits)[real], expected, atol=1e-4, rtol=1e-4)


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
    assert_export(*pair, inputs_of(), tmp_path)


PUBLISHED = {
    "3b-224": 2_923_466_480,
    "3b-448": 2_924_351_216,
    "3b-896": 2_927_890_160,
    "2-3b-224": 3_032_242_416,
    "2-3b-448": 3_033_127_152,
    "2-3b-896": 3_036_666_096,
    "2-10b-224": 9_662_638_832,
    "2-10b-448": 9_663_523_568,
    "2-10b-896": 9_667_062_512,
    "2-28b-224": 27_650_487_024,
    "2-28b-448": 27_651_371_760,
    "2-28b-896": 27_654_910_704,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = FAMILIES["paligemma"].config(name)
    assert sum(count_params(config).values()) == PUBLISHED[name]
    assert FAMILIES["paligemma"].from_hf(FAMILIES["paligemma"].to_hf(config)) == config
    expand(FAMILIES["paligemma"].weights(config), abstract_params(config))


def test_a_config_json_that_says_little():
    """Fields that published files leave out have transformers' defaults."""
    tower = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27, patch_size=14)
    text = dict(hidden_size=2048, intermediate_size=16384, num_attention_heads=8, num_hidden_layers=18)
    text |= dict(model_type="gemma", num_key_value_heads=1, vocab_size=257216)
    vision = tower | dict(model_type="siglip_vision_model", projection_dim=2048, vision_use_head=False)
    published = dict(model_type="paligemma", image_token_index=257152, text_config=text, vision_config=vision)
    assert FAMILIES["paligemma"].from_hf(published) == FAMILIES["paligemma"].config("3b-224")
    with pytest.raises(ValueError, match='vision_config.model_type="clip_vision_model": must be "siglip_vision_model"'):
        FAMILIES["paligemma"].from_hf(published | {"vision_config": {"model_type": "clip_vision_model"}})
    with pytest.raises(ValueError, match="PaliGemma has no size '7b'. Choose one of 3b-224"):
        FAMILIES["paligemma"].config("7b")


def test_a_mesh_changes_nothing(pair):
    """Tokens are sharded too: windows, softcaps, and prefixes that cross a shard boundary."""
    vlm, _ = pair
    batch = mllm_jax.from_hf_inputs(vlm.config, inputs_of())
    lengthened = lambda x: np.pad(x, ((0, 1), (0, 48 - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    text = {name: lengthened(x) for name, x in batch._asdict().items() if x is not None and name != "vision"}
    vision = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]), batch.vision)
    batch = batch._replace(**text, vision=vision._replace(grid=np.maximum(vision.grid, 1)))
    config = replace(vlm.config, runtime=replace(vlm.config.runtime, context="ring"))
    read = lambda config: jax.jit(config.build().apply)
    real = np.asarray(batch.segment) > 0
    alone = np.asarray(read(vlm.config)({"params": vlm.params}, batch).logits)[real]
    mesh = make_mesh({"fsdp": 2, "context": 4})
    params = jax.device_put(vlm.params, shardings(abstract_boxed(config), mesh, config.runtime.rules))
    with jax.set_mesh(mesh):
        spread = read(config)({"params": params}, batch)
    np.testing.assert_allclose(np.asarray(spread.logits)[real], alone, atol=1e-4)
