"""Conversations from JSON Lines files, with pictures and clips beside them on disk.

Three layouts are read (one record per line; extra fields are ignored):

    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "..."}]}]}
    {"image": "a.png", "conversations": [{"role": "user", "content": "What is it?"}, {"role": "assistant", ...}]}

The first is LLaVA's: `<image>` and `<video>` stand for the files in "image" or "images", "video" or "videos", in turn.
The second is that of Qwen and OpenAI. In the third, whichever of the two lists it uses, the files go before the first
question, unless `<image>` or `<video>` say where.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = re.compile(r"\n?<(image|video)>\n?")


class BadRecord(ValueError):
    """A record that cannot be used. `reason` is one of a few short phrases, to be counted; `id` names the record."""

    def __init__(self, reason: str, id: str, detail: str = ""):
        super().__init__(f"{id}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.id, self.detail = reason, id, detail

    def __reduce__(self):
        return BadRecord, (self.reason, self.id, self.detail)  # it is raised in worker processes, too


class JsonLines:
    """Random access to the conversations of a JSON Lines file. Only the lines' offsets are held in memory.

    An item is {"messages": [{"role", "content"}], "kind": str, "id": str} in Hugging Face's layout, absolute paths.

    Args:
        path: the file.
        root: folder that the paths in records are relative to, and must not leave; the file's own folder by default.
        where: keeps the records whose fields have these values, as in {"split": "train", "task": ("vqa", "ocr")}.

    Raises:
        BadRecord: on access to an item, where it is not valid JSON, lacks a file, has wrong roles or placeholders, or
            names a path outside `root` (by `..`, an absolute path or a link).
        ValueError: no record is left.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None, where: Mapping[str, Any] | None = None):
        self.path = Path(path)
        self.root = Path(root if root is not None else self.path.parent).resolve()
        listed = lambda value: tuple(value) if isinstance(value, (tuple, list, set)) else (value,)
        wanted = {key: listed(value) for key, value in (where or {}).items()}
        offsets, lines, position = [], [], 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip() and _matches(line, wanted):
                    offsets.append(position)
                    lines.append(number)
                position += len(line)
        if not offsets:
            raise ValueError(f"{self.path} has no record" + (f" where {dict(where)}" if where else ""))
        self._offsets, self._lines = np.array(offsets, np.int64), np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = f"{self.path.name}:{self._lines[index]}"
        with open(self.path, "rb") as file:  # opened each time: readers in several threads and processes do not meet
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadRecord("not valid JSON", name, str(error)) from error
        if not isinstance(record, dict):
            raise BadRecord("not a conversation", name, f"a {type(record).__name__}, not an object")
        name = str(record.get("id", name))
        kind = record.get("task") or record.get("kind") or ""
        return {"messages": _messages(record, name, self.root), "kind": str(kind), "id": name}


def inside(root: Path, path: Any, name: str = "") -> str:
    """The absolute path of an existing file below `root`. Raises BadRecord, about record `name`, where it is not."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise BadRecord("not a path", name, repr(path)[:80])
    if "://" in path or path.startswith("data:"):
        raise BadRecord("not a local file", name, path[:80])
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise BadRecord("path leaves the data root", name, path)
    real = (root / path).resolve()
    if not real.is_relative_to(root.resolve()):
        raise BadRecord("path leaves the data root", name, f"{path} is a link to {real}")
    if not real.is_file():
        raise BadRecord("missing file", name, path)
    return str(real)


def _matches(line: bytes, wanted: Mapping[str, Any]) -> bool:
    """Whether a line has the wanted fields. A broken line does: it shall be counted when it is read."""
    if not wanted:
        return True
    try:
        record = json.loads(line)
        return all(record.get(key) in values for key, values in wanted.items())
    except (ValueError, AttributeError):
        return True


def _messages(record: dict[str, Any], name: str, root: Path) -> list[dict[str, Any]]:
    turns = record.get("messages", record.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecord("not a conversation", name, 'needs a list "messages" or "conversations" of objects')
    messages = []
    for turn in turns:
        role = ROLES.get(str(turn.get("role", turn.get("from"))))
        if role is None:
            raise BadRecord("wrong roles", name, f"unknown role {turn.get('role', turn.get('from'))!r}")
        messages.append({"role": role, "content": turn.get("content", turn.get("value"))})
    roles = [m["role"] for m in messages if m["role"] != "system"]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise BadRecord("wrong roles", name, f"user and assistant must take turns, got {roles}")
    if "system" in [m["role"] for m in messages[1:]]:
        raise BadRecord("wrong roles", name, "a system message must come first")

    files = {media: _listed(record.get(media)) + _listed(record.get(media + "s")) for media in ("image", "video")}
    if any("from" in turn for turn in turns) or any(files.values()):
        _insert_files(messages, files, name, in_text="from" in turns[0])
    for message in messages:
        message["content"] = _content(message["content"], name, root)
    return messages


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _insert_files(messages: list[dict[str, Any]], files: dict[str, list], name: str, in_text: bool) -> None:
    """Puts the record's files where placeholders stand, or before the first question where there is no placeholder."""
    texts = [m["content"] for m in messages]
    if not all(isinstance(text, str) for text in texts):
        raise BadRecord("not a conversation", name, "files stand beside the messages, so every message must be a text")
    asked = [media for text in texts for media in PLACEHOLDER.findall(text)]
    if not asked and not in_text:
        first = next(m for m in messages if m["role"] == "user")
        parts = [{"type": media, media: path} for media, paths in files.items() for path in paths]
        first["content"] = [*parts, {"type": "text", "text": first["content"]}]
        return
    for media, paths in files.items():
        if asked.count(media) != len(paths):
            detail = f"{asked.count(media)} <{media}> for {len(paths)} files"
            raise BadRecord("placeholders and files differ in number", name, detail)
    queues = {media: iter(paths) for media, paths in files.items()}
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


def _content(content: Any, name: str, root: Path) -> str | list[dict[str, Any]]:
    """Content in Hugging Face's layout, paths checked and made absolute."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadRecord("not a conversation", name, "content must be a text or a list of objects")
    parts = []
    for part in content:
        media = str(part.get("type", "")).removesuffix("_url")
        value = part.get(media, part.get(f"{media}_url"))
        if isinstance(value, dict):  # OpenAI's {"image_url": {"url": ...}}
            value = value.get("url")
        if media == "text" and isinstance(value, str):
            parts.append({"type": "text", "text": value})
        elif media in ("image", "video"):
            parts.append({"type": media, media: inside(root, value, name)})
        else:
            raise BadRecord("not a conversation", name, f"content of type {part.get('type')!r}")
    return parts
