"""Conversations with images and videos to numbers, against transformers' processor and against expectations."""

import base64
import dataclasses
import io
import json
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import tiny_chat
from PIL import Image

from mllm_jax.data.pipeline.packing import Budget, TooLarge
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spans import BROKEN_FRAMES
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.video import videos
from mllm_jax.data.vision import images

SPEC = ProcessorSpec(min_pixels=64 * 64, max_pixels=256 * 256, video_max_pixels=8 * 128 * 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.write_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_folder(folder, SPEC)


def make_image(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def asking(*items, answer=None):
    content = [{"type": "text", "text": item} if isinstance(item, str) else item for item in items]
    return [{"role": "user", "content": content}] + ([{"role": "assistant", "content": answer}] if answer else [])


def image(*size):
    return {"type": "image", "image": make_image(*size)}


def video(frames, height, width, **options):
    array = np.stack([np.asarray(make_image(height, width, seed)) for seed in range(frames)])
    return {"type": "video", "video": array, **options}


def consistent(example, spec=SPEC):
    """Asserts the invariants of every example."""
    n, merge = len(example.tokens), spec.merge
    assert example.tokens.dtype == example.position.dtype == np.int32 and example.weight.dtype == np.float32
    assert example.tokens.shape == example.weight.shape == example.visual.shape == (n,) and example.visual.dtype == bool
    assert example.position.shape == (n, 3)
    for item in example.images:
        height, width = item.grid
        assert item.patches.dtype == np.uint8
        assert item.patches.shape == (height * width, 3 * spec.temporal_patch * spec.patch**2)
        assert height % merge == width % merge == 0
    assert example.visual.sum() == sum(len(item.patches) for item in example.images) // merge**2
    assert not example.weight[example.visual].any()


@pytest.mark.parametrize("generate", [False, True])
def test_images_equal_transformers(folder, processor, generate):
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    theirs = Qwen3VLProcessor.__new__(Qwen3VLProcessor)  # its video half needs torchvision
    theirs.tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = processor.template.source
    theirs.image_token, theirs.video_token = "<|image_pad|>", "<|video_pad|>"
    theirs.image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": SPEC.min_pixels, "longest_edge": SPEC.max_pixels},
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    images = [make_image(70, 133), make_image(40, 90), make_image(300, 500)]
    items = [{"type": "image", "image": item} for item in images]
    messages = asking(
        "first: ", items[0], items[1], " then\n\n", items[2], "the second? 5", answer=None if generate else "one"
    )
    text = processor.template.render(messages, generate)
    values, replacements = theirs._process_images(images)
    (text,), _ = theirs.get_text_with_replacements([text], replacements)

    example = processor(messages, generate=generate)
    consistent(example)
    assert example.tokens.tolist() == theirs.tokenizer(text)["input_ids"]
    assert [(1, *item.grid) for item in example.images] == [tuple(grid) for grid in values["image_grid_thw"].tolist()]
    pixels = (np.concatenate([item.patches for item in example.images]) / 255 - 0.5) / 0.5
    assert np.abs(pixels - values["pixel_values"]).max() < 2 / 255


def test_video_prompt_equals_transformers(folder, processor):
    from transformers import AutoTokenizer
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    example = processor(asking("look:", video(9, 60, 100, fps=4.0), "moves?", answer="no"))
    consistent(example)
    theirs = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    theirs.image_token, theirs.video_token = "<|image_pad|>", "<|video_pad|>"
    theirs.vision_start_token, theirs.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    theirs.video_processor = types.SimpleNamespace(merge_size=2, temporal_patch_size=2)
    grid = (len(example.images), *example.images[0].grid)
    metadata = types.SimpleNamespace(fps=4.0, frames_indices=np.array([0, 3, 5, 8]))
    replacement = theirs.replace_video_token({"video_grid_thw": np.array([grid]), "video_metadata": [metadata]}, 0)
    text = processor.template.render(asking("look:", {"type": "video"}, "moves?", answer="no"))
    (text,), _ = theirs.get_text_with_replacements([text], videos_replacements=[replacement])
    assert example.tokens.tolist() == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_video_by_hand(processor):
    """Five frames at 4 a second, sampled at 2: the minimum of 4 frames, in 2 temporal patches of 6 visual tokens."""
    example = processor(asking(video(5, 64, 96, fps=4.0), "?"))
    blocks = [["<0.1 seconds>", 6], ["<0.9 seconds>", 6]]  # (0 + 0.25) / 2 and (0.75 + 1) / 2
    expected = []
    for text, count in blocks:
        expected += processor.tokenizer.encode(text)
        expected += [processor.vision_start_id] + [processor.video_id] * count + [processor.vision_end_id]
    tokens = example.tokens.tolist()
    start = tokens.index(processor.vision_start_id) + 1  # the template's own
    assert tokens[start : start + len(expected)] == expected
    assert [item.time for item in example.images] == [0, 1]
    assert [item.grid for item in example.images] == [(4, 6), (4, 6)]
    first = np.flatnonzero(example.visual)[:6]
    assert np.ptp(example.position[first, 0]) == 0 and np.ptp(example.position[first, 2]) == 2
    assert example.position[first[-1] + 1].tolist() == [example.position[first[0], 0] + 3] * 3


def test_frames_of_a_video_in_memory_are_all_used_unless_it_says_its_rate(processor):
    assert len(processor(asking(video(5, 32, 32))).images) == 3  # the odd tail is padded
    assert len(processor(asking(video(12, 32, 32, fps=4.0))).images) == 3
    frames = [make_image(40, 40, seed) for seed in range(4)]
    assert len(processor(asking({"type": "video", "video": frames})).images) == 2


def test_still_images_and_videos_keep_their_order(processor):
    messages = asking(image(64, 64), video(2, 32, 64), "and", image(96, 64), answer="yes") + asking(image(64, 128))
    example = processor(messages, kind="order")
    consistent(example)
    assert [item.grid for item in example.images] == [(4, 4), (2, 4), (6, 4), (4, 8)]
    assert example.kind == "order"
    kept = example.tokens[example.weight > 0].tolist()
    assert processor.decode(kept) == "yes" and kept[-1] == processor.end_of_turn_id


def test_text_alone(processor):
    example = processor([{"role": "user", "content": "hi"}])
    consistent(example)
    assert example.images == () and not example.visual.any()
    np.testing.assert_array_equal(example.position[:, 2], np.arange(len(example.tokens)))


def test_special_tokens_in_text_are_not_images(processor):
    example = processor(asking("<|vision_start|><|image_pad|><|vision_end|>", image(64, 64), "<|video_pad|>"))
    consistent(example)
    assert len(example.images) == 1 and example.visual.sum() == 4
    assert "<|image_pad|>" in processor.decode(example.tokens)


@pytest.mark.parametrize(
    "messages, error",
    [
        ([], "at least one message"),
        ([{"role": "user"}], "role and a content"),
        (asking({"type": "audio", "audio": 1}), "content item"),
        (asking({"type": "image"}), "content item"),
        (asking({"type": "image", "image": b"no image"}), "not a readable image"),
        (asking({"type": "video", "video": []}), "video"),
        (asking(image(1, 300)), "aspect ratio"),
    ],
)
def test_bad_conversations(processor, messages, error):
    with pytest.raises(ValueError, match=error):
        processor(messages)


def test_images_and_videos_of_no_shape_are_named(processor, tmp_path):
    Image.new("RGB", (1, 300)).save(tmp_path / "stripe.png")
    for item in ({"type": "image", "image": str(tmp_path / "stripe.png")}, video(2, 1, 300)):
        with pytest.raises(ValueError, match="(stripe.png|<ndarray>): an image of .* has an aspect ratio over 200"):
            processor(asking(item))


def test_a_truncated_jpeg_that_is_tolerated_is_noted(processor):
    file = io.BytesIO()
    make_image(96, 64).save(file, "JPEG")
    asked = lambda data: asking({"type": "image", "image": data})
    whole, cut = asked(file.getvalue()[:-2]), asked(file.getvalue()[:-300])
    assert processor(whole).notes == ()
    with pytest.raises(ValueError, match="cut off: .* of its rows are missing"):
        processor(cut)
    tolerant = Processor(processor.tokenizer, processor.template, dataclasses.replace(processor.spec, missing_rows=0.5))
    assert tolerant(cut).notes == (images.TRUNCATED,) and tolerant(whole).notes == ()
    with pytest.raises(ValueError, match="missing_rows=1.5: must be at least 0 and at most 1"):
        dataclasses.replace(processor.spec, missing_rows=1.5)


def test_a_video_whose_broken_frames_are_replaced_is_noted(processor, monkeypatch):
    whole, opened = asking(video(4, 64, 64, fps=2.0)), videos.open_video
    assert processor(whole).notes == ()
    monkeypatch.setattr(videos, "open_video", lambda *said: dataclasses.replace(opened(*said), broken={1}))
    assert processor(whole).notes == (BROKEN_FRAMES,)


def test_files_of_messages_may_be_data_uris(processor):
    file = io.BytesIO()
    make_image(96, 64).save(file, "PNG")
    text = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    one, other = (processor(asking({"type": "image", "image": data})) for data in (text, file.getvalue()))
    np.testing.assert_array_equal(one.images[0].patches, other.images[0].patches)
    for kind in ("image", "video"):
        with pytest.raises(ValueError, match="^not a local file: https://example.org/a; download it"):
            processor(asking({"type": kind, kind: "https://example.org/a"}))


def test_a_template_that_hides_images_is_an_error(processor):
    template = type(processor.template)("{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}")
    with pytest.raises(ValueError, match="0 placeholders for 1 images"):
        Processor(processor.tokenizer, template, SPEC)(asking(image(64, 64)))
    with pytest.raises(ValueError, match="no token '<pad>'"):
        Processor(processor.tokenizer, template, ProcessorSpec(image_token="<pad>"))


def fits(example, budget):
    """Returns whether first-fit decreasing places the images in the rows."""
    rows = [0] * budget.patch_rows
    for size in sorted((len(item.patches) for item in example.images), reverse=True):
        slot = next(slot for slot, used in enumerate(rows) if used + size <= budget.patches_per_row)
        rows[slot] += size
    return len(example.tokens) <= budget.tokens


def test_a_large_budget_changes_nothing(processor):
    messages = asking(image(300, 200), video(6, 90, 70), image(20, 30), "what?", answer="x")
    free, held = processor(messages), processor(messages, budget=Budget(4096, 4, 4096))
    np.testing.assert_array_equal(free.tokens, held.tokens)
    for one, other in zip(free.images, held.images, strict=True):
        np.testing.assert_array_equal(one.patches, other.patches)


@pytest.mark.parametrize(
    "budget",
    [Budget(150, 8, 256), Budget(4096, 1, 256), Budget(4096, 2, 100), Budget(4096, 3, 64), Budget(200, 2, 128)],
)
def test_images_shrink_until_they_fit(processor, budget):
    messages = asking(image(250, 250), image(64, 200), video(4, 120, 120), "what?", answer="x")
    whole = processor(messages)
    assert len(whole.tokens) > 150
    example = processor(messages, budget=budget)
    consistent(example)
    assert fits(example, budget)
    assert len(example.images) == len(whole.images)
    text = ~example.visual, ~whole.visual
    np.testing.assert_array_equal(example.tokens[text[0]], whole.tokens[text[1]])
    np.testing.assert_array_equal(example.weight[text[0]], whole.weight[text[1]])


def test_shrinking_uses_the_room(processor):
    """One square image in one row: it gets the largest square of visual tokens that fits."""
    for patches, side in [(64, 8), (99, 8), (100, 10), (143, 10), (144, 12)]:
        example = processor(asking(image(250, 250)), budget=Budget(4096, 1, patches))
        assert example.images[0].grid == (side, side)


@pytest.mark.parametrize(
    "size", [(100, 600), (600, 100), (40, 800), (800, 40), (16, 1600), (1600, 16), (12, 2388), (200, 300)]
)
def test_a_small_budget_keeps_the_aspect_ratio(processor, size):
    """For images and videos in any budget; an image too long for it is dropped."""
    spec, left_out, aspect = processor.spec, 0, max(size) / min(size)
    most = 1.26 if aspect > 2 else 1.51  # 1.5:1 is 1 x 1 or 1 x 2
    for make in (lambda: image(*size), lambda: video(2, *size, fps=1.0)):
        (own,) = {item.grid for item in processor(asking(make())).images}
        own = max(own) / min(own)  # as the rule of transformers rounds it, within the bounds of the processor
        for tokens in (1, 2, 4, 8, 16, 24, 45, 64):
            try:
                example = processor(asking(make()), budget=Budget(4096, 1, tokens * spec.merge**2))
            except TooLarge:
                left_out += 1
                continue
            (grid,) = {item.grid for item in example.images}
            assert grid[0] == grid[1] or (grid[0] < grid[1]) == (size[0] < size[1])
            ratio = max(grid) / min(grid)
            assert min(own, aspect / most) <= ratio <= max(own, most * aspect), (tokens, grid)
    assert (left_out > 0) == (aspect > 2)


def test_a_conversation_that_cannot_fit(processor):
    """The smallest image here is 64 x 64 pixels: 16 patches, 4 visual tokens, unless a patch row holds less."""
    messages = asking(*[image(100, 100) for _ in range(4)], "what?")
    text = int((~processor(messages).visual).sum())
    assert processor(messages, budget=Budget(text + 16, 4, 16)).visual.sum() == 16
    with pytest.raises(TooLarge, match=rf"{text + 16} tokens.*room for {text + 15} tokens"):
        processor(messages, budget=Budget(text + 15, 4, 16))
    with pytest.raises(TooLarge, match="4 images of 64 patches.*3 rows of 16"):
        processor(messages, budget=Budget(1000, 3, 16))
    assert processor(messages, budget=Budget(1000, 4, 8)).visual.sum() == 4
    with pytest.raises(TooLarge, match="the largest 4"):
        processor(messages, budget=Budget(1000, 9, 3))
    with pytest.raises(TooLarge):
        processor([{"role": "user", "content": "word " * 50}], budget=Budget(20, 1, 16))
    assert processor([{"role": "user", "content": "word"}], budget=Budget(20, 0, 0)).images == ()


@pytest.mark.parametrize("parts", [False, True])
def test_a_text_far_over_the_budget_is_not_tokenized(processor, monkeypatch, parts):
    text = "word " * 2_000_000
    monkeypatch.setattr(type(processor.tokenizer), "encode", lambda *_, **__: pytest.fail("it was tokenized"))
    content = [{"type": "text", "text": text}] if parts else text
    with pytest.raises(TooLarge, match="a conversation of 9,999,999 characters needs at least .* room for 20"):
        processor([{"role": "user", "content": content}], budget=Budget(20, 1, 16))


def test_published_files(tmp_path):
    tiny_chat.write_tokenizer(tmp_path)
    size = {"longest_edge": 16777216, "shortest_edge": 65536}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size, "patch_size": 14, "merge_size": 2}))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 999}, "fps": 1}))
    spec = Processor.from_folder(tmp_path).spec
    assert spec == ProcessorSpec(patch=14, video_max_pixels=999, fps=1)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 5, "image_mean": [0.1, 0.2, 0.3]}))
    spec = Processor.from_folder(tmp_path).spec
    assert (spec.min_pixels, spec.mean, spec.std) == (5, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"patch_size": 12}}))
    assert Processor.from_folder(tmp_path).spec.patch == 12


def test_saved_and_sent_to_another_process(processor, tmp_path):
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor.save(tmp_path / "new")
    messages = asking(image(70, 90), video(3, 40, 50), "the end", answer="yes")
    for other in (Processor.from_folder(tmp_path / "new"), pickle.loads(pickle.dumps(processor))):
        assert other.spec == processor.spec and other.stop_ids == processor.stop_ids
        np.testing.assert_array_equal(other(messages).tokens, processor(messages).tokens)
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "new")
    assert (theirs.patch_size, theirs.size["longest_edge"]) == (16, SPEC.max_pixels)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.chat_template == processor.template.source
    assert {tokenizer.eos_token_id, tokenizer.pad_token_id} == set(processor.stop_ids)


def test_real_images_and_videos(shared, processor):
    """Conversations as they come, over one budget that most images have to shrink for."""
    lines = (shared / "data/conversations.jsonl").read_text().splitlines()[::150]
    for line in lines:
        record = json.loads(line)
        user, answer = (turn["content"] for turn in record["conversations"][:2])
        messages = asking({"type": "image", "image": shared / "data" / record["image"]}, user, answer=answer)
        example = processor(messages, budget=Budget(2048, 1, 128))
        consistent(example)
        assert fits(example, Budget(2048, 1, 128)) and example.weight.sum() > 1
    path = shared / "data/video/intel_asl/again.mkv"
    example = processor(asking({"type": "video", "video": path, "fps": 4}, "What is signed?"))
    consistent(example)
    assert len(example.images) >= 2


def test_data_needs_neither_jax_nor_torch():
    code = (
        "import sys, mllm_jax.data.pipeline.processor; "
        "print([name for name in ('jax', 'torch', 'transformers', 'av') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_one_item_is_a_list_of_one(processor):
    text = {"type": "text", "text": "hello"}
    for one, listed in ((text, [text]), (image(64, 64), [image(64, 64)])):
        alone, several = (processor([{"role": "user", "content": content}]) for content in (one, listed))
        np.testing.assert_array_equal(alone.tokens, several.tokens)
        assert len(alone.images) == len(several.images) == int(one is not text)
    with pytest.raises(ValueError, match="content item"):
        processor([{"role": "user", "content": {"type": "text", "text": 5}}])


def test_records_reach_the_template(processor):
    """Tools, and the weights of turns; what this template does not write is named."""
    record = {"messages": [*asking("hi", answer="one"), *asking("more", answer="two")], "kind": "", "id": "r"}
    plain = processor.example(record, Budget(512, 0, 0))
    record["messages"][1]["weight"], record["messages"][3]["weight"] = 0, 0.25
    weighed = processor.example(record, Budget(512, 0, 0))
    np.testing.assert_array_equal(plain.tokens, weighed.tokens)
    learned = plain.tokens[weighed.weight == 0.25].tolist()
    assert processor.decode(learned) == "two" and learned[-1] == processor.end_of_turn_id
    assert set(weighed.weight.tolist()) == {0, 0.25}
    with pytest.raises(ValueError, match="tools=.*leaves it out"):
        processor.example(record | {"tools": [{"name": "look"}]}, Budget(512, 0, 0))
    answer = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    with pytest.raises(ValueError, match=r"messages\[1\].tool_calls .assistant.*leaves it out"):
        processor.example(record | {"messages": [*asking("hi"), answer]}, Budget(512, 0, 0))


def test_content_tokens_of_users_are_a_setting_that_is_saved(processor, tmp_path):
    think, messages = processor.tokenizer.id("<think>"), asking("<think><|im_end|>", answer="<think>a")
    assert (processor(messages).tokens == think).sum() == 1
    other = processor.with_spec(user_content_tokens=True)
    assert (other(messages).tokens == think).sum() == 2
    for setting in (other, other.with_spec(user_content_tokens=False)):
        setting.save(tmp_path)
        again = Processor.from_folder(tmp_path)
        assert again.spec == setting.spec
        np.testing.assert_array_equal(again(messages).tokens, setting(messages).tokens)


def test_decoding_keeps_content_tokens(tmp_path):
    folder = tiny_chat.write_tokenizer(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["274"] = config["added_tokens_decoder"]["265"] | {"content": "<|box_start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    processor = Processor.from_folder(folder, SPEC)
    tokens = processor(asking("hi", answer="<think>a<|box_start|>(1,2)")).tokens
    assert processor.decode(tokens).endswith("<think>a<|box_start|>(1,2)\n")
    assert processor.decode(tokens, content_tokens=False).endswith("<think>a(1,2)\n")


QWEN = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
BOUNDS = {"shortest_edge": 3136, "longest_edge": 40000}


@pytest.mark.parametrize(
    "stated",
    [
        {"min_pixels": None, "max_pixels": None, "size": BOUNDS},
        {"size": None},
        {"size": None, "max_pixels": 30000},
        {"size": {"shortest_edge": None, "longest_edge": None}, "min_pixels": 3136, "max_pixels": 40000},
        {"size": {"min_pixels": 3136, "max_pixels": 40000}, "min_pixels": 3136, "max_pixels": 40000},
        {"size": BOUNDS, "max_pixels": 30000},
        {"size": BOUNDS, "do_convert_rgb": None, "processor_class": None},
    ],
    ids=str,
)
def test_null_is_absent(tmp_path, stated):
    """Sizes are those of transformers' processor that reads the same file."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from mllm_jax.data.pipeline.spec import read_spec

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(QWEN | stated))
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    usual = ProcessorSpec(min_pixels=56 * 56, max_pixels=28 * 28 * 1280)  # what that class has by default
    spec = read_spec(tmp_path, usual)
    tiny_chat.write_tokenizer(tmp_path)
    for size in [(300, 500), (30, 40), (1000, 90)]:
        pixels = make_image(*size)
        example = Processor.from_folder(tmp_path, spec)(asking({"type": "image", "image": pixels}))
        (grid,) = theirs(images=[pixels], return_tensors="np")["image_grid_thw"].tolist()
        assert [1, *example.images[0].grid] == grid


@pytest.mark.parametrize(
    "stated, said",
    [
        ({"size": {"height": 448, "width": 448}}, 'size={"height": 448, "width": 448}: must state shortest_edge'),
        ({"patch_size": "14"}, 'patch_size="14": must be an integer'),
        ({"min_pixels": -5}, "min_pixels=-5: must be an integer of at least 1"),
        ({"size": [448, 448]}, "size=.448, 448.: must be an integer"),
        ({"size": {"longest_edge": "wide"}}, 'size.longest_edge="wide": must be'),
        ({"image_mean": [0.5, 0.5]}, "image_mean=.0.5, 0.5.: must be three numbers"),
        ({"image_std": [0, 0, 0]}, "image_std.0.=0: must be a number"),
        ({"do_normalize": False}, "do_normalize=false: must be true"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0: must be a number"),
        ([], "must contain an object in braces, not list"),
    ],
    ids=str,
)
def test_fields_of_processors_that_cannot_be(tmp_path, stated, said):
    from mllm_jax.data.pipeline.spec import read_spec

    content = QWEN | stated if isinstance(stated, dict) else stated
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {said}"):
        read_spec(tmp_path, SPEC)
    if isinstance(stated, dict):
        (tmp_path / "preprocessor_config.json").unlink()
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": content}))
        with pytest.raises(ValueError, match="/processor_config.json: (image_processor.)?" + said):
            read_spec(tmp_path, SPEC)
