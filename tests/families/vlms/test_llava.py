"""LLaVA, LLaVA-NeXT and InternVL: logits, gradients, tokens and files equal transformers' on random tiny weights."""

from dataclasses import replace

import numpy as np
import pytest
import tiny_chat
import torch
import transformers
from PIL import Image
from reference import assert_export, assert_parity, assert_step, to_torch
from tiny_llava import CONFIGS, IMAGE, TEXT, inputs_of, llava_config, random_model, reference_of

import mllm_jax
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.families import FAMILIES, spec_for
from mllm_jax.families.vlms import llava
from mllm_jax.model.vlm import InputRules, count_params

NEW = 6


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(our model, read from files that transformers wrote; theirs)"""
    folder, model = tmp_path_factory.mktemp(request.param), reference_of(request.param)
    model.save_pretrained(folder)
    return mllm_jax.load_pretrained(folder), model


def test_logits_and_gradients(pair, tmp_path, record_property):
    """The last layer of the tower is not read where the one before is, nor a norm after it."""
    batches = [inputs_of(pair[1], side=side, labels=True) for side in ("left", "right")]
    unused = r"post_layernorm|vision_tower.*layer\w*\.2\.|mask_token"
    assert_step(record_property, *pair, batches, tmp_path, unused=unused)


def test_greedy_tokens(pair):
    ours, model = pair
    inputs = inputs_of(model, side="left")
    with torch.no_grad():
        settings = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = model.generate(**to_torch(inputs), **settings)[:, -NEW:].numpy()
    batch = mllm_jax.from_hf_inputs(ours.config, inputs)
    np.testing.assert_array_equal(mllm_jax.generate_ids(ours, batch, NEW), expected)


def test_files_go_back(pair, tmp_path):
    assert_export(*pair, inputs_of(pair[1]), tmp_path)


def test_the_class_token_may_be_a_visual_token(tmp_path, record_property):
    """ "full" keeps the first feature of CLIP, which stands before those of the patches."""
    model = random_model(llava_config(vision_feature_select_strategy="full", image_seq_length=17))
    model.save_pretrained(tmp_path / "theirs")
    vlm, inputs = mllm_jax.load_pretrained(tmp_path / "theirs"), inputs_of(model, side="left")
    found = vlm.model.apply({"params": vlm.params}, mllm_jax.from_hf_inputs(vlm.config, inputs)).logits
    with torch.no_grad():
        wanted = model(**to_torch(inputs)).logits.numpy()
    real = inputs["attention_mask"] == 1
    assert_parity(record_property, "llava", np.asarray(found)[real], wanted[real])
    mllm_jax.save_pretrained(vlm, tmp_path / "ours")
    assert mllm_jax.load_pretrained(tmp_path / "ours").config == vlm.config
    with pytest.raises(ValueError, match="nor tiled images"):
        replace(
            FAMILIES["llava"].config("next-vicuna-7b"), inputs=InputRules(llava.PINPOINTS, shows_prefix_tokens=True)
        )


def test_a_text_part_keeps_its_names(tmp_path):
    """Phi-3 has the layers of Mistral under different tensor names."""
    text = dict(model_type="phi3", pad_token_id=0, **TEXT)
    model = transformers.LlavaForConditionalGeneration(llava_config(text_config=text))
    model.save_pretrained(tmp_path / "theirs")
    mllm_jax.save_pretrained(mllm_jax.load_pretrained(tmp_path / "theirs"), tmp_path / "ours")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert again.config.text_config.model_type == "phi3"
    tensors = again.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, msg=name)
    assert sum("qkv_proj" in name for name in tensors) == TEXT["num_hidden_layers"]


@pytest.mark.parametrize(
    ("size", "shows_prefix_tokens"), [("1.5-7b", False), ("1.5-7b", True), ("next-mistral-7b", False)]
)
def test_transformers_reads_the_processor(size, shows_prefix_tokens, tmp_path):
    """transformers loads the saved files and makes the same tokens of a prompt and an image."""
    config = FAMILIES["llava"].config(size)
    expected = spec_for(replace(config, inputs=replace(config.inputs, shows_prefix_tokens=shows_prefix_tokens)))
    tiny_chat.write_tokenizer(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        text = (tmp_path / name).read_text().replace("<|image_pad|>", "<image>")
        (tmp_path / name).write_text(text)
    processor = Processor.from_folder(tmp_path, expected)
    processor.save(tmp_path / "saved")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "saved")
    image = Image.new("RGB", (640, 480))
    turns = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]
    text = processor.template.render(turns, generate=True)
    ours = processor(turns, generate=True)
    assert theirs(text=text, images=image)["input_ids"][0] == ours.tokens.tolist()
    assert Processor.from_folder(tmp_path / "saved", expected).spec.rule == processor.spec.rule


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_published_sizes(family):
    family = FAMILIES[family]
    totals = {name: sum(count_params(family.config(name)).values()) for name in family.sizes}
    assert totals == {name: PARAMETERS[name] for name in family.sizes}


def test_published_configs_are_read_back():
    for family in (FAMILIES["llava"], FAMILIES["internvl"]):
        for config in family.sizes.values():
            assert family.from_hf(family.to_hf(config)) == config


def test_bad_inputs(pair):
    ours, model = pair
    inputs = inputs_of(model)
    few = dict(inputs, pixel_values=inputs["pixel_values"][:1])
    if "image_sizes" in inputs:
        few["image_sizes"] = inputs["image_sizes"][:1]
    with pytest.raises(ValueError, match="placeholders more than the images"):
        mllm_jax.from_hf_inputs(ours.config, few)
    text = np.where(inputs["input_ids"] == IMAGE, 5, inputs["input_ids"])
    with pytest.raises(ValueError, match="images or videos have no placeholders .token 150. in input_ids"):
        mllm_jax.from_hf_inputs(ours.config, inputs | {"input_ids": text})
    with pytest.raises(ValueError, match="unknown inputs.*image_grid_thw"):
        mllm_jax.from_hf_inputs(ours.config, dict(inputs, image_grid_thw=np.zeros((1, 3))))


PARAMETERS = {
    "1.5-7b": 7063427072,
    "1.5-13b": 13351494656,
    "next-vicuna-7b": 7063431168,
    "next-vicuna-13b": 13351499776,
    "next-mistral-7b": 7566747648,
    "next-34b": 34752083968,
    "next-llama3-8b": 8355276800,
    "next-72b": 72666949632,
    "next-110b": 111588943872,
    "3-1b": 938193024,
    "3-2b": 2088957440,
    "3-8b": 7944373760,
    "3-14b": 15117256704,
    "3-38b": 38388164992,
    "3-78b": 78408318336,
}
