"""Reads records in all layouts in which conversations and documents are published, and converts them to one layout.

The table of layouts, roles and fields is in docs/data.md. A record is a mapping; None fields count as absent.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": ...}]}, ...]}
    {"image": A, "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": ...}]}
    {"images": [A], "messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": ...}]}
    {"images": [A], "texts": [{"user": "What is it?", "assistant": ...}]}
    {"images": [A], "query": "What is it?", "response": ...}, or the columns of Alpaca, TRL and others
    {"texts": ["A cat.", None, "A dog."], "images": [None, A, None]}
    {"text_list": ["A cat.", ...], "image_info": [{"image_name": A, "matched_text_index": 0}]}
    {"images": [A], "text": "A cat."}, or "caption"

The first layout is that of Qwen and OpenAI; parts of its content without a file take the files of "images" in order.
The second is LLaVA's: `<image>` and `<video>` are replaced by the files in "image" or "images", "video" or "videos", in
order. In the next three, files are put before the first question unless the text contains `<image>` or `<video>`. The
others are documents without questions: interleaved as in OBELICS, as in MMC4, and a text with images or videos.

A pair has a chosen and a rejected answer. Either a conversation ends with the chosen answer and has a field "rejected",
or the record has a question and both answers, as in TRL, RLHF-V, MMPR and ms-swift:

    {"images": [A], "messages": [..., {"role": "assistant", "content": "A cat."}], "rejected": "A dog."}
    {"images": [A], "prompt": [{"role": "user", ...}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}
    {"image": A, "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    {"image": A, "text": '{"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}'}

Any layout may have "facts", a text or a list of texts that are true of its images, such as a human caption. A reward
model reads them together with an answer.

A is the name of a file, its bytes, or {"bytes", "path"} as in Hugging Face's datasets. A video may also be a list of
images: as "video" of a part, or as "frames" of the record, each with "fps".
"""

import re
from collections.abc import Mapping
from typing import Any

from mllm_jax.common.printable import printable
from mllm_jax.data.records import fields
from mllm_jax.data.records.fields import ABOUT, CLIPS, FIELDS, FILES, NOT_READ, Bad, present, unread
from mllm_jax.data.records.grounding import PLACEHOLDER, with_objects
from mllm_jax.data.records.layouts import Layout, read_layout
from mllm_jax.data.records.messages import in_order, normal_messages, parsed, tools_beside, with_system
from mllm_jax.data.records.pairs import unpacked, with_chosen
from mllm_jax.data.records.parts import (
    Find,
    files_beside,
    found_parts,
    normal_parts,
    unread_of_parts,
    with_asked,
    with_files,
)

DOCUMENT = "document"  # role of the single message of a document, which is trained on completely
LIKED = ("label", "kto_tag")  # false marks an answer that people disliked
ALWAYS = frozenset((*FILES, *CLIPS, "facts"))  # fields that every layout may have
KEPT = FIELDS - {*FILES, *ABOUT, "input", "history", "facts"}  # fields that count as present even if empty


_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRecord(ValueError):
    """Error of an unusable record. `reason` is one of a few short phrases that are counted; `id` names the record."""

    def __init__(self, reason: str, id: str, detail: str = ""):
        id, detail = printable(id), printable(detail)
        super().__init__(f"{id}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.id, self.detail = reason, id, detail

    def __reduce__(self):
        return BadRecord, (self.reason, self.id, self.detail)  # for errors from worker processes


class BadData(RuntimeError):
    """Error of a run whose records are too often broken, all unusable, or not the expected ones."""


def read_record(record: Any, name: str, find: Find) -> dict[str, Any]:
    """Converts a record of any layout above to {"messages": [{"role", "content"}], "kind": str, "id": str}.

    Messages have Hugging Face's layout, see `mllm_jax.data.records.messages`; a document is one message with the role
    DOCUMENT. Images and videos are results of `find`, or bytes. Optional fields: "rejected" (str) of a pair, whose
    messages end with the chosen answer, "facts" (str), "tools" ([dict]), and "notes" ((str, ...)), which list omitted
    parts of the record as texts that runs count.

    Args:
        name: name of a record without an id.
        find: returns the path or the bytes of a named file; raises Bad.

    Raises:
        BadRecord: the layout is unknown, roles or placeholders are wrong, a field is unsupported, or a file is missing.
    """
    try:
        if not isinstance(record, Mapping):
            raise Bad("not a conversation", f"a {type(record).__name__}, not an object")
        record = unpacked(present(record, KEPT))
        name = str(record.get("id", name))
        item = _read(record, find)
        check_texts(item)
    except Bad as error:
        raise BadRecord(error.args[0], name, *error.args[1:]) from error.__cause__
    kind = printable(str(record.get("task") or record.get("kind") or ""))
    return {"messages": item.pop("messages"), "kind": kind, "id": printable(name)} | item


def check_texts(value: Any) -> None:
    """Raises Bad if a text of a record is invalid Unicode, such as JSON's "\\ud800", which tokenizers refuse."""
    if isinstance(value, str):
        if not value.isascii() and _SURROGATE.search(value):
            raise Bad("not a text", f"a lone surrogate in {printable(value)!r:.80}")
    elif isinstance(value, Mapping):
        for inner in value.items():
            check_texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_texts(inner)


def labels(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a record, such as "split", that belong to no layout and are texts, numbers or booleans."""
    return {key: x for key, x in record.items() if key not in FIELDS and isinstance(x, str | int | float)}


def _read(record: dict[str, Any], find: Find) -> dict[str, Any]:
    layout = _layout(record)
    item, notes = (_conversation if layout.parts is None else _document)(record, layout)
    messages = item["messages"]
    notes += [NOT_READ.format(f"content.{name}") for name in unread_of_parts(messages)]
    messages = with_asked(messages, record)
    messages = [message | {"content": found_parts(message["content"], find)} for message in messages]
    item |= {"messages": messages, "facts": _facts(record.get("facts")), "notes": tuple(dict.fromkeys(notes)) or None}
    return {field: value for field, value in item.items() if value is not None}


def _layout(record: Mapping[str, Any]) -> Layout:
    try:
        return read_layout(record)
    except Bad:
        unread(fields.RECORD, frozenset(record), FIELDS)  # a misspelled field may be the cause
        raise


def _document(record: Mapping[str, Any], layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """Returns a document as one message, and notes about omitted fields."""
    if unsupported := [name for name in ABOUT if name in record]:
        raise Bad("unsupported field", f'"{unsupported[0]}": only conversations may have it; remove it')
    notes = _unread(record, layout.read)
    return {"messages": [{"role": DOCUMENT, "content": normal_parts(layout.parts)}]}, notes


def _conversation(record: Mapping[str, Any], layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """Returns a conversation, and notes about omitted parts of its record."""
    turns, rejected, pair = with_chosen(layout.turns, record)
    notes = _unread(record, layout.read | pair | {*ABOUT})
    if any(record.get(name) is False for name in LIKED):
        raise Bad("answer not to be given", '"label" or "kto_tag" is false; remove the record, or make it a pair')
    messages, omitted = normal_messages(turns)
    messages = with_files(messages, files_beside(record), layout.in_text)
    if boxes := "objects" in record:
        messages = with_objects(messages, parsed(record["objects"], "objects"))
    messages, trimmed = in_order(with_system(messages, record.get("system")))
    if boxes and rejected is not None and PLACEHOLDER.search(rejected):
        raise Bad("not a pair", "boxes of a rejected answer must be written in its text")
    if boxes and trimmed:
        raise Bad("boxes in a trimmed conversation", f"{trimmed[0]}, which may change the indices of images")
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise Bad("nothing to learn", "every answer has the weight 0")
    notes += [*(NOT_READ.format(f"messages.{name}") for name in omitted), *trimmed]
    return {"messages": messages, "rejected": rejected, "tools": tools_beside(record)}, notes


def _unread(record: Mapping[str, Any], read: frozenset[str]) -> list[str]:
    return [*map(NOT_READ.format, unread(fields.RECORD, frozenset(record), read | ALWAYS))]


def _facts(facts: Any) -> str | None:
    """Returns facts as one text with a line for each."""
    if isinstance(facts, list) and all(isinstance(fact, str) for fact in facts):
        return "\n".join(facts)
    if not isinstance(facts, str | None):
        raise Bad("not a fact", '"facts" must be a text or a list of texts')
    return facts
