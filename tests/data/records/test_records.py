"""Layouts of records: images as bytes, videos as frames, and documents, from the record to its tokens."""

import io

import numpy as np
import pytest
import tiny_chat
from PIL import Image

from mllm_jax.data.pipeline.packing import Budget, collate
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.pipeline.workers import Process
from mllm_jax.data.records.fields import Bad
from mllm_jax.data.records.records import BadRecord, read_record
from mllm_jax.data.tools.inline_media import embedded

A = {"role": "assistant", "content": "B."}


def png(height=32, width=32, seed=0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def find(name):
    if name != "a.png":
        raise Bad("missing file", name)
    return "/data/a.png"


def read(record):
    return read_record(record, "r1", find)["messages"]


def image(value):
    return {"type": "image", "image": value}


def text(value):
    return {"type": "text", "text": value}


def document(*parts):
    return [{"role": "document", "content": list(parts)}]


@pytest.mark.parametrize(
    "record, content",
    [
        ({"images": [b"x", {"bytes": None, "path": "a.png"}]}, [image(b"x"), image("/data/a.png"), text("A?")]),
        ({"frames": [b"x", b"y"], "fps": 2}, [{"type": "video", "video": [b"x", b"y"], "fps": 2.0}, text("A?")]),
        ({"video": {"bytes": b"x", "path": None}}, [{"type": "video", "video": b"x"}, text("A?")]),
        ({"image": None, "images": [], "frames": []}, "A?"),
    ],
)
def test_files_beside_a_conversation(record, content):
    asked = {"messages": [{"role": "user", "content": "A?"}, A]}
    pairs = {"texts": [{"user": "A?", "assistant": "B."}]}
    for turns in (asked, pairs):
        assert read(record | turns) == [{"role": "user", "content": content}, A]


def test_parts_without_a_file_take_those_beside_the_messages():
    parts = [{"type": "image", "text": None}, text("A?"), {"type": "image"}]
    record = {"images": [b"x", "a.png"], "messages": [{"role": "user", "content": parts}, A]}
    assert read(record)[0]["content"] == [image(b"x") | {}, text("A?"), image("/data/a.png")]
    with pytest.raises(BadRecord, match="r1: placeholders and files differ in number .2 <image> for 1"):
        read(record | {"images": [b"x"]})


def test_rates_of_videos():
    video = {"type": "video", "video": "a.png", "fps": 4}
    frames = {"type": "video", "video": [{"bytes": b"x"}, "a.png"]}
    content = read({"fps": 1.5, "messages": [{"role": "user", "content": [video, frames]}, A]})[0]["content"]
    assert content == [
        {"type": "video", "video": "/data/a.png", "fps": 4.0},
        {"type": "video", "video": [b"x", "/data/a.png"], "fps": 1.5},
    ]


@pytest.mark.parametrize(
    "record, messages",
    [
        ({"text": "Only text."}, document(text("Only text."))),
        ({"text": "A cat.", "image": b"x"}, document(image(b"x"), text("A cat."))),
        (
            {"texts": ["One.", "Two.", None, "Three."], "images": [None, None, b"x", None]},
            document(text("One.\n\nTwo."), image(b"x"), text("Three.")),
        ),
        ({"texts": ["One.", "Two."]}, document(text("One.\n\nTwo."))),
        (
            {
                "text_list": ["One.", "Two.", "Three."],
                "image_info": [
                    {"image_name": "a.png", "matched_text_index": 2, "raw_url": "https://example.org"},
                    {"image_name": "a.png", "matched_text_index": 0},
                ],
            },
            document(image("/data/a.png"), text("One.\n\nTwo."), image("/data/a.png"), text("Three.")),
        ),
        ({"messages": document(text("As it is."))}, document(text("As it is."))),
        (
            {"text": "beside", "messages": [{"role": "user", "content": "A?"}, A]},
            [{"role": "user", "content": "A?"}, A],
        ),
    ],
)
def test_documents(record, messages):
    assert read(record) == messages
    assert (
        read_record({"messages": messages}, "r", str)["messages"] == messages
    )  # what is read can be written and read again


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"texts": ["a"], "images": [None, b"x"]}, "texts and images differ in number"),
        ({"texts": [None], "images": [b"x"]}, "no text"),
        ({"text": "", "images": [b"x"]}, "no text"),
        ({"text_list": ["a"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]}, "not a document"),
        ({"text_list": ["a"], "image_info": [{}]}, "not a document"),
        ({"texts": ["a", 3]}, "not a conversation"),
        ({"texts": ["b", None], "images": [None, "c.png"]}, "missing file"),
        ({"messages": [*document(text("a")), A]}, "wrong roles"),
    ],
)
def test_broken_documents(record, reason):
    with pytest.raises(BadRecord) as caught:
        read(record)
    assert caught.value.reason == reason and caught.value.id == "r1"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tiny_chat.write_tokenizer(tmp_path_factory.mktemp("tiny"))
    return Processor.from_folder(folder, ProcessorSpec(min_pixels=32 * 32, max_pixels=64 * 64))


def test_every_token_of_a_document_is_learned_but_those_of_images(processor):
    encode, one = processor.tokenizer.encode, processor.tokenizer.id
    start, shown, end = (one(f"<|{name}|>") for name in ("vision_start", "image_pad", "vision_end"))
    texts = encode("the one"), encode("\n\nthe <|im_end|> second")
    example = processor(document(text("the one"), image(png(64, 32)), text("\n\nthe <|im_end|> second")), kind="page")
    visual = [start, shown, shown, end]
    assert example.tokens.tolist() == [*texts[0], *visual, *texts[1], processor.end_of_turn_id]
    assert example.weight.tolist() == [1.0] * len(texts[0]) + [0.0] * 4 + [1.0] * (len(texts[1]) + 1)
    assert len(example.images) == 1 and example.vision_index[len(texts[0]) :].tolist()[:4] == [-1, 0, 1, -1]
    batch = collate([[example]], Budget(64, 1, 16), merge=2, values=example.images[0].patches.shape[1])
    learned = batch.targets[0][batch.weight[0] > 0].tolist()
    assert learned == [*texts[0][1:], *texts[1], processor.end_of_turn_id]  # nothing comes before the first
    prompt = processor(document(text("the one")), generate=True)
    assert prompt.tokens.tolist() == texts[0] and not prompt.weight.any()


def test_a_document_begins_as_the_tokenizer_has_it(tmp_path):
    """Llama's tokenizers put <s> before every text."""
    import json

    from tokenizers import processors

    folder = tiny_chat.write_tokenizer(tmp_path)
    plain = Processor.from_folder(folder, ProcessorSpec())
    full = plain.tokenizer._full
    full.post_processor = processors.TemplateProcessing(
        "<|im_start|> $0", special_tokens=[("<|im_start|>", full.token_to_id("<|im_start|>"))]
    )
    full.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    processor = Processor.from_folder(folder, ProcessorSpec())
    example, ids = processor(document(text("the one"))), processor.tokenizer.id
    text_ids = processor.tokenizer.encode("the one")
    assert example.tokens.tolist() == [ids("<|im_start|>"), *text_ids, ids("<|endoftext|>")]
    assert example.weight.tolist() == [0.0] + [1.0] * (len(text_ids) + 1)


def test_images_as_bytes_are_those_of_files(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(png(48, 40))
    one, two = (processor(document(image(source), text("x"))) for source in (png(48, 40), str(tmp_path / "a.png")))
    np.testing.assert_array_equal(one.images[0].patches, two.images[0].patches)


def test_damaged_bytes_are_a_broken_record(processor):
    process = Process(processor, Budget(128, 2, 64), strict=False)
    for data in (b"nothing", png()[:200], b""):
        record = {"messages": document(image(data), text("x")), "kind": "", "id": "r7"}
        skipped = process(record)
        assert skipped.reason == "not readable" and skipped.message.startswith("r7: not readable (<")
        assert "not a readable image" in skipped.message
    video = {"type": "video", "video": b"nothing"}
    skipped = process({"messages": document(video, text("x")), "kind": "", "id": "r8"})
    assert skipped.reason == "not readable" and "r8: not readable (<bytes>: not a readable video" in skipped.message


def test_embedded_records_need_no_file(tmp_path, processor):
    (tmp_path / "a.png").write_bytes(png())
    array = np.random.default_rng(0).integers(0, 256, (4, 48, 32, 3), np.uint8)
    video = {"type": "video", "video": array, "fps": 2.0}
    record = {"messages": document(image(str(tmp_path / "a.png")), video, text("x")), "kind": "k", "id": "r"}
    whole = embedded(record)
    assert whole["messages"][0]["content"][0]["image"] == png()
    assert all(frame[:4] == b"\x89PNG" for frame in whole["messages"][0]["content"][1]["video"])
    one, two = processor(record["messages"]), processor(whole["messages"])
    for a, b in zip(one.images, two.images, strict=True):
        np.testing.assert_array_equal(a.patches, b.patches)
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(BadRecord, match="r: not readable"):
        embedded(record)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadRecord, match="r: missing file"):
        embedded(record)


def test_a_video_as_bytes_is_that_of_its_file(shared, processor):
    path = sorted((shared / "data" / "video").rglob("*.mp4"))[0]
    for source in (str(path), path.read_bytes()):
        example = processor(document({"type": "video", "video": source, "fps": 0.5}, text("x")))
        if source == str(path):
            expected = example
    np.testing.assert_array_equal(example.tokens, expected.tokens)
    np.testing.assert_array_equal(example.images[1].patches, expected.images[1].patches)
