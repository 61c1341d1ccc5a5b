"""Parts of a content: texts, images and videos, inside it or in separate fields, for placeholders."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mllm_jax.data.records import fields, grounding
from mllm_jax.data.records.fields import Bad, is_empty, present, unread

MEDIA = ("image", "video")
ASKED = {"fps": float, "nframes": int, "sampling": str}  # what a video, or a record for its videos, may ask for
MOST_FRAMES = 100_000  # of a video: more than any model reads
PLACEHOLDER = re.compile(r"\n?<(image|video)>\n?")
TYPES = {"input_text": "text", "output_text": "text", "input_image": "image", "input_video": "video"}
READ = {kind: frozenset(("type", kind, *(ASKED if kind == "video" else ()))) for kind in ("text", *MEDIA)}
READ |= grounding.FIELDS
Messages = list[dict[str, Any]]
Find = Callable[[Any], Any]  # what a record calls a file -> its path or its bytes; raises Bad


def files_beside(record: Mapping[str, Any]) -> dict[str, list]:
    """Images and videos in separate fields of a record. Raises Bad if two fields name different ones."""
    found = {}
    for media in MEDIA:
        named = [_files(record[name]) for name in (media, f"{media}s") if name in record]
        if len(named) == 2 and named[0] != named[1]:
            raise Bad("several columns", f'"{media}" and "{media}s" differ: name all files in one')
        found[media] = named[0] if named else []
    found["video"] = [*found["video"], *([record["frames"]] if "frames" in record else [])]
    return found


def _files(value: Any) -> list[Any]:
    """The files of a field: one, a list, or a list as the JSON text that a cell of a table may hold."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        with contextlib.suppress(ValueError):  # a name of a file after all
            value = json.loads(value)
    return [file for file in value if not is_empty(file)] if isinstance(value, list) else [value]


def file_parts(files: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A part for each file."""
    return [{"type": media, media: file} for media, found in files.items() for file in found]


def with_files(messages: Messages, files: Mapping[str, list], in_text: bool) -> Messages:
    """Messages with the files of separate fields.

    Parts without a file take the next one, and so do placeholders in texts. If there are neither, the files go before
    the first question.

    Args:
        in_text: whether the layout has placeholders: without one, no separate file is allowed.
    """
    if any(isinstance(message["content"], list) for message in messages):
        return _filled(messages, files)
    return _inserted(messages, files, in_text) if in_text or any(files.values()) else messages


def normal_parts(content: Any, name: str = "content") -> str | list[dict[str, Any]]:
    """A content as a text or a list of parts, each with a type and at most one value of that type.

    A part may stand alone, and may be a text without a type. Raises Bad for anything else.
    """
    if isinstance(content, str):
        return content
    content = [content] if isinstance(content, Mapping) else content
    if not isinstance(content, list):
        raise Bad("not a conversation", f'"{name}" must be a text, a part, or a list of parts')
    return [_normal(part) for part in content]


def unread_of_parts(messages: Messages) -> Iterator[str]:
    """Names of the fields of parts that are not read."""
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            yield from unread(fields.PART, frozenset(part), READ[part["type"]])


def found_parts(content: str | list[dict[str, Any]], find: Find) -> str | list[dict[str, Any]]:
    """A content with its files resolved, and only the fields that a processor reads."""
    return content if isinstance(content, str) else [_found(part, find) for part in content]


def with_asked(messages: Messages, record: Mapping[str, Any]) -> Messages:
    """Messages whose videos have the video settings of their record, one for all or a list, unless they set their own.

    Raises Bad if a list does not have one value per video.
    """
    asked = {name: record[name] for name in ASKED if name in record}
    if not asked:
        return messages
    lists = [message["content"] for message in messages if isinstance(message["content"], list)]
    count = sum(part["type"] == "video" for parts in lists for part in parts)
    for name, value in asked.items():
        if isinstance(value, list | tuple) and len(value) != count:
            raise Bad("not a conversation", f'"{name}" has {len(value)} values for {count} videos')
    of = lambda value, video: value[video] if isinstance(value, list | tuple) else value
    each = iter([{name: of(value, video) for name, value in asked.items()} for video in range(count)])
    return _each_part(messages, lambda part: next(each) | part if part["type"] == "video" else part)


def _normal(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise Bad("not a conversation", f"a part of a content must be an object, not a {type(part).__name__}")
    part = present(part, kept=("text",))
    kind = part.get("type")
    if kind is None:
        kinds = [kind for kind in ("text", *MEDIA) if kind in part or f"{kind}_url" in part]
        kind = kinds[0] if len(kinds) == 1 else None
    kind = TYPES.get(str(kind), str(kind).removesuffix("_url"))
    if kind not in READ:
        unread(fields.PART, frozenset(part), frozenset())  # the field that names the kind may be misspelled
        raise Bad("not a conversation", f"content of type {part.get('type')!r}")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise Bad("not a conversation", 'a part of type "text" needs a text')
    url = part.pop(f"{kind}_url", None)
    others = [field for name in ("text", *MEDIA) if name != kind for field in (name, f"{name}_url")]
    others = [field for field in others if not is_empty(part.get(field))]
    others += [f"{kind}_url"] if url is not None and part.get(kind, url) != url else []
    if others:
        raise Bad("not a conversation", f'a part of type "{kind}" has another "{others[0]}"; make it a part of its own')
    part = part | {"type": kind} | ({kind: url} if url is not None else {})
    unread(fields.PART, frozenset(part), READ[kind])
    return part


def _filled(messages: Messages, files: Mapping[str, list]) -> Messages:
    """Assigns the files of separate fields, in order, to parts without a file."""
    lists = [message["content"] for message in messages if isinstance(message["content"], list)]
    is_open = lambda part: part["type"] in MEDIA and part["type"] not in part
    queues = _queues([part["type"] for parts in lists for part in parts if is_open(part)], files)
    return _each_part(messages, lambda part: part | next(queues[part["type"]]) if is_open(part) else part)


def _each_part(messages: Messages, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Messages:
    """Messages with every part changed, in order; contents that are texts stay."""
    changed = lambda content: [change(part) for part in content] if isinstance(content, list) else content
    return [message | {"content": changed(message["content"])} for message in messages]


def _queues(asked: Sequence[str], files: Mapping[str, list]) -> dict[str, Iterator[dict[str, Any]]]:
    """A part for each file, in order. Raises Bad unless their number is the number that is needed."""
    for media, found in files.items():
        if asked.count(media) != len(found):
            detail = f"{asked.count(media)} <{media}> for {len(found)} files"
            raise Bad("placeholders and files differ in number", detail)
    return {media: iter(file_parts({media: found})) for media, found in files.items()}


def _inserted(messages: Messages, files: Mapping[str, list], in_text: bool) -> Messages:
    """Puts the record's files where placeholders stand, or before the first question where there is no placeholder."""
    asked = [media for message in messages for media in PLACEHOLDER.findall(message["content"])]
    if not asked and not in_text:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise Bad("wrong roles", "the record has files, but no message of a user to show them")
        first["content"] = [*file_parts(files), {"type": "text", "text": first["content"]}]
        return messages
    if files["video"] and not files["image"] and "video" not in asked:  # as LLaVA-Video's records are published
        queues = _queues(["video"] * len(asked), files)
        queues["image"] = queues["video"]
    else:
        queues = _queues(asked, files)
    placed = lambda text: grounding.at_placeholders(text, PLACEHOLDER, queues) or text
    return [message | {"content": placed(message["content"])} for message in messages]


def _found(part: dict[str, Any], find: Find) -> dict[str, Any]:
    kind = part["type"]
    value = part.get(kind)
    if kind == "text":
        return {"type": "text", "text": value}
    if kind in grounding.TYPES:
        return grounding.checked(part)
    asked = _asked(part) if kind == "video" else {}
    if kind == "video" and isinstance(value, list) and value:
        value = [_file(frame, find) for frame in value]
    else:
        value = _file(value, find)
    return {"type": kind, kind: value} | asked


def _asked(part: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a part that set how its video is read, see ASKED."""
    try:
        found = {name: kind(part[name]) for name, kind in ASKED.items() if part.get(name) is not None}
    except (TypeError, ValueError, OverflowError) as error:
        raise Bad("not a conversation", f"of a video, {', '.join(ASKED)} must be two numbers and a word") from error
    nframes = found.get("nframes", 1)
    whole = isinstance(part.get("nframes", ""), str) or nframes == part["nframes"]
    if not (0 < found.get("fps", 1) < math.inf and whole and 1 <= nframes <= MOST_FRAMES):
        raise Bad("not a conversation", f"of a video, fps must be over 0, and nframes 1 to {MOST_FRAMES:,}")
    return found


def _file(value: Any, find: Find) -> Any:
    if isinstance(value, Mapping):
        known = (value.get(key) for key in ("bytes", "path", "url"))
        value = next((given for given in known if given is not None), None)
    return value if isinstance(value, bytes) else find(value)
