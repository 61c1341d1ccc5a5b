"""What a record says: the layouts in which conversations and documents are published, all read into one.

A record is a mapping; fields that are not named here are ignored, and one that is None counts as absent.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": ...}]}, ...]}
    {"image": A, "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": ...}]}
    {"images": [A], "messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": ...}]}
    {"images": [A], "texts": [{"user": "What is it?", "assistant": ...}]}
    {"texts": ["A cat.", None, "A dog."], "images": [None, A, None]}
    {"text_list": ["A cat.", ...], "image_info": [{"image_name": A, "matched_text_index": 0}]}
    {"images": [A], "text": "A cat."}, or "caption"

The first is that of Qwen and OpenAI; parts of its content that name no file take those of "images" in turn. The second
is LLaVA's: `<image>` and `<video>` stand for the files in "image" or "images", "video" or "videos", in turn. In the
third and the fourth (The Cauldron's), files go before the first question, unless `<image>` or `<video>` say where.
The others are documents, where nobody asks: interleaved as in OBELICS, as in MMC4, and a text with what it is about.

Of a pair of answers one is chosen and one rejected. To a conversation that ends with the chosen one "rejected" is
added; or the answers stand beside the question, as TRL, RLHF-V and MMPR write them:

    {"images": [A], "messages": [..., {"role": "assistant", "content": "A cat."}], "rejected": "A dog."}
    {"images": [A], "prompt": [{"role": "user", ...}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}
    {"image": A, "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    {"image": A, "text": '{"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}'}

Any of them may have "facts", a text or a list of texts that are true of its pictures, such as a caption by people: a
reward model reads them beside an answer.

A is the name of a file, its bytes, or {"bytes", "path"} as Hugging Face's datasets have it. A clip may also be a list
of pictures: as a part's "video", or beside the messages as "frames", each with "fps".
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
DOCUMENT = "document"  # the role of the one message of a document: its whole text is to be learned
MEDIA = ("image", "video")
ASKED = {"fps": float, "nframes": int, "sampling": str}  # what a clip, or a record for its clips, may ask for
LAYOUT = {"messages", "conversations", "image", "images", "video", "videos", "frames", "fps", "text", "texts"}
LAYOUT |= {"caption", "text_list", "image_info", "nframes", "sampling"}
PLACEHOLDER = re.compile(r"\n?<(image|video)>\n?")
PARAGRAPH = "\n\n"  # between neighbouring texts of a document
Messages = list[dict[str, Any]]
Find = Callable[[Any], Any]  # what a record calls a file -> its path or its bytes; raises Bad


class BadRecord(ValueError):
    """A record that cannot be used. `reason` is one of a few short phrases, to be counted; `id` names the record."""

    def __init__(self, reason: str, id: str, detail: str = ""):
        super().__init__(f"{id}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.id, self.detail = reason, id, detail

    def __reduce__(self):
        return BadRecord, (self.reason, self.id, self.detail)  # it is raised in worker processes, too


class BadData(RuntimeError):
    """Too many records are broken, none can be used, or they are not those that the run counts on."""


class Bad(ValueError):
    """Why the record at hand cannot be used: `Bad(reason, detail)`, where nobody knows the record's name."""


def read_record(record: Any, name: str, find: Find) -> dict[str, Any]:
    """{"messages": [{"role", "content"}], "kind": str, "id": str} in Hugging Face's layout, of any layout above.

    A document is one message of the role DOCUMENT. Pictures and clips are what `find` says, or bytes. A pair of answers
    is a conversation that ends with the chosen one, and also has {"rejected": str}. With facts it has {"facts": str}.

    Args:
        name: what the record is called where it has no id of its own.
        find: of the name of a file, its path or its bytes; raises Bad.

    Raises:
        BadRecord: it has no known layout, wrong roles or placeholders, or lacks a file.
    """
    try:
        if not isinstance(record, Mapping):
            raise Bad("not a conversation", f"a {type(record).__name__}, not an object")
        record = {key: value for key, value in record.items() if value is not None}
        name = str(record.get("id", name))
        record, rejected = _with_chosen(record)
        messages = _timed(_document(record) or _conversation(record), _asked(_single(record)))
        messages = [message | {"content": _content(message["content"], find)} for message in messages]
        facts = _facts(record.get("facts"))
    except Bad as error:
        raise BadRecord(error.args[0], name, *error.args[1:]) from error.__cause__
    found = {"messages": messages, "kind": str(record.get("task") or record.get("kind") or ""), "id": name}
    more = {"rejected": rejected, "facts": facts}
    return found | {field: text for field, text in more.items() if text is not None}


def _with_chosen(record: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A record of a conversation that ends with the chosen answer, and the rejected answer; None where it has none."""
    if isinstance(text := record.get("text"), str) and text.startswith("{") and '"rejected"' in text:
        try:
            record = {key: value for key, value in record.items() if key != "text"} | json.loads(text)
        except ValueError as error:
            raise Bad("not a pair", f'"text" is no JSON: {error}') from error
    rejected, chosen = record.get("rejected"), record.get("chosen")
    if not isinstance(rejected, str | list):
        return record, None
    key = next((key for key in ("messages", "conversations") if key in record), "messages")
    asked = next((record[name] for name in (key, "prompt", "question") if name in record), None)
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if asked is None and isinstance(chosen, list) and isinstance(rejected, list):  # whole conversations
        asked = chosen[:-1]
        if rejected[:-1] != asked:
            raise Bad("not a pair", "the answers are to different questions")
    if not isinstance(asked, list):
        raise Bad("not a pair", 'answers need a "prompt", a "question" or "messages"')
    turns = asked if chosen is None else [*asked, {"role": "assistant", "content": _answer(chosen)}]
    last = turns[-1] if turns and isinstance(turns[-1], Mapping) else {}
    rejected = _answer(rejected)
    if _answer([last] if "from" not in last else last.get("value")) == rejected:
        raise Bad("not a pair", "both answers are the same")
    return record | {key: turns}, rejected


def _facts(facts: Any) -> str | None:
    """Facts as one text, a line each."""
    if not isinstance(facts, str | list | None) or (
        isinstance(facts, list) and not all(isinstance(x, str) for x in facts)
    ):
        raise Bad("not a fact", '"facts" must be a text or a list of texts')
    return "\n".join(facts) if isinstance(facts, list) else facts


def _answer(answer: Any) -> str:
    """The text of an answer: itself, or the last of messages."""
    if isinstance(answer, list) and answer and isinstance(answer[-1], Mapping):
        answer = answer[-1].get("content")
        if isinstance(answer, list) and all(
            isinstance(part, Mapping) and part.get("type") == "text" for part in answer
        ):
            answer = "".join(str(part.get("text")) for part in answer)
    if not isinstance(answer, str):
        raise Bad("not a pair", "an answer must be a text")
    return answer


def labels(record: Mapping[str, Any]) -> dict[str, Any]:
    """The texts, numbers and truths of a record that belong to no layout: what tells records apart, as "split" does."""
    return {key: x for key, x in record.items() if key not in LAYOUT and isinstance(x, str | int | float)}


def _document(record: dict[str, Any]) -> Messages | None:
    """The one message of a document; None where the record is none."""
    if record.keys() & {"messages", "conversations"}:
        turns = _turns(record)
        alone = [turn.get("role") for turn in turns] == [DOCUMENT]
        return [{"role": DOCUMENT, "content": turns[0].get("content")}] if alone else None
    if isinstance(texts := record.get("text_list"), list):
        parts = _mmc4(texts, record.get("image_info", []))
    elif isinstance(texts := record.get("texts"), list) and all(isinstance(text, str | None) for text in texts):
        parts = _interleaved(texts, record.get("images", [None] * len(texts)))
    elif isinstance(text := record.get("text", record.get("caption")), str):
        parts = [*_parts(_files(record)), {"type": "text", "text": text}]
    else:
        return None
    if not any(part["type"] == "text" and part["text"] for part in parts):
        raise Bad("no text", "nothing of this document can be learned")
    return [{"role": DOCUMENT, "content": list(_joined(parts))}]


def _interleaved(texts: Sequence[str | None], images: Any) -> list[dict[str, Any]]:
    if not isinstance(images, list) or len(images) != len(texts):
        raise Bad("texts and images differ in number", f"{len(texts)} places of texts")
    places = [_parts({"image": [] if image is None else [image]}) for image in images]
    return [
        part
        for text, pictures in zip(texts, places)
        for part in [*pictures, *([{"type": "text", "text": text}] if text is not None else [])]
    ]


def _mmc4(texts: Sequence[str], images: Any) -> list[dict[str, Any]]:
    """Pictures go before the text that they were matched to."""
    try:
        places = [[i["image_name"] for i in images if i["matched_text_index"] == n] for n in range(len(texts))]
        found = sum(map(len, places)) == len(images) and all(isinstance(text, str) for text in texts)
    except (KeyError, TypeError) as error:
        raise Bad("not a document", '"image_info" needs image_name and matched_text_index') from error
    if not found:
        raise Bad("not a document", "a picture is matched to a text that is not there")
    return [
        part
        for text, names in zip(texts, places)
        for part in [*_parts({"image": names}), {"type": "text", "text": text}]
    ]


def _joined(parts: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Neighbouring texts as one."""
    texts: list[str] = []
    for part in [*parts, None]:
        if part is not None and part["type"] == "text":
            texts += [part["text"]] if part["text"] else []
            continue
        if texts:
            yield {"type": "text", "text": PARAGRAPH.join(texts)}
            texts = []
        if part is not None:
            yield part


def _turns(record: dict[str, Any]) -> list[dict[str, Any]]:
    turns = record.get("messages", record.get("conversations"))
    if turns is None and isinstance(texts := record.get("texts"), list) and all(isinstance(t, Mapping) for t in texts):
        pairs = [(text.get("user"), text.get("assistant")) for text in texts]
        turns = [{"role": role, "content": x} for pair in pairs for role, x in zip(("user", "assistant"), pair)]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Bad("not a conversation", 'needs a list "messages" or "conversations" of objects')
    return turns


def _conversation(record: dict[str, Any]) -> Messages:
    turns, messages = _turns(record), []
    for turn in turns:
        said = turn.get("role") or turn.get("from")
        role = ROLES.get(str(said))
        if role is None:
            raise Bad("wrong roles", f"unknown role {said!r}")
        messages.append({"role": role, "content": turn.get("content", turn.get("value"))})
    roles = [m["role"] for m in messages if m["role"] != "system"]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise Bad("wrong roles", f"user and assistant must take turns, got {roles}")
    if "system" in [m["role"] for m in messages[1:]]:
        raise Bad("wrong roles", "a system message must come first")
    files, in_text = _files(record), any("from" in turn for turn in turns)
    if any(isinstance(message["content"], list) for message in messages):
        return _filled(messages, files)
    return _inserted(messages, files, in_text) if in_text or any(files.values()) else messages


def _files(record: dict[str, Any]) -> dict[str, list]:
    """What stands beside the messages: the record's pictures and clips."""
    listed = lambda value: value if isinstance(value, list) else [] if value is None else [value]
    found = {media: listed(record.get(media)) + listed(record.get(media + "s")) for media in MEDIA}
    found["video"] += [record["frames"]] if record.get("frames") else []
    return found


def _parts(files: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [{"type": media, media: file} for media, found in files.items() for file in found]


def _timed(messages: Messages, asked: dict[str, Any]) -> Messages:
    """Clips ask for what the record does, unless they say otherwise."""
    if not asked:
        return messages
    timed = lambda part: asked | part if isinstance(part, dict) and part.get("type") == "video" else part
    listed = lambda content: [timed(p) for p in content] if isinstance(content, list) else content
    return [message | {"content": listed(message["content"])} for message in messages]


def _filled(messages: Messages, files: Mapping[str, list]) -> Messages:
    """Parts of a content that name no file take those that stand beside the messages, in turn."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    empty = [part for content in contents for part in content if isinstance(part, dict) and _is_empty(part)]
    queues = _queues([part["type"] for part in empty], files)
    fill = lambda part: part | {part["type"]: next(queues[part["type"]])} if any(part is e for e in empty) else part
    return [
        m | {"content": [fill(part) for part in m["content"]]} if isinstance(m["content"], list) else m
        for m in messages
    ]


def _is_empty(part: dict[str, Any]) -> bool:
    return part.get("type") in MEDIA and part.get(part["type"]) is None


def _queues(asked: Sequence[str], files: Mapping[str, list]) -> dict[str, Iterator[Any]]:
    for media, found in files.items():
        if asked.count(media) != len(found):
            detail = f"{asked.count(media)} <{media}> for {len(found)} files"
            raise Bad("placeholders and files differ in number", detail)
    return {media: iter(found) for media, found in files.items()}


def _inserted(messages: Messages, files: Mapping[str, list], in_text: bool) -> Messages:
    """Puts the record's files where placeholders stand, or before the first question where there is no placeholder."""
    texts = [m["content"] for m in messages]
    if not all(isinstance(text, str) for text in texts):
        raise Bad("not a conversation", "files stand beside the messages, so every message must be a text")
    asked = [media for text in texts for media in PLACEHOLDER.findall(text)]
    if not asked and not in_text:
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = [*_parts(files), {"type": "text", "text": first["content"]}]
        return messages
    queues = _queues(asked, files)
    for message in messages:
        pieces = PLACEHOLDER.split(message["content"])  # text, media, text, media, text
        if len(pieces) == 1:
            continue
        parts = []
        for i, piece in enumerate(pieces):
            if i % 2:
                parts.append({"type": piece, piece: next(queues[piece])})
            elif piece:
                parts.append({"type": "text", "text": piece})
        message["content"] = parts
    return messages


def _content(content: Any, find: Find) -> str | list[dict[str, Any]]:
    """Content in Hugging Face's layout, with the files found."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise Bad("not a conversation", "content must be a text or a list of objects")
    return [_part(part, find) for part in content]


def _part(part: Mapping[str, Any], find: Find) -> dict[str, Any]:
    media = str(part.get("type", "")).removesuffix("_url")
    value = part.get(media) if part.get(media) is not None else part.get(f"{media}_url")
    if media == "text" and isinstance(value, str):
        return {"type": "text", "text": value}
    if media not in MEDIA:
        raise Bad("not a conversation", f"content of type {part.get('type')!r}")
    if media == "video" and isinstance(value, list) and value:
        value = [_file(frame, find) for frame in value]
    else:
        value = _file(value, find)
    return {"type": media, media: value} | (_asked(part) if media == "video" else {})


def _single(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are no lists: those may be of each of several clips, which is not known here."""
    return {name: value for name, value in record.items() if not isinstance(value, list | tuple)}


def _asked(part: Mapping[str, Any]) -> dict[str, Any]:
    """What clips are to be read as, see ASKED."""
    try:
        return {name: kind(part[name]) for name, kind in ASKED.items() if part.get(name)}
    except (TypeError, ValueError) as error:
        raise Bad("not a conversation", f"of a clip, {', '.join(ASKED)} must be two numbers and a word") from error


def _file(value: Any, find: Find) -> Any:
    if isinstance(value, Mapping):
        known = (value.get(key) for key in ("bytes", "path", "url"))
        value = next((given for given in known if given is not None), None)
    return value if isinstance(value, bytes) else find(value)
