"""Qwen2-VL and Qwen2.5-VL equal transformers' in fp32: logits, gradients, greedy tokens, files; positions of clips."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_chat
import torch
import transformers
from PIL import Image
from reference import END, IMAGE, START, VIDEO, assert_export, assert_step, batch_of, perturb, prompt, to_torch
from safetensors.numpy import load_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

import mllm_jax
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import read_spec, write_spec
from mllm_jax.families import FAMILIES, spec_for
from mllm_jax.families.vlms import qwen2_vl
from mllm_jax.model.vlm import count_params

NEW = 8
TEXT = dict(
    vocab_size=200,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]),
    bos_token_id=None,
    eos_token_id=None,
)
VISION = dict(depth=3, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
FIRST = dict(VISION, embed_dim=48, hidden_size=64, mlp_ratio=2)
WINDOWS = dict(window_size=16, fullatt_block_indexes=[1], tokens_per_second=2)
SECOND = dict(VISION, hidden_size=48, intermediate_size=72, out_hidden_size=64, **WINDOWS)
KINDS = {"qwen2_vl": ("Qwen2VL", FIRST, True), "qwen2_5_vl": ("Qwen2_5_VL", SECOND, False)}
# An image of several windows, whole and cut ones; a narrow one; clips short enough for transformers' own positions.
ROWS = [(3, ("image", 12, 6), 4), (17,), (1, ("clip", 2, 4, 4), 2, ("image", 2, 10), 3, ("clip", 1, 6, 4), 5)]


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """Our model read from the folder of transformers', that model, and the folder."""
    name, vision, tie = KINDS[request.param]
    tokens = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    config = getattr(transformers, f"{name}Config")(
        text_config=TEXT, vision_config=vision, tie_word_embeddings=tie, **tokens
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval().float()
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                parameter.mul_(2.0)  # or a token's embedding outweighs what the layers add, and greedy tokens repeat
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return mllm_jax.load_pretrained(folder), model, folder


def inputs_of(vlm, side="right", labels=False, rows=ROWS):
    rng = np.random.default_rng(7)
    inputs = batch_of([prompt(rng, *row) for row in rows], side, labels)
    videos = len(inputs.get("video_grid_thw", ()))
    return inputs | (
        dict(second_per_grid_ts=np.full(videos, 0.5, np.float32)) if vlm.config.inputs.position_rate else {}
    )


def test_logits_and_gradients(pair, tmp_path, record_property):
    vlm, model, _ = pair  # the gradients are the latter's: transformers' loss of the former predicts from padding too
    batches = [inputs_of(vlm, side, labels=True) for side in ("left", "right")]
    assert_step(record_property, vlm, model, batches, tmp_path)


def test_greedy_tokens(pair):
    vlm, model, _ = pair
    inputs = inputs_of(vlm, "left", rows=ROWS[:2] + [(1, ("image", 2, 10), 3, ("image", 4, 4), 5)])
    with torch.no_grad():
        ids = model.generate(**to_torch(inputs), max_new_tokens=NEW, do_sample=False, pad_token_id=0).numpy()
    expected = ids[:, inputs["input_ids"].shape[1] :]
    assert len(np.unique(expected)) > 5
    batch = mllm_jax.from_hf_inputs(vlm.config, inputs)
    np.testing.assert_array_equal(mllm_jax.generate_ids(vlm, batch, NEW), expected)


def test_transformers_loads_what_is_saved(pair, tmp_path):
    vlm, model, folder = pair
    assert_export(vlm, model, inputs_of(vlm), tmp_path)
    published, ours = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert any(name.startswith("visual.blocks.") for name in published)
    assert published.keys() - ours.keys() <= {"lm_head.weight"} and ours.keys() <= published.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, published[name])


def test_what_follows_a_clip_comes_after_all_of_it(pair):
    """Qwen's own rule; transformers 5 ignores the temporal axis for the position of the text that follows."""
    vlm, _, _ = pair
    inputs = inputs_of(vlm, rows=[(3, ("clip", 8, 4, 4), 4)])
    second = "second_per_grid_ts" in inputs
    inputs |= dict(second_per_grid_ts=np.array([0.75])) if second else {}
    position = mllm_jax.from_hf_inputs(vlm.config, inputs).position[0]
    times = np.floor(np.arange(8) * (1.5 if second else 1)).astype(int)
    first = 4  # three tokens and the bracket
    np.testing.assert_array_equal(position[:first], np.arange(first)[:, None].repeat(3, 1))
    np.testing.assert_array_equal(position[first : first + 32, 0], first + times.repeat(4))
    np.testing.assert_array_equal(position[first : first + 32, 1], first + np.tile([0, 0, 1, 1], 8))
    np.testing.assert_array_equal(position[first : first + 32, 2], first + np.tile([0, 1, 0, 1], 8))
    after = first + times[-1] + 1
    np.testing.assert_array_equal(position[first + 32 :], (after + np.arange(5))[:, None].repeat(3, 1))


def test_bad_inputs(pair):
    vlm, _, _ = pair
    inputs = inputs_of(vlm)
    with pytest.raises(ValueError, match="second_per_grid_ts: has 1 values for 2 videos"):
        mllm_jax.from_hf_inputs(vlm.config, inputs | {"second_per_grid_ts": np.ones(1)})
    with pytest.raises(ValueError, match="no size '3b'"):
        FAMILIES["qwen2_vl"].config("3b")


def test_conversations_equal_transformers(pair, tmp_path):
    """Images and clips from messages: tokens, sizes, frames and positions as transformers' processors make them."""
    vlm, _, _ = pair
    spec = replace(spec_for(vlm.config), min_pixels=256, max_pixels=4096, video_min_pixels=256, video_max_pixels=1024)
    assert spec.label is None and spec.factor == 8 and spec.mean == vlm.config.encoder.pixel_mean
    processor = Processor.from_folder(tiny_chat.write_tokenizer(tmp_path), spec)
    rng = np.random.default_rng(0)
    pixels, frames = (rng.integers(0, 256, shape, np.uint8) for shape in ((37, 70, 3), (11, 40, 60, 3)))
    content = [
        {"type": "image", "image": Image.fromarray(pixels)},
        {"type": "text", "text": "and"},
        {"type": "video", "video": frames, "fps": 3.0},
        {"type": "text", "text": "?"},
    ]
    example = processor([{"role": "user", "content": content}], generate=True)

    sides = dict(patch_size=4, merge_size=2)
    theirs = Qwen2VLImageProcessorPil(**sides, size=dict(shortest_edge=256, longest_edge=4096))
    made = theirs(images=[Image.fromarray(pixels)], return_tensors="np")
    assert (1, *example.images[0].grid) == tuple(made["image_grid_thw"][0])
    mean, std = (np.repeat(np.float32(x), 2 * 4 * 4) for x in (spec.mean, spec.std))
    normal = (example.images[0].patches / np.float32(255) - mean) / std
    np.testing.assert_allclose(normal, made["pixel_values"], atol=1.01 / 255 / min(spec.std))

    taken = np.arange(0, 11, 11 / 6).astype(int)  # two a second of 11 / 3 seconds, in whole temporal patches
    height, width = smart_resize(40, 60, 8, 256, 1024)
    assert [image.grid for image in example.images[1:]] == [(height // 4, width // 4)] * 3
    first = theirs(images=[Image.fromarray(frames[taken[0]])], size=dict(shortest_edge=256, longest_edge=1024))
    second = theirs(images=[Image.fromarray(frames[taken[1]])], size=dict(shortest_edge=256, longest_edge=1024))
    by_frame = lambda patches: np.asarray(patches).reshape(-1, 3, 2, 16)
    clip = by_frame((example.images[1].patches / np.float32(255) - mean) / std)
    for time, frame in enumerate((first, second)):
        expected = by_frame(frame["pixel_values"])[:, :, 0]
        np.testing.assert_allclose(clip[:, :, time], expected, atol=1.01 / 255 / min(spec.std))

    grid = (3, height // 4, width // 4)
    text = processor.template.render([{"role": "user", "content": content}], True)
    for token, patches in (("<|image_pad|>", made["image_grid_thw"]), ("<|video_pad|>", grid)):
        text = text.replace(token, token * int(np.prod(patches) // 4))
    np.testing.assert_array_equal(example.tokens, transformers.AutoTokenizer.from_pretrained(tmp_path)(text).input_ids)
    tokens = replace(vlm.config.tokens, image=processor.image_id, video=processor.video_id)
    inputs = {
        "input_ids": example.tokens[None],
        "pixel_values": made["pixel_values"],
        "image_grid_thw": made["image_grid_thw"],
        "pixel_values_videos": np.zeros((np.prod(grid), 96), np.float32),
        "video_grid_thw": np.array([grid]),
        "second_per_grid_ts": np.array([2 / (6 / 11 * 3)]),  # as Qwen2_5_VLProcessor says it
    }
    decoder = replace(vlm.config.decoder, vocab=len(processor.tokenizer))
    batch = mllm_jax.from_hf_inputs(replace(vlm.config, tokens=tokens, decoder=decoder), inputs)
    np.testing.assert_array_equal(example.position, batch.position[0])
    np.testing.assert_array_equal(example.vision_index, batch.vision_index[0])


def test_published_files_of_processors(tmp_path):
    """Qwen2.5-VL's files have the same settings for videos as for images."""
    tiny_chat.write_tokenizer(tmp_path)
    said = dict(min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2)
    said |= dict(processor_class="Qwen2_5_VLProcessor", image_mean=[0.4, 0.5, 0.6])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    spec = Processor.from_folder(tmp_path, spec_for(FAMILIES["qwen2_vl"].config("2.5-7b"))).spec
    assert (spec.min_pixels, spec.max_pixels) == (spec.video_min_pixels, spec.video_max_pixels) == (3136, 12845056)
    assert spec.processor_class == "Qwen2_5_VLProcessor" and spec.position_rate == 2 and spec.factor == 28
    write_spec(spec, tmp_path)
    assert read_spec(tmp_path, spec_for(FAMILIES["qwen2_vl"].config("2.5-7b"))) == spec


# Counted in transformers' models on torch's meta device.
PUBLISHED = {
    "2b": 2_208_985_600,
    "7b": 8_291_375_616,
    "72b": 73_405_560_320,
    "2.5-3b": 3_754_622_976,
    "2.5-7b": 8_292_166_656,
    "2.5-32b": 33_452_718_336,
    "2.5-72b": 73_410_777_344,
}


@pytest.mark.parametrize("size", qwen2_vl.SIZES)
def test_published_sizes(size):
    config = FAMILIES["qwen2_vl"].config(size)
    assert sum(count_params(config).values()) == PUBLISHED[size]
    assert FAMILIES["qwen2_vl"].from_hf(FAMILIES["qwen2_vl"].to_hf(config)) == config


def test_published_config(shared):
    published = json.loads((shared / "data/configs/Qwen2.5-VL-7B-Instruct.json").read_text())
    assert FAMILIES["qwen2_vl"].from_hf(published) == FAMILIES["qwen2_vl"].config("2.5-7b")
    flat = published | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    del flat["text_config"]  # as files were before
    assert FAMILIES["qwen2_vl"].from_hf(flat) == FAMILIES["qwen2_vl"].config("2.5-7b")
