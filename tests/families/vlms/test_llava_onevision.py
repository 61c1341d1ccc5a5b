"""LLaVA-OneVision equals transformers' on random tiny weights: one image, several, pooled grids, clips, files."""

import json
import types
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_chat
import torch
import transformers
from PIL import Image
from reference import assert_export, assert_step, perturb, to_torch
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

import mllm_jax
from mllm_jax.data.pipeline.packing import collate, smallest_budget
from mllm_jax.data.pipeline.spans import frame_by_frame
from mllm_jax.data.vision.tiles import best_canvas
from mllm_jax.families import FAMILIES, spec_for
from mllm_jax.families.vlms import llava_onevision
from mllm_jax.generate.buckets import pad_prompts
from mllm_jax.model.vlm import abstract_boxed, count_params
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.sharding.weights import shardings
from mllm_jax.train.step.batches import batch_shardings
from mllm_jax.types import NEWLINE

IMAGE, VIDEO, NEW, TILE, SIDE = 150, 151, 6, 20, 5
PINPOINTS = [[TILE * rows, TILE * columns] for rows in range(1, 4) for columns in range(1, 4)]
# Sizes of the images, and frames of the clips, in every row: uncut, pooled, several, none, a clip, both.
ROWS = [([(20, 30)], []), ([(70, 50)], []), ([(30, 20), (7, 40)], []), ([], []), ([], [3]), ([(33, 61)], [3])]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Ours, read from files that transformers wrote; theirs."""
    config = transformers.LlavaOnevisionConfig(
        vision_config=dict(
            model_type="siglip_vision_model", image_size=TILE, patch_size=4, vision_use_head=False,
            hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        ),
        text_config=dict(
            model_type="qwen2", vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        ),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_3",
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval().float()
    perturb(model)
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            parameter.mul_(2.0)  # or a token's embedding outweighs what the layers add, and greedy tokens repeat
    folder = tmp_path_factory.mktemp("onevision")
    model.save_pretrained(folder)
    return mllm_jax.load_pretrained(folder), model


def counting():
    """transformers' processor, as far as it counts tokens: without torchvision it cannot be made."""
    processor = object.__new__(LlavaOnevisionProcessor)
    processor.image_processor = types.SimpleNamespace(image_grid_pinpoints=PINPOINTS)
    processor.num_image_tokens, processor.vision_aspect_ratio = SIDE**2, "anyres_max_3"
    processor.vision_feature_select_strategy = "full"
    return processor


def inputs_of(rows=ROWS, side="right", labels=False):
    """Prompts with images and clips of random pixels, as their own processor would give them."""
    rng, counts, pixels, sizes, numbers, videos, ids = np.random.default_rng(3), counting(), [], [], [], [], []
    for images, films in rows:
        tokens = rng.integers(5, 149, 4 + len(ids)).tolist()
        for height, width in images:
            canvas = best_canvas((height, width), PINPOINTS)
            tiles = 1 if len(images) > 1 else 1 + canvas[0] * canvas[1] // TILE**2
            drawn = np.zeros((10, 3, TILE, TILE), np.float32)
            drawn[:tiles] = rng.standard_normal((tiles, 3, TILE, TILE))
            pixels.append(drawn)
            sizes.append((height, width))
            own = counts._get_number_of_features(height, width, TILE, TILE)
            tokens += [IMAGE] * (SIDE**2 + 1 if len(images) > 1 else own) + rng.integers(5, 149, 3).tolist()
        for frames in films:
            videos.append(rng.standard_normal((frames, 3, TILE, TILE)).astype(np.float32))
            tokens += [VIDEO] * (frames * 9 + 1) + rng.integers(5, 149, 3).tolist()
        numbers += [len(images)] if images else []
        ids.append(tokens)
    length = max(map(len, ids))
    filled, mask = np.zeros((2, len(ids), length), np.int64)
    for row, tokens in enumerate(ids):
        here = slice(0, len(tokens)) if side == "right" else slice(length - len(tokens), length)
        filled[row, here], mask[row, here] = tokens, 1
    inputs = {"input_ids": filled, "attention_mask": mask}
    if pixels:
        inputs |= {"pixel_values": np.stack(pixels), "image_sizes": np.array(sizes)}
        inputs |= {"batch_num_images": np.array(numbers)}
    if videos:
        inputs["pixel_values_videos"] = np.stack(videos)
    if labels:
        first = np.arange(length) == mask.argmax(axis=1)[:, None]  # nothing is before it to predict it from
        text = (mask == 1) & ~first & (filled < IMAGE)
        inputs["labels"] = np.where(text, filled, -100)
    return inputs


def test_logits_and_gradients(pair, tmp_path, record_property):
    batches = [inputs_of(side=side, labels=True) for side in ("left", "right")]
    mix = mllm_jax.from_hf_inputs(pair[0].config, batches[0]).mix
    assert (mix.weight > 0).all(axis=-1).sum() > 100  # places where four tokens meet
    assert_step(record_property, *pair, batches, tmp_path, unused="post_layernorm")


def test_greedy_tokens(pair):
    vlm, model = pair
    inputs = inputs_of(side="left")
    with torch.no_grad():
        settings = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = model.generate(**to_torch(inputs), **settings)[:, -NEW:].numpy()
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(
        mllm_jax.generate_ids(vlm, mllm_jax.from_hf_inputs(vlm.config, inputs), NEW), expected
    )


def test_files_go_back(pair, tmp_path):
    assert_export(*pair, inputs_of(), tmp_path)


@pytest.mark.slow
def test_a_mesh_changes_nothing(pair):
    """Tokens on several devices too: a grid's tokens come from patch rows of all of them."""
    vlm, model = pair
    inputs = inputs_of()
    batch = pad_prompts(mllm_jax.from_hf_inputs(vlm.config, inputs), merge=1)
    mesh, runtime = make_mesh({"fsdp": 2, "context": 4}), replace(vlm.config.runtime, context="ring")
    config = replace(vlm.config, runtime=runtime)
    params = jax.device_put(vlm.params, shardings(abstract_boxed(config), mesh, runtime.rules))
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, batch_shardings(batch, mesh, runtime.rules))
        found = jax.jit(config.build().apply)({"params": params}, batch).logits
    with torch.no_grad():
        expected = model(**to_torch(inputs)).logits.numpy()
    real = inputs["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(found)[:, : real.shape[1]][real], expected[real], atol=1e-4, rtol=1e-4)


def test_prompts_in_a_larger_shape_keep_their_tokens(pair):
    """Every visual token is the same patch as before, and a newline stays one."""
    batch = mllm_jax.from_hf_inputs(pair[0].config, inputs_of())
    larger = pad_prompts(batch, merge=1)
    before, after = (np.prod(each.vision.image.shape[1:]) for each in (batch, larger))
    assert before < after
    length = batch.tokens.shape[1]
    for old, new in ((batch.vision_index, larger.vision_index), (batch.mix.index, larger.mix.index)):
        new = new[:, :length]
        assert (old == before).any()
        np.testing.assert_array_equal(old == before, new == after)
        for row, (one, two) in enumerate(zip(old, new)):
            seen = (one >= 0) & (one < before)
            patches = (each.vision.patches[row].reshape(-1, 48) for each in (batch, larger))
            np.testing.assert_array_equal(*(values[index[seen]] for values, index in zip(patches, (one, two))))
    np.testing.assert_array_equal(batch.mix.weight, larger.mix.weight[:, :length])


def make_image(height, width):
    """Smooth colors and noise."""
    rng = np.random.default_rng(height * 10007 + width)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    return Image.fromarray((smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8))


SIZES = [(480, 640), (384, 384), (3000, 300), (300, 3000), (2304, 2304), (1080, 1920), (1, 1), (7, 1333), (899, 1024)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_of_published_sizes(size):
    """Order and blending of visual tokens: numbers in place of features, packed by transformers' own code."""
    config, side = FAMILIES["llava_onevision"].config("7b"), 27
    rule = spec_for(config).rule
    tiles = len(rule.sizes(size))
    numbers = torch.arange(tiles * side**2, dtype=torch.float64).view(tiles, side**2, 1)
    vision = types.SimpleNamespace(image_size=384, patch_size=14)
    pinpoints = [list(canvas) for canvas in config.inputs.pinpoints]
    model = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    newline = torch.tensor([-7.0], dtype=torch.float64)
    (expected,), _ = LlavaOnevisionModel.pack_image_features(model, [numbers], [size], newline)
    order, mix = rule.order(size, 14), rule.mix(size, 14)
    index = np.concatenate([order[:, None], mix.index], axis=1)
    values = np.where(index == NEWLINE, -7.0, index)
    np.testing.assert_allclose((values * mix.weight).sum(axis=1), expected[:, 0], rtol=1e-6, atol=1e-2)
    np.testing.assert_allclose(mix.weight.sum(axis=1), 1, rtol=1e-6)

    frames = torch.arange(2 * side**2, dtype=torch.float64).view(2, side**2, 1)
    pooled = LlavaOnevisionModel.apply_pooling(model, frames).flatten()
    order, mix = frame_by_frame(spec_for(config).video_rule, size, 14, 2)
    values = (np.concatenate([order[:, None], mix.index], axis=1) * mix.weight).sum(axis=1)
    assert order[-1] == NEWLINE and len(order) == 2 * 196 + 1
    np.testing.assert_allclose(values[:-1], pooled, rtol=1e-6, atol=1e-3)


@pytest.fixture(scope="module")
def read(pair, tmp_path_factory):
    """The model with a tokenizer and a chat template that writes images before clips, and these before text."""
    folder = tmp_path_factory.mktemp("chat")
    mllm_jax.save_pretrained(pair[0], folder)
    tiny_chat.write_tokenizer(folder)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        text = (folder / name).read_text().replace("<|image_pad|>", "<image>").replace("<|video_pad|>", "<video>")
        (folder / name).write_text(text)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for kind in ('image', 'video', 'text') %}"
        "{% for item in message.content if item.type == kind %}"
        "{{ item.text if kind == 'text' else '<' + kind + '>\n' }}{% endfor %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = json.loads((folder / "config.json").read_text())
    tokens = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    ids = {token["content"]: int(number) for number, token in tokens.items()}
    config |= {"image_token_index": ids["<image>"], "video_token_index": ids["<video>"]}
    (folder / "config.json").write_text(json.dumps(config))
    return mllm_jax.load_pretrained(folder)


def question(*items):
    kinds = {str: "text", list: "video"}
    content = [{"type": kinds.get(type(item), "image"), kinds.get(type(item), "image"): item} for item in items]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("sizes", [[(70, 50)], [(30, 20), (7, 40), (20, 20)], [(1, 1)]], ids=str)
def test_messages_become_what_transformers_reads(read, sizes):
    """Tiles, or one padded square for each of several images, to one level of 255; the same tokens and shares."""
    spec, images = read.processor.spec, [make_image(*size) for size in sizes]
    said = dict(image_mean=list(spec.mean), image_std=list(spec.std), image_grid_pinpoints=PINPOINTS)
    processor = LlavaOnevisionImageProcessorPil(size={"height": TILE, "width": TILE}, **said)
    arrays = dict(processor([images], return_tensors="np"))
    assert arrays["batch_num_images"].tolist() == [len(sizes)]
    example = read.processor(question("before", *images, "after"), generate=True)
    config = replace(read.config, decoder=replace(read.config.decoder, vocab=len(read.processor.tokenizer)))
    batch = mllm_jax.from_hf_inputs(config, arrays | {"input_ids": example.tokens[None]})
    found = collate([[example]], smallest_budget([example]), **read.config.layout)
    for name in ("tokens", "position", "vision_index"):
        np.testing.assert_array_equal(getattr(found, name), getattr(batch, name), err_msg=name)
    for one, two in zip(found.mix, batch.mix):
        np.testing.assert_array_equal(one, two)
    levels = (np.asarray(batch.vision.patches) * 0.5 + 0.5) * 255
    assert np.abs(levels - found.vision.patches).max() <= 1


def test_images_and_clips_of_a_conversation(read):
    """Media follow the order of the template, not of the message; frames are resized and four tokens become one."""
    frames, image = [make_image(40, 30)] * 3, make_image(33, 61)
    example = read.processor(question("what", frames, image), generate=True)
    image_id, video_id = read.config.tokens.image, read.config.tokens.video
    shown = example.tokens[example.visual]
    alone = len(read.processor(question(image)).images)
    assert np.flatnonzero(np.diff(shown)).tolist() == [(shown == image_id).sum() - 1]
    assert (shown == video_id).sum() == 3 * 9 + 1 and len(example.images) == alone + 3
    assert [image.time for image in example.images] == [0] * alone + [0, 1, 2]


def test_odd_images(read):
    """Images of one pixel, in gray, in CMYK and very long, and an empty conversation."""
    odd = [Image.new("RGB", (1, 1), "red"), Image.new("L", (60, 20)), Image.new("CMYK", (20, 30))]
    asked = [question("what", [make_image(40, 30)] * 3, odd[0]), question(*odd), question("hi")]
    assert len(mllm_jax.generate(read, asked, max_new_tokens=3)) == 3
    with pytest.raises(ValueError, match="20000x3.*aspect ratio over 200"):
        mllm_jax.generate(read, [question(Image.new("RGB", (20000, 3)))])
    assert mllm_jax.generate(read, []) == []


def test_processor_files(read, tmp_path):
    """Saved processor files load here and in transformers."""
    mllm_jax.save_pretrained(read, tmp_path)
    assert mllm_jax.load_pretrained(tmp_path).processor.spec == read.processor.spec
    theirs = LlavaOnevisionImageProcessorPil.from_pretrained(tmp_path)
    assert theirs.image_grid_pinpoints == PINPOINTS and list(theirs.image_mean) == [0.5] * 3
    assert (theirs.size["height"], theirs.size["width"]) == (TILE, TILE)
    counting = json.loads((tmp_path / "processor_config.json").read_text())
    said = dict(num_image_tokens=SIDE**2, vision_aspect_ratio="anyres_max_3", vision_feature_select_strategy="full")
    assert counting == counting | said | {"processor_class": "LlavaOnevisionProcessor", "video_token": "<video>"}
    videos = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert videos["size"] == {"height": TILE, "width": TILE}
    assert videos["video_processor_type"] == "LlavaOnevisionVideoProcessor"


def test_bad_inputs(pair):
    config, inputs = pair[0].config, inputs_of()
    with pytest.raises(ValueError, match="images in batch_num_images"):
        mllm_jax.from_hf_inputs(config, inputs | {"batch_num_images": np.array([1, 1])})
    with pytest.raises(ValueError, match="placeholders more than the images"):
        mllm_jax.from_hf_inputs(config, {k: v for k, v in inputs.items() if k != "pixel_values_videos"})
    stated = FAMILIES["llava_onevision"].to_hf(config)
    with pytest.raises(ValueError, match='vision_aspect_ratio=.* must be "anyres_max_9"'):
        FAMILIES["llava_onevision"].from_hf(stated | {"vision_aspect_ratio": "square"})
    with pytest.raises(ValueError, match="no size '8b'. Choose one of 0.5b, 7b, 72b"):
        FAMILIES["llava_onevision"].config("8b")


def test_published_sizes():
    """Parameters of transformers' models of these configs."""
    expected = {"0.5b": 893_675_552, "7b": 8_030_807_584, "72b": 73_181_570_592}
    assert {name: sum(count_params(FAMILIES["llava_onevision"].config(name)).values()) for name in expected} == expected
    for config in llava_onevision.SIZES.values():
        assert FAMILIES["llava_onevision"].from_hf(FAMILIES["llava_onevision"].to_hf(config)) == config
