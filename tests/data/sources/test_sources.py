"""JSON Lines of conversations: three layouts, one result, and clear refusals."""

import json
import os
import pickle
from pathlib import Path

import pytest

from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources import open_source
from mllm_jax.data.sources.shards import Conversations

QUESTION, ANSWER = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.mp4"):
        (root / "images" / name).write_bytes(b"x")
    (tmp_path / "secret.png").write_bytes(b"x")
    os.symlink(tmp_path / "secret.png", root / "out.png")
    os.symlink(root / "images" / "a.png", root / "in.png")
    return root


def source(folder: Path, *records, **options) -> Conversations:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / "set.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_source(folder / "set.jsonl", **options)


def image(folder, name="images/a.png"):
    return {"type": "image", "image": str(folder.resolve() / name)}


def text(value):
    return {"type": "text", "text": value}


def test_three_layouts_give_the_same_conversation(folder):
    llava = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    parts = [{"type": "image", "image": "images/a.png"}, text("What is it?")]
    url = [{"type": "image_url", "image_url": {"url": "images/a.png"}}, text("What is it?")]
    records = source(
        folder,
        {"image": "images/a.png", "conversations": llava, "id": 1},
        {"messages": [{"role": "user", "content": parts}, ANSWER], "id": "1", "kind": ""},
        "",
        {"messages": [{"role": "user", "content": url}, ANSWER], "id": "1"},
        {"image": "images/a.png", "conversations": [QUESTION, ANSWER], "id": "1", "license": "CC0"},
        {"images": ["images/a.png"], "messages": [QUESTION, ANSWER], "id": "1"},
    )
    expected = {
        "messages": [{"role": "user", "content": [image(folder), text("What is it?")]}, ANSWER],
        "kind": "",
        "id": "1",
    }
    assert [records[i] for i in range(len(records))] == [expected] * 5


def test_placeholders_are_filled_in_order_and_over_turns(folder):
    turns = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "First <image> then <video>\nWhat?"},
        {"from": "gpt", "value": "This."},
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "That."},
    ]
    record = {"images": ["images/a.png", "images/b.png"], "video": "images/c.mp4", "conversations": turns}
    item = source(folder, record)[0]
    video = {"type": "video", "video": str(folder.resolve() / "images/c.mp4")}
    assert item["id"] == "set.jsonl:1"
    assert [m["role"] for m in item["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert item["messages"][1]["content"] == [text("First "), image(folder), text(" then "), video, text("What?")]
    assert item["messages"][3]["content"] == [image(folder, "images/b.png")]


def test_placeholders_in_a_text_without_files_are_text(folder):
    turns = [{"role": "user", "content": "What does <image> mean?"}, ANSWER]
    assert source(folder, {"messages": turns})[0]["messages"][0]["content"] == "What does <image> mean?"


def test_filters_and_line_names(folder):
    records = source(
        folder,
        {"messages": [QUESTION, ANSWER], "split": "train", "task": "vqa"},
        {"messages": [QUESTION, ANSWER], "split": "test", "task": "vqa"},
        {"messages": [QUESTION, ANSWER], "split": "train", "task": "ocr"},
        {"messages": [QUESTION, ANSWER], "split": "train", "task": "caption"},
        where={"split": "train", "task": ("ocr", "caption")},
    )
    assert [records[i]["id"] for i in range(len(records))] == ["set.jsonl:3", "set.jsonl:4"]
    assert [records[i]["kind"] for i in range(len(records))] == ["ocr", "caption"]
    assert pickle.loads(pickle.dumps(records))[1] == records[1]
    with pytest.raises(ValueError, match="no records where"):
        open_source(folder / "set.jsonl", where={"split": "validation"})


def test_root_apart_from_the_file(folder, tmp_path):
    (tmp_path / "lists").mkdir()
    record = {"image": "a.png", "conversations": [QUESTION, ANSWER]}
    records = source(tmp_path / "lists", record, root=folder / "images")
    assert records[0]["messages"][0]["content"][0] == image(folder)


def with_image(path):
    return {"image": path, "conversations": [QUESTION, ANSWER]}


def llava(value, **files):
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A."}], **files}


@pytest.mark.parametrize(
    "record, reason",
    [
        ("{broken", "not valid JSON"),
        ("[1]", "not a conversation"),
        ({"image": "images/a.png"}, "not a conversation"),
        ({"messages": ["hello"]}, "not a conversation"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "not a conversation"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a"}]}, ANSWER]},
            "not a conversation",
        ),
        ({"messages": []}, "wrong roles"),
        ({"messages": [QUESTION]}, "wrong roles"),
        ({"messages": [ANSWER, QUESTION]}, "wrong roles"),
        ({"messages": [QUESTION, ANSWER, {"role": "system", "content": "x"}]}, "wrong roles"),
        ({"messages": [{"role": "narrator", "content": "x"}, ANSWER]}, "wrong roles"),
        ({"messages": [{"role": ["user"], "content": "x"}, ANSWER]}, "wrong roles"),
        (llava("<image>"), "placeholders and files differ in number"),
        (llava("What?", image="images/a.png"), "placeholders and files differ in number"),
        (llava("<image><image>", image="images/a.png"), "placeholders and files differ in number"),
        (llava("<video>", image="images/a.png"), "placeholders and files differ in number"),
        (with_image("images/none.png"), "missing file"),
        (with_image("images"), "missing file"),
        (with_image(7), "not a path"),
        (with_image("a\0b"), "not a path"),
        (with_image("../secret.png"), "path leaves the data root"),
        (with_image("images/../../secret.png"), "path leaves the data root"),
        (with_image("/etc/passwd"), "path leaves the data root"),
        (with_image("out.png"), "path leaves the data root"),
        (with_image("https://example.org/a.png"), "not a local file"),
        (with_image("file:///etc/passwd"), "path leaves the data root"),
    ],
)
def test_broken_records_are_named_with_their_reason(folder, record, reason):
    with pytest.raises(BadRecord, match="set.jsonl:1") as caught:
        source(folder, record)[0]
    assert caught.value.reason == reason and caught.value.id == "set.jsonl:1"


def test_links_within_the_root_are_fine(folder):
    assert source(folder, with_image("in.png"))[0]["messages"][0]["content"][0] == image(folder)


def test_real_conversations(shared):
    records = open_source(shared / "data" / "conversations.jsonl", where={"split": "test"})
    items = [records[i] for i in range(len(records))]
    assert {item["kind"] for item in items} >= {"caption", "presence", "counting", "grounding", "vqa"}
    assert all(os.path.isfile(item["messages"][0]["content"][0]["image"]) for item in items)
