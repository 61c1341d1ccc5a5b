"""Whatever one record holds, it is counted, named and left out, in training and in conversion; work stays linear."""

import copy
import json
import random
import time

import pytest
import tiny_chat

from mllm_jax.data.pipeline.loader import make_loader
from mllm_jax.data.pipeline.packing import Budget
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.records.records import BadRecord, read_record
from mllm_jax.data.sources import open_source
from mllm_jax.data.tools.convert import convert

TURNS = [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]
CALL = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
GOOD = [
    {"messages": TURNS, "system": "S", "tools": '[{"name": "f"}]', "image": "a.png", "id": "1"},
    {"messages": [TURNS[0], CALL, {"role": "tool", "content": {"x": 1}}, TURNS[1] | {"weight": 1, "thinking": "Hm."}]},
    {"conversations": [{"from": "human", "value": "<image>Q?"}, {"from": "gpt", "value": "A."}], "images": ["a.png"]},
    {"query": "Q?", "response": "A.", "history": [["Q?", "A."]], "rejected_response": "B."},
    {"messages": [TURNS[0], TURNS[1] | {"content": "<ref-object><bbox>"}], "objects": {"ref": ["r"], "bbox": [[1, 2]]}},
    {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [TURNS[1] | {"content": "B."}], "facts": ["F."]},
    {"video": "a.mp4", "fps": 2, "messages": [TURNS[0] | {"content": [{"type": "video", "nframes": 3}]}, TURNS[1]]},
    {"texts": ["T.", None], "images": [None, "a.png"]},
    {"texts": [{"user": "Q?", "assistant": "A."}], "images": ["a.png"]},
    {"text_list": ["T."], "image_info": [{"image_name": "a.png", "matched_text_index": 0}]},
]
ODD = [
    None,
    True,
    -1,
    2**80,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "[]",
    "{",
    "null",
    [],
    [None],
    [[]],
    [{}],
    {},
]
ODD += [
    {"type": "text"},
    {"role": ["user"]},
    {"from": {}},
    [["a"]],
    {"image": {"bytes": 3}},
    b"x",
    "<image><bbox>",
    "a\0b",
]


def places(value, path=()):
    """Paths to the nested values of a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(rng):
    """A record of a published layout, in which one to three things are something else."""
    record = copy.deepcopy(rng.choice(GOOD))
    for _ in range(rng.randint(1, 3)):
        *path, last = rng.choice(list(places(record)))
        inner = record
        for key in path:
            inner = inner[key]
        inner[last] = copy.deepcopy(rng.choice(ODD))
        if isinstance(inner, dict) and rng.random() < 0.2:
            inner[rng.choice(["content", "type", "weight", "tool_calls", "objects", "chosen"])] = rng.choice(ODD)
    return record


def test_a_changed_record_is_read_or_refused_with_a_reason():
    rng, refused = random.Random(0), 0
    for _ in range(4000):
        record = changed(rng)
        try:
            found = read_record(record, "r", lambda name: f"/{name}")
        except BadRecord as error:
            refused += 1
            assert error.reason and str(error).encode()
        else:
            assert found["messages"] and json.dumps(found, default=repr).encode()
    assert 1000 < refused < 3900


def nested(depth):
    return '{"messages": ' + "[" * depth + "]" * depth + "}"


HOSTILE = [
    json.dumps({"messages": [TURNS[0] | {"content": "\ud800"}, TURNS[1]], "id": "surrogate"}),
    json.dumps({"messages": TURNS, "image": "\ud800.png", "id": "n\ud800"}),
    json.dumps({"messages": TURNS, "image": "x" * 300, "id": "long"}),
    json.dumps({"messages": TURNS, "image": "loop", "id": "loop"}),
    json.dumps({"messages": TURNS, "video": "loop", "nframes": 10**12}),
    nested(20_000),
    json.dumps({"messages": 5}),
    "[]",
    "not JSON",
    '{"messages": "\\u0000"}',
]
BIG = json.dumps({"messages": TURNS, "size": 2**80, "id": "big"})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    good = [json.dumps({"messages": TURNS, "id": f"good{i}"}) for i in range(4)]
    (tmp_path / "set.jsonl").write_text("\n".join([*good[:2], *HOSTILE, BIG, *good[2:]]))
    return tmp_path


def test_one_record_ends_no_run(folder, caplog):
    spec = ProcessorSpec(min_pixels=32 * 32, max_pixels=64 * 64)
    processor = Processor.from_folder(tiny_chat.write_tokenizer(folder / "tiny"), spec)
    source = open_source(str(folder / "set.jsonl"))
    options = dict(epochs=1, shuffle=False, workers=0, prefetch=0)
    *_, (_, info) = make_loader(source, processor, Budget(64, 1, 64), 2, **options)
    assert sum(info.skipped.values()) == len(HOSTILE)
    named = [record.getMessage() for record in caplog.records if record.getMessage().startswith("left out: ")]
    assert len(named) == len(HOSTILE) and "surrogate: not a text (a lone surrogate" in named[0]
    assert "not readable (RecursionError" in "".join(named) and "nframes 1 to 100,000" in "".join(named)


def test_one_record_ends_no_conversion(folder):
    held = convert(open_source(str(folder / "set.jsonl")), folder / "out", {}, records=4)
    assert held.records == 4 and sum(held.broken.values()) == len(HOSTILE) + 1
    assert held.broken["cannot be stored"] == 1  # MessagePack has 64 bits
    assert "big: cannot be stored" in (folder / "out" / "broken.txt").read_text(encoding="utf-8")
    found = open_source(str(folder / "out"))
    assert [found[i]["id"] for i in range(4)] == [f"good{i}" for i in range(4)]


COUNT = 30_000
LONG = {
    "parts": {"messages": [TURNS[0] | {"content": [{"type": "text", "text": "x"}] * COUNT}, TURNS[1]]},
    "images": {"images": ["a"] * COUNT, "messages": [TURNS[0] | {"content": [{"type": "image"}] * COUNT}, TURNS[1]]},
    "placeholders": {"images": ["a"] * COUNT, "messages": [TURNS[0] | {"content": "<image>" * COUNT}, TURNS[1]]},
    "turns": {"messages": TURNS * COUNT},
    "calls": {"messages": [TURNS[0], *[CALL] * COUNT]},
    "boxes": {
        "messages": [TURNS[0], TURNS[1] | {"content": "<bbox>" * COUNT}],
        "objects": {"bbox": [[0, 1]] * COUNT, "bbox_type": "norm1"},
    },
    "mmc4": {
        "text_list": ["x"] * COUNT,
        "image_info": [{"image_name": "a", "matched_text_index": i} for i in range(COUNT)],
    },
    "obelics": {"texts": ["x", None] * COUNT, "images": [None, "a"] * COUNT},
}


@pytest.mark.parametrize("kind", LONG)
def test_work_grows_with_the_length_of_a_record(kind):
    start = time.process_time()
    read_record(LONG[kind], "r", str)
    assert time.process_time() - start < 10  # 0.1 to 0.5 here; quadratic work takes longer
