"""InternVL reads a video as frames, each an image of one tile after its number: text and arrays as transformers has."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_chat
from examples import random_params
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.internvl.processing_internvl import InternVLProcessor

import mllm_jax
from mllm_jax.data.pipeline.packing import Budget, TooLarge, collate, smallest_budget
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spans import TimestampedFrames
from mllm_jax.data.video.videos import Video
from mllm_jax.families import FAMILIES, spec_for
from mllm_jax.pretrained.api import Pretrained

NAMES = {"<|image_pad|>": "<IMG_CONTEXT>", "<|vision_start|>": "<img>", "<|vision_end|>": "</img>"}
NAMES["<|video_pad|>"] = "<video>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for item in message.content %}"
    "{{ {'image': '<IMG_CONTEXT>\n', 'video': '<video>\n', 'text': item.text}[item.type] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_processor(folder, video="<video>"):
    """A tokenizer with InternVL's tokens, of which that of videos may have another name; the ids of all."""
    tiny_chat.write_tokenizer(folder)
    text = (folder / "tokenizer_config.json").read_text()
    for ours, own in (NAMES | {"<|video_pad|>": video}).items():
        text = text.replace(ours, own)
    (folder / "tokenizer_config.json").write_text(text)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return {token["content"]: int(number) for number, token in json.loads(text)["added_tokens_decoder"].items()}


def config_of(family, image):
    """A tiny model, of transformers' files or of OpenGVLab's."""
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(image_size=16, patch_size=4, **small)
    text = dict(model_type="qwen2", vocab_size=300, num_key_value_heads=1, rms_norm_eps=1e-6, rope_theta=1e4, **small)
    text |= dict(tie_word_embeddings=False)
    if family == "internvl":
        return FAMILIES[family].from_hf(
            dict(vision_config=vision | {"model_type": "internvl_vision"}, text_config=text, image_token_id=image)
        )
    told = dict(ps_version="v2", dynamic_image_size=True, use_thumbnail=True, force_image_size=16)
    tower = dict(model_type="intern_vit_6b", norm_type="layer_norm", qk_normalization=False, **vision)
    return FAMILIES[family].from_hf(
        told
        | dict(vision_config=tower, llm_config=text, max_dynamic_patch=4, template="internvl2_5")
        | dict(img_context_token_id=image)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("internvl")


@pytest.fixture(scope="module")
def vlm(folder):
    config = config_of("internvl", write_processor(folder)["<IMG_CONTEXT>"])
    return Pretrained(config, config.build(), random_params(config), Processor.from_folder(folder, spec_for(config)))


def frame(number, height=24, width=40):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8))


def asked(*items):
    kinds = {str: "text", list: "video"}
    content = [{"type": kinds.get(type(item), "image"), kinds.get(type(item), "image"): item} for item in items]
    return [{"role": "user", "content": content}]


def theirs_of(folder):
    """transformers' processor, as far as it writes text: without torchvision it cannot be made."""
    theirs = object.__new__(InternVLProcessor)
    theirs.image_token, theirs.video_token, theirs.image_seq_length = "<IMG_CONTEXT>", "<video>", 4
    theirs.start_image_token, theirs.end_image_token = "<img>", "</img>"
    theirs.tokenizer = AutoTokenizer.from_pretrained(folder)
    return theirs


@pytest.mark.parametrize("before", ["what:", ""])
def test_text_and_tokens_equal_transformers(vlm, folder, before):
    """Two videos and an image between them, with text that the label of a frame could grow together with."""
    theirs, videos, still = theirs_of(folder), [[frame(n) for n in range(k)] for k in (3, 2)], frame(9, 16, 40)
    messages = asked(*([before] if before else []), videos[0], still, "and:", videos[1], "moves?")
    arrays = {"pixel_values_videos": [np.zeros((len(clip), 3, 16, 16)) for clip in videos]}
    video_texts = [theirs.replace_video_token(arrays, number) for number in range(2)]
    tiles = len(vlm.processor.spec.rule.sizes((16, 40)))
    images = [theirs.replace_image_token({"num_patches": [tiles]}, 0)]
    text = vlm.processor.template.render(messages, generate=True)
    (text,), _ = theirs.get_text_with_replacements([text], images, video_texts)
    assert "Frame3: <img>" in text and tiles > 1
    assert vlm.processor(messages, generate=True).tokens.tolist() == theirs.tokenizer(text)["input_ids"]


def test_frames_are_images_of_one_tile(vlm):
    """The batch is that of the arrays which transformers' processor would give, frames among tiles."""
    clip, still = [frame(n) for n in range(3)], frame(9, 16, 40)
    example, spec = vlm.processor(asked(still, clip, "moves?"), generate=True), vlm.processor.spec
    one = replace(spec.rule, high=1)
    tiles = [*spec.rule.images(still), *(tile for image in clip for tile in one.images(image))]
    assert len(tiles) == len(example.images) > 1 + len(clip)
    mean, std = (np.array(x) for x in (spec.mean, spec.std))
    pixels = ((np.stack(tiles) / 255 - mean) / std).transpose(0, 3, 1, 2)
    given = mllm_jax.from_hf_inputs(vlm.config, {"input_ids": example.tokens[None], "pixel_values": pixels})
    found = collate([[example]], smallest_budget([example]), **vlm.config.layout)
    for name in ("tokens", "position", "vision_index"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given, name), err_msg=name)
    scale = np.repeat(std, 16) * 255  # patches hold values in the order (c, t, y, x)
    levels = np.asarray(given.vision.patches) * scale + np.repeat(mean, 16) * 255
    real = np.asarray(found.vision.patches).any(axis=-1)
    np.testing.assert_allclose(levels[real], found.vision.patches[real], atol=1e-3)


def test_which_frames():
    """Eight to thirty-two, one a second; those in the middle of as many equal parts; others where a video asks."""
    config = config_of("internvl", 150)
    spec = spec_for(config)
    assert (spec.fps, spec.min_frames, spec.max_frames) == (1.0, 8, 32)
    clip = Video(300, 30.0, 24, 40, "video", lambda indices: iter(()))
    assert TimestampedFrames.sampled(clip, 1.0, spec).indices == [15, 45, 75, 105, 135, 165, 195, 225, 255, 285]
    assert TimestampedFrames.sampled(clip, 1.0, spec.asked({"nframes": 4})).indices == [37, 112, 187, 262]
    short = Video(3, 30.0, 24, 40, "video", lambda indices: iter(()))
    assert TimestampedFrames.sampled(short, 1.0, spec).indices == [0, 1, 2]


def test_generate_and_budget(vlm):
    """Conversations with videos are answered and packed; frames are not made smaller, so that too many are refused."""
    clip = [frame(n) for n in range(4)]
    answers = mllm_jax.generate(vlm, [asked(clip, "moves?"), asked("what", frame(7)), asked("hi")], max_new_tokens=3)
    assert len(answers) == 3
    whole, packed = (vlm.processor(asked(clip, "?"), budget=b) for b in (None, Budget(200, 2, 40)))
    np.testing.assert_array_equal(whole.tokens, packed.tokens)
    assert [image.time for image in packed.images] == [0, 1, 2, 3]
    with pytest.raises(TooLarge, match="4 images of 8. patches"):
        vlm.processor(asked(clip, "?"), budget=Budget(200, 1, 40))


def test_opengvlabs_files_have_no_token_for_clips(tmp_path):
    """Their template writes that of images, in the order of the message."""
    ids = write_processor(tmp_path, video="<quad>")
    (tmp_path / "chat_template.jinja").unlink()
    processor = Processor.from_folder(tmp_path, spec_for(config_of("internvl_chat", ids["<IMG_CONTEXT>"])))
    still, clip = frame(9, 16, 40), [frame(n) for n in range(2)]
    example = processor(asked(clip, still, "moves?"), generate=True)
    tiles = len(processor.spec.rule.sizes((16, 40)))
    assert [image.time for image in example.images] == [0, 1] + [0] * tiles
    shown = processor.tokenizer.decode(example.tokens, special=True).replace("<IMG_CONTEXT>" * 4, "*")
    one, several = "<img>*</img>", f"<img>{'*' * tiles}</img>"
    assert f"user\nFrame1: {one}\nFrame2: {one}\n{several}\nmoves?<|im_end|>" in shown


def test_a_tokenizer_without_the_token_reads_images_alone(tmp_path):
    ids = write_processor(tmp_path, video="<quad>")
    processor = Processor.from_folder(tmp_path, spec_for(config_of("internvl", ids["<IMG_CONTEXT>"])))
    assert len(processor(asked(frame(1), "what?")).images) > 0
    with pytest.raises(ValueError, match="reads no videos; its tokenizer has no token '<video>'"):
        processor(asked([frame(1)], "what?"))


def test_files_go_back(vlm, tmp_path):
    vlm.processor.save(tmp_path)
    assert Processor.from_folder(tmp_path, spec_for(vlm.config)).spec == vlm.processor.spec
    videos = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert videos["video_processor_type"] == "InternVLVideoProcessor" and videos["size"] == {"height": 16, "width": 16}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"num_frames": 5}))
    spec = Processor.from_folder(tmp_path, spec_for(vlm.config)).spec
    assert (spec.min_frames, spec.max_frames) == (5, 5)
