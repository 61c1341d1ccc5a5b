"""BLIP-2 and InstructBLIP: logits, gradients, greedy tokens, files and processors equal transformers'."""

import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny_chat
import torch
import transformers
from PIL import Image
from reference import assert_export, assert_step, perturb
from tiny_models import tiny
from tokenizers import BertWordPieceTokenizer

import mllm_jax
from mllm_jax.data.pipeline.packing import Budget, TooLarge
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.text.chat_template import ChatTemplate
from mllm_jax.families import FAMILIES, spec_for
from mllm_jax.model.vlm import abstract_params, count_params
from mllm_jax.weights.table import expand

IMAGE, QUERIES, NEW = 150, 5, 8
FAMILY = FAMILIES["blip-2"]
PROMPTS = [(1, 5, 9), (1, 3, 2), (1, 6, 4)]  # images, tokens before and after the beginning of the answer


@pytest.fixture(scope="module", params=["blip-2", "instructblip"])
def pair(request, tmp_path_factory):
    """Our model, read from files that transformers wrote; theirs."""
    model = tiny(request.param)
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"language_model\.model\.(decoder\.)?layers", name) and parameter.ndim == 2:
                parameter.mul_(3.0)  # or the embedding outweighs what the layers add, and greedy tokens repeat
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return mllm_jax.load_pretrained(folder), model


def inputs_of(model, side="right", answers=True):
    """Padded rows with an image each, instructions of several lengths, and labels where `answers`."""
    rng, rows, pixels = np.random.default_rng(3), [], []
    for images, question, answer in PROMPTS:
        pixels += list(rng.standard_normal((images, 3, 16, 16)).astype(np.float32))
        ids = [IMAGE] * QUERIES * images + rng.integers(5, 149, question + answer).tolist()
        labels = [-100] * (len(ids) - answer) + ids[len(ids) - answer :]
        rows.append((ids, labels) if answers else (ids[: len(ids) - answer], None))
    length = max(len(ids) for ids, _ in rows)
    inputs = {name: np.zeros((len(rows), length), np.int64) for name in ("input_ids", "attention_mask")}
    inputs |= {"labels": np.full((len(rows), length), -100)} if answers else {}
    for row, (ids, labels) in enumerate(rows):
        here = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        for name, value in zip(inputs, (ids, 1, labels)):
            inputs[name][row, here] = value
    inputs |= {"pixel_values": np.stack(pixels)}
    if model.config.model_type == "blip-2":
        return inputs
    mask = (np.arange(12) < np.array([[5], [12], [1]])).astype(np.int64)
    return inputs | {"qformer_input_ids": rng.integers(1, 60, (3, 12)) * mask, "qformer_attention_mask": mask}


def test_logits_and_gradients(pair, tmp_path, record_property):
    vlm, model = pair
    unused = r"qformer\.encoder\.layer\.2\.(intermediate|output)\."  # of the text behind the last layer
    batches = [inputs_of(model, side) for side in ("left", "right")]
    assert_step(record_property, vlm, model, batches, tmp_path, unused=unused)


def test_greedy_tokens(pair):
    vlm, model = pair
    inputs = inputs_of(model, "left", answers=False)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        settings = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
        expected = model.generate(**tensors, **settings).numpy()[:, inputs["input_ids"].shape[1] :]
    assert len(np.unique(expected)) > 5
    for side in ("left", "right"):
        batch = mllm_jax.from_hf_inputs(vlm.config, inputs_of(model, side, answers=False))
        np.testing.assert_array_equal(mllm_jax.generate_ids(vlm, batch, NEW), expected)


def test_transformers_loads_what_is_saved(pair, tmp_path):
    assert_export(*pair, inputs_of(pair[1]), tmp_path)


# Model cards count 3.74B and 7.75B for BLIP-2, https://huggingface.co/Salesforce.
PUBLISHED = {
    ("blip-2", "opt-2.7b"): 3_744_761_856,
    ("blip-2", "opt-6.7b"): 7_752_869_376,
    ("instructblip", "vicuna-7b"): 7_913_726_720,
    ("instructblip", "vicuna-13b"): 14_192_093_952,
}


@pytest.mark.parametrize(("family", "name"), PUBLISHED)
def test_published_sizes(family, name):
    family, parameters = FAMILIES[family], PUBLISHED[family, name]
    config = family.config(name)
    assert sum(count_params(config).values()) == parameters
    assert family.from_hf(family.to_hf(config)) == config
    expand(family.weights(config), abstract_params(config))


def test_a_config_json_that_says_little():
    """Fields that published files leave out have transformers' defaults."""
    text = dict(model_type="opt", hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32)
    published = dict(model_type="blip-2", image_token_index=50265, text_config=text | dict(vocab_size=50304))
    assert FAMILY.from_hf(published) == FAMILY.config("opt-2.7b")
    assert FAMILY.from_hf(published | {"image_token_index": None}).tokens.image < 0
    with pytest.raises(ValueError, match="qformer_config.encoder_hidden_size=1024: must be vision_config.hidden_size"):
        FAMILY.from_hf(published | {"qformer_config": {"encoder_hidden_size": 1024}})
    with pytest.raises(ValueError, match="model_type"):
        FAMILY.from_hf(published | {"text_config": {"model_type": "t5"}})


def test_transformers_reads_the_processor(tmp_path):
    """transformers loads the saved files, and makes the same tokens and pixels of a prompt and an image."""
    expected = replace(spec_for(FAMILY.config("opt-2.7b")), template=None)
    tiny_chat.write_tokenizer(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        text = (tmp_path / name).read_text().replace("<|image_pad|>", "<image>")
        (tmp_path / name).write_text(text)
    (tmp_path / "chat_template.jinja").write_text(FAMILY.spec.template)
    processor = Processor.from_folder(tmp_path, expected)
    processor.save(tmp_path / "saved")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "saved")
    assert isinstance(theirs, transformers.Blip2Processor) and theirs.num_query_tokens == 32
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8))
    turns = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]
    ours = processor(turns, generate=True)
    inputs = theirs(images=image, text="Question: what? Answer:")
    assert inputs["input_ids"][0] == ours.tokens.tolist()
    patches = ours.images[0].patches[1:].reshape(16, 16, 3, 14, 14).transpose(2, 0, 3, 1, 4).reshape(3, 224, 224)
    mean, std = (np.array(values)[:, None, None] for values in (expected.mean, expected.std))
    np.testing.assert_allclose((patches / 255 - mean) / std, np.asarray(inputs["pixel_values"])[0], atol=1e-5)
    assert Processor.from_folder(tmp_path / "saved", expected).spec.rule == processor.spec.rule


def test_instructions(tmp_path):
    """Every image has the text of its turn, in tokens of the Q-Former's tokenizer, as in transformers' processor."""
    config = FAMILIES["instructblip"].config("vicuna-7b")
    spec = replace(spec_for(config), instruction_positions=9)
    tiny_chat.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        (tmp_path / "tokenizer_config.json").read_text().replace("<|image_pad|>", "<image>")
    )
    (tmp_path / "chat_template.jinja").write_text(spec.template)
    words = BertWordPieceTokenizer(
        {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "is"])}
    )
    (tmp_path / "qformer_tokenizer").mkdir()
    words.save(str(tmp_path / "qformer_tokenizer" / "tokenizer.json"))
    fields = {"tokenizer_class": "BertTokenizer", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    (tmp_path / "qformer_tokenizer" / "tokenizer_config.json").write_text(json.dumps(fields))
    processor = Processor.from_folder(tmp_path, spec)
    image = {"type": "image", "image": np.zeros((20, 30, 3), np.uint8)}
    turn = lambda *items: {"role": "user", "content": list(items)}
    text = lambda text: {"type": "text", "text": text}
    ours = processor([turn(image, text("who is")), {"role": "assistant", "content": "who"}, turn(text("is"), image)])
    assert [part.instruction.tolist() for part in ours.images] == [[2, 4, 5, 3], [2, 5, 3]]
    batch = processor.collate([[ours], []], Budget(256, 1, 1028, images_per_row=4, instruction_tokens=6))
    assert batch.vision.instruction.shape == (2, 1, 4, 6)
    assert batch.vision.instruction[0, 0, 0].tolist() == [2, 4, 5, 3, -1, -1]
    assert (batch.vision.instruction[0, 0, 2:] == -1).all()

    processor.save(tmp_path / "saved")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "saved")
    inputs = theirs(images=Image.new("RGB", (30, 20)), text="who is")
    alone = processor([turn(image, text("who is"))], generate=True)
    assert inputs["qformer_input_ids"][0] == alone.images[0].instruction.tolist()
    assert inputs["input_ids"][0] == alone.tokens.tolist()

    with pytest.raises(TooLarge, match="an instruction has 4 tokens, the budget is 3"):
        processor([turn(image, text("who is"))], budget=Budget(256, 1, 1028, 4, instruction_tokens=3))
    with pytest.raises(ValueError, match="has 10 tokens for the connector, which has 9 positions"):
        processor([turn(image, text("who " * 8))])


def test_prompts():
    """Visual tokens come before the token that begins a text; only the first turn has it."""
    render = partial(ChatTemplate(FAMILY.spec.template).render, bos_token="<s>", eos_token="</s>")
    user = lambda *content: {"role": "user", "content": list(content)}
    image, what = {"type": "image"}, {"type": "text", "text": "what?"}
    assert render([user(image, what)]) == "<image><s>Question: what? Answer:"
    assert render([user(image)]) == "<image><s>"
    turns = [user(image, what), {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "sure?"}]
    assert render(turns) == "<image><s>Question: what? Answer: a cat</s>Question: sure? Answer:"
    with pytest.raises(ValueError, match="BLIP-2 reads no messages of the role system"):
        render([{"role": "system", "content": "be kind"}])


def test_bad_inputs(pair):
    vlm, model = pair
    inputs = inputs_of(model)
    if model.config.model_type == "instructblip":
        with pytest.raises(ValueError, match="qformer_input_ids: 3 texts for 2 images. Pass one"):
            mllm_jax.from_hf_inputs(vlm.config, inputs | {"pixel_values": inputs["pixel_values"][:2]})
        long = {name: np.ones((3, 13), np.int64) for name in ("qformer_input_ids", "qformer_attention_mask")}
        with pytest.raises(ValueError, match="qformer_input_ids have a text of 13 tokens; the model has"):
            mllm_jax.from_hf_inputs(vlm.config, inputs | long)
        with pytest.raises(ValueError, match="qformer_input_ids hold 60, which is not a token"):
            mllm_jax.from_hf_inputs(vlm.config, inputs | {"qformer_input_ids": np.full((3, 12), 60)})
    else:
        with pytest.raises(ValueError, match="placeholders more than the images"):
            mllm_jax.from_hf_inputs(vlm.config, inputs | {"pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(ValueError, match="the text has 4 visual tokens, but the images have 5"):
        short = inputs["input_ids"].copy()
        short[0, 0] = 7
        mllm_jax.from_hf_inputs(vlm.config, inputs | {"input_ids": short})
