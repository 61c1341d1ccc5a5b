"""Normalizes the parts of a message's content, and inserts files of the record at parts or placeholders."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mllm_jax.data.records import fields, grounding
from mllm_jax.data.records.fields import Bad, is_empty, present, unread

MEDIA = ("image", "video")
ASKED = {"fps": float, "nframes": int, "sampling": str}  # sampling options of a video, or of all videos of a record
MOST_FRAMES = 100_000  # limit of `nframes`, more than any model reads
PLACEHOLDER = re.compile(r"\n?<(image|video)>\n?")
TYPES = {"input_text": "text", "output_text": "text", "input_image": "image", "input_video": "video"}
READ = {kind: frozenset(("type", kind, *(ASKED if kind == "video" else ()))) for kind in ("text", *MEDIA)}
READ |= grounding.FIELDS
Messages = list[dict[str, Any]]
Find = Callable[[Any], Any]  # name of a file in a record -> its path or its bytes; raises Bad


def files_beside(record: Mapping[str, Any]) -> dict[str, list]:
    """Returns the images and videos in fields of a record, outside its messages. Raises Bad if two fields disagree."""
    files = {}
    for media in MEDIA:
        named = [_files(record[name]) for name in (media, f"{media}s") if name in record]
        if len(named) == 2 and named[0] != named[1]:
            raise Bad("several columns", f'"{media}" and "{media}s" differ: name all files in one')
        files[media] = named[0] if named else []
    files["video"] = [*files["video"], *([record["frames"]] if "frames" in record else [])]
    return files


def _files(value: Any) -> list[Any]:
    """Returns the files of a field: one file, a list, or the JSON text of a list, as in cells of tables."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        with contextlib.suppress(ValueError):  # otherwise it is the name of a file
            value = json.loads(value)
    return [file for file in value if not is_empty(file)] if isinstance(value, list) else [value]


def file_parts(files: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Returns a part for each file."""
    return [{"type": media, media: file} for media, named in files.items() for file in named]


def with_files(messages: Messages, files: Mapping[str, list], in_text: bool) -> Messages:
    """Inserts the files of a record into its messages.

    Files fill parts without a file in order, or placeholders in texts. Without either, they are put before the first
    question.

    Args:
        in_text: whether the layout requires a placeholder for every file.
    """
    if any(isinstance(message["content"], list) for message in messages):
        return _filled(messages, files)
    return _inserted(messages, files, in_text) if in_text or any(files.values()) else messages


def normal_parts(content: Any, name: str = "content") -> str | list[dict[str, Any]]:
    """Normalizes a content to a text or a list of parts, each with a type and at most one value of that type.

    Accepts a single part, too, and strings as parts. Raises Bad for anything else.
    """
    if isinstance(content, str):
        return content
    content = [content] if isinstance(content, Mapping) else content
    if not isinstance(content, list):
        raise Bad("not a conversation", f'"{name}" must be a text, a part, or a list of parts')
    return [_normal(part) for part in content]


def unread_of_parts(messages: Messages) -> Iterator[str]:
    """Yields the names of the parts' fields that are not read."""
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else ():
            yield from unread(fields.PART, frozenset(part), READ[part["type"]])


def found_parts(content: str | list[dict[str, Any]], find: Find) -> str | list[dict[str, Any]]:
    """Returns a content with resolved files, and only the fields that a processor reads."""
    return content if isinstance(content, str) else [_found(part, find) for part in content]


def with_asked(messages: Messages, record: Mapping[str, Any]) -> Messages:
    """Adds the sampling options of a record to its videos: one value for all, or a list with a value for each.

    Options of a part take precedence. Raises Bad if the length of a list is not the number of videos.
    """
    options = {name: record[name] for name in ASKED if name in record}
    if not options:
        return messages
    lists = [message["content"] for message in messages if isinstance(message["content"], list)]
    count = sum(part["type"] == "video" for parts in lists for part in parts)
    for name, value in options.items():
        if isinstance(value, list | tuple) and len(value) != count:
            raise Bad("not a conversation", f'"{name}" has {len(value)} values for {count} videos')
    of = lambda value, video: value[video] if isinstance(value, list | tuple) else value
    each = iter([{name: of(value, video) for name, value in options.items()} for video in range(count)])
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
        unread(fields.PART, frozenset(part), frozenset())  # the field of the type may be misspelled
        raise Bad("not a conversation", f"content of type {part.get('type')!r}")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise Bad("not a conversation", 'a part of type "text" needs a text')
    url = part.pop(f"{kind}_url", None)
    others = [field for name in ("text", *MEDIA) if name != kind for field in (name, f"{name}_url")]
    others = [field for field in others if not is_empty(part.get(field))]
    others += [f"{kind}_url"] if url is not None and part.get(kind, url) != url else []
    if others:
        raise Bad("not a conversation", f'a part of type "{kind}" also has "{others[0]}"; make it a separate part')
    part = part | {"type": kind} | ({kind: url} if url is not None else {})
    unread(fields.PART, frozenset(part), READ[kind])
    return part


def _filled(messages: Messages, files: Mapping[str, list]) -> Messages:
    """Fills parts without a file with the files of the record, in order."""
    lists = [message["content"] for message in messages if isinstance(message["content"], list)]
    is_open = lambda part: part["type"] in MEDIA and part["type"] not in part
    queues = _queues([part["type"] for parts in lists for part in parts if is_open(part)], files)
    return _each_part(messages, lambda part: part | next(queues[part["type"]]) if is_open(part) else part)


def _each_part(messages: Messages, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Messages:
    """Applies `change` to every part, in order; contents that are texts are unchanged."""
    changed = lambda content: [change(part) for part in content] if isinstance(content, list) else content
    return [message | {"content": changed(message["content"])} for message in messages]


def _queues(asked: Sequence[str], files: Mapping[str, list]) -> dict[str, Iterator[dict[str, Any]]]:
    """Returns iterators of a part for each file. Raises Bad unless `asked` has one entry per file of each medium."""
    for media, named in files.items():
        if asked.count(media) != len(named):
            detail = f"{asked.count(media)} <{media}> for {len(named)} files"
            raise Bad("placeholders and files differ in number", detail)
    return {media: iter(file_parts({media: named})) for media, named in files.items()}


def _inserted(messages: Messages, files: Mapping[str, list], in_text: bool) -> Messages:
    """Replaces placeholders by the record's files; without placeholders, puts the files before the first question."""
    placeholders = [media for message in messages for media in PLACEHOLDER.findall(message["content"])]
    if not placeholders and not in_text:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise Bad("wrong roles", "the record has files, but no message of a user to put them into")
        first["content"] = [*file_parts(files), {"type": "text", "text": first["content"]}]
        return messages
    if files["video"] and not files["image"] and "video" not in placeholders:  # LLaVA-Video writes <image> for videos
        queues = _queues(["video"] * len(placeholders), files)
        queues["image"] = queues["video"]
    else:
        queues = _queues(placeholders, files)
    placed = lambda text: grounding.at_placeholders(text, PLACEHOLDER, queues) or text
    return [message | {"content": placed(message["content"])} for message in messages]


def _found(part: dict[str, Any], find: Find) -> dict[str, Any]:
    kind = part["type"]
    value = part.get(kind)
    if kind == "text":
        return {"type": "text", "text": value}
    if kind in grounding.TYPES:
        return grounding.checked(part)
    options = _asked(part) if kind == "video" else {}
    if kind == "video" and isinstance(value, list) and value:
        value = [_file(frame, find) for frame in value]
    else:
        value = _file(value, find)
    return {"type": kind, kind: value} | options


def _asked(part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sampling options of a video part, see ASKED."""
    try:
        options = {name: kind(part[name]) for name, kind in ASKED.items() if part.get(name) is not None}
    except (TypeError, ValueError, OverflowError) as error:
        raise Bad("not a conversation", f"of a video, {', '.join(ASKED)} must be two numbers and a word") from error
    nframes = options.get("nframes", 1)
    is_integer = isinstance(part.get("nframes", ""), str) or nframes == part["nframes"]
    if not (0 < options.get("fps", 1) < math.inf and is_integer and 1 <= nframes <= MOST_FRAMES):
        raise Bad("not a conversation", f"of a video, fps must be over 0, and nframes 1 to {MOST_FRAMES:,}")
    return options


def _file(value: Any, find: Find) -> Any:
    if isinstance(value, Mapping):
        sources = (value.get(key) for key in ("bytes", "path", "url"))
        value = next((source for source in sources if source is not None), None)
    return value if isinstance(value, bytes) else find(value)
