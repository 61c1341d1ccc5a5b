"""Pairs of answers: every layout read, images that lie once, weights where answers differ, references that fit."""

import json
import re

import numpy as np
import pytest
import tiny_chat
from paths import ROOT
from PIL import Image

from mllm_jax.data.pipeline.loader import make_loader
from mllm_jax.data.pipeline.packing import Budget, TooLarge, collate
from mllm_jax.data.pipeline.preference import Pairs, Reference, content_hash, last_run, same_tokens
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.records.records import BadData, BadRecord, read_record
from mllm_jax.data.tools.inline_media import embedded

SPEC = ProcessorSpec(min_pixels=32 * 32, max_pixels=128 * 128)
ASKED, CHOSEN, REJECTED = "What is it?", "A cat on a mat.", "A dog on the mat."
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", ASKED), ("assistant", CHOSEN), ("assistant", REJECTED))
)
SHOWN = [{"type": "image", "image": "/a.png"}, {"type": "text", "text": ASKED}]
PARTS = [{"type": "image"}, {"type": "text", "text": ASKED}]
part = lambda message: [message | {"content": [{"type": "text", "text": message["content"]}]}]
read = lambda record: read_record(record, "r", lambda name: f"/{name}")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_folder(tiny_chat.write_tokenizer(tmp_path_factory.mktemp("tiny")), SPEC)


def image(seed=0, height=96, width=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def record(number=0, rejected=REJECTED, chosen=CHOSEN, **size):
    content = [{"type": "image", "image": image(number, **size)}, {"type": "text", "text": ASKED}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": chosen}]
    return {"messages": messages, "kind": "scene", "id": f"r{number}", "rejected": rejected}


@pytest.mark.parametrize(
    "layout",
    (
        {"image": "a.png", "question": ASKED, "chosen": CHOSEN, "rejected": REJECTED},
        {"image": "a.png", "question": f"<image>\n{ASKED}", "chosen": CHOSEN, "rejected": REJECTED},
        {"image": "a.png", "prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED},
        {"image": "a.png", "text": json.dumps({"question": ASKED, "chosen": CHOSEN, "rejected": REJECTED})},
        {"images": ["a.png"], "prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {
            "images": ["a.png"],
            "prompt": [{"role": "user", "content": PARTS}],
            "chosen": part(GOOD),
            "rejected": part(BAD),
        },
        {"images": ["a.png"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"images": ["a.png"], "messages": [USER, GOOD], "rejected": REJECTED},
        {"images": ["a.png"], "messages": [USER], "chosen": CHOSEN, "rejected": REJECTED},
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": f"<image>\n{ASKED}"}, {"from": "gpt", "value": CHOSEN}],
            "rejected": REJECTED,
        },
    ),
)
def test_layouts(layout):
    found = read(layout)
    assert found["messages"] == [{"role": "user", "content": SHOWN}, {"role": "assistant", "content": CHOSEN}] or (
        found["messages"][1]["content"] == part(GOOD)[0]["content"]
    )
    assert found["rejected"] == REJECTED
    assert read(found | {"id": "again"})["rejected"] == REJECTED  # what a conversion writes


@pytest.mark.parametrize(
    "layout, reason",
    (
        ({"question": ASKED, "chosen": CHOSEN, "rejected": CHOSEN}, "both answers are the same"),
        ({"chosen": [USER, GOOD], "rejected": [USER | {"content": "?"}, BAD]}, "to different questions"),
        ({"chosen": CHOSEN, "rejected": REJECTED}, 'answers need a "prompt"'),
        ({"prompt": ASKED, "chosen": CHOSEN, "rejected": [{"role": "assistant", "content": 3}]}, "must be a text"),
        ({"text": '{"rejected": '}, "is not JSON"),
    ),
)
def test_broken_pairs(layout, reason):
    with pytest.raises(BadRecord, match=f"not a pair .*{reason}"):
        read(layout)


def test_what_is_no_pair_stays_what_it_was():
    assert "rejected" not in read({"messages": [USER, GOOD], "rejected": None})
    assert read({"text": '{"a": 1} is JSON'})["messages"][0]["role"] == "document"


def test_the_records_of_the_page_are_pairs():
    text = (ROOT / "docs" / "preference.md").read_text()
    block, facts = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    told = [read(json.loads(line)) for line in facts.splitlines()]
    assert [item["facts"] for item in told] == ["A cat is sleeping.\nThere is a mat.", "A cat is sleeping."]
    assert told[0]["rejected"] == "A dog on a mat." and told[1]["messages"][0]["content"] == SHOWN
    found = [read(json.loads(line)) for line in block.splitlines()]
    assert [item["messages"][0]["content"] for item in found] == [SHOWN] * 4
    assert [item["messages"][1]["content"][:5] + item["rejected"][:5] for item in found] == ["A catA dog"] * 4


def test_a_conversion_keeps_the_rejected_answer():
    found = embedded(record())
    assert found["rejected"] == REJECTED and isinstance(found["messages"][0]["content"][0]["image"], bytes)


def test_a_pair_is_two_conversations_with_images_once(processor):
    pair = Pairs()(processor, record())
    chosen = processor(record()["messages"])
    rejected = processor([record()["messages"][0], BAD])
    assert pair.lengths == (len(chosen.tokens), len(rejected.tokens)) and pair.kind == "scene"
    for name in ("tokens", "weight", "position", "vision_index"):
        both = np.concatenate([getattr(chosen, name), getattr(rejected, name)])
        np.testing.assert_array_equal(getattr(pair, name), both)
    assert len(pair.images) == len(chosen.images) == 1
    np.testing.assert_array_equal(pair.images[0].patches, chosen.images[0].patches)

    budget = Budget(2 * len(pair.tokens) + 8, 1, 256)
    text = processor([USER, GOOD])
    batch = collate([[text, pair], []], budget, **SPEC.layout)
    alone = collate([[text, chosen, rejected]], budget._replace(patch_rows=2), **SPEC.layout)
    for name in ("tokens", "targets", "weight", "segment", "position"):
        np.testing.assert_array_equal(getattr(batch, name)[0], getattr(alone, name)[0])
    assert batch.segment.max() == 3 and (batch.vision.image > 0).sum() == len(pair.images[0].patches)
    shown = lambda s: batch.vision_index[0][(batch.segment[0] == s) & (batch.vision_index[0] >= 0)]
    np.testing.assert_array_equal(shown(2), shown(3))


def test_images_shrink_until_both_conversations_fit(processor):
    large = record(height=128, width=128)
    pair, alone = Pairs()(processor, large), processor(large["messages"])
    budget = Budget(len(pair.tokens) - 4, 1, 512)
    small = Pairs()(processor, large, budget)
    assert len(small.tokens) <= budget.tokens and len(alone.tokens) < budget.tokens
    assert small.images[0].grid < pair.images[0].grid
    with pytest.raises(TooLarge, match="needs .* tokens"):
        Pairs()(processor, large, Budget(20, 1, 512))


def test_only_the_last_answer_is_learned(processor):
    turns = [USER, GOOD, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    pair = Pairs()(processor, {"messages": turns, "rejected": "No.", "kind": "", "id": "r"})
    said = processor.decode(pair.tokens[pair.weight > 0])
    assert said.replace("\n", "") == "Yes.No."
    assert last_run(np.array([1, 1, 0, 2, 3, 0])).tolist() == [0, 0, 0, 2, 3, 0]
    assert last_run(np.zeros(3)).tolist() == [0, 0, 0]


def test_tokens_that_differ_count_more(processor):
    plain, dense = (Pairs(changed)(processor, record()) for changed in (1.0, 5.0))
    assert set(plain.weight) == {0, 1} and set(dense.weight) == {0, 1, 5}
    learned, first = dense.weight > 0, dense.lengths[0]
    for here, expected in ((slice(0, first), "cat"), (slice(first, None), "dog")):
        changed = processor.decode(dense.tokens[here][dense.weight[here] == 5])
        assert expected[0] in changed and "mat" not in changed and len(changed) < 8
    np.testing.assert_array_equal(learned, plain.weight > 0)
    same = same_tokens([1, 2, 3, 4, 9], [1, 3, 3, 4, 5, 9])
    assert [list(map(int, one)) for one in same] == [[1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 1]]


def loader(processor, records, **options):
    return make_loader([records], processor, Budget(200, 1, 512), 2, shuffle=False, epochs=1, prefetch=0, **options)


def test_the_loader_reads_pairs_and_goes_on(processor):
    records = [record(i) for i in range(12)]
    batches = list(loader(processor, records, reading=Pairs()))
    kinds = [kind for _, info in batches for row in info.kinds for kind in row]
    assert kinds == ["scene"] * 24 and sum(info.conversations for _, info in batches) == 24
    numbers = [int(batch.segment.max(axis=1).sum()) for batch, _ in batches]
    assert sum(numbers) == 24 and not any(n % 2 for n in numbers)
    again = loader(processor, records, reading=Pairs())
    next(again)
    resumed = loader(processor, records, reading=Pairs())
    resumed.set_state(again.get_state())
    for (a, _), (b, _) in zip(resumed, batches[1:], strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    plain = list(loader(processor, records))  # the chosen answers alone
    assert sum(info.conversations for _, info in plain) == 12


def test_a_conversation_is_no_pair(processor):
    alone = {key: value for key, value in record(1).items() if key != "rejected"}
    *_, (_, info) = loader(processor, [record(0), alone], reading=Pairs())
    assert info.skipped == {"no pair": 1} and info.conversations == 2
    with pytest.raises(BadRecord, match='r1: no pair .*needs a "chosen" and a "rejected"'):
        list(loader(processor, [alone], reading=Pairs(), fail_on_bad_record=True))


def test_references_come_with_their_records_and_are_refused_with_others(processor):
    records = [record(i) for i in range(4)]
    known = {
        r["id"]: Reference(content_hash(Pairs()(processor, r)), (-1.0 - i, -2.0 - i)) for i, r in enumerate(records)
    }
    batches = [batch for batch, _ in loader(processor, records, reading=Pairs(references=known))]
    found = np.concatenate([batch.reference[batch.reference < 0] for batch in batches])
    np.testing.assert_allclose(sorted(found), sorted(x for r in known.values() for x in r.log_probs))
    assert all(
        (batch.reference[:, :2] < 0).all() and batch.reference.shape == batch.tokens.shape for batch in batches[:1]
    )
    with pytest.raises(BadData, match="r3 has no log-probabilities"):
        list(loader(processor, records, reading=Pairs(references={k: v for k, v in known.items() if k != "r3"})))
    other = [record(i, rejected="Nothing at all.") for i in range(4)]
    with pytest.raises(
        BadData, match="r0 is not what it was .* run python -m mllm_jax.train.algorithms.reference again"
    ):
        list(loader(processor, other, reading=Pairs(references=known)))
    with pytest.raises(BadData, match="r0 is not what it was"):
        list(loader(processor, records, reading=Pairs(5.0, known)))
