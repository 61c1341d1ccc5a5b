"""Classifies the fields of records, messages and parts by name: read, ignored, refused or misspelled.

Values do not matter here, so that each set of names is checked once, and the result is cached.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ANSWERS = ("response", "completion", "output", "answer")  # columns of an answer, in Alpaca's and other tables
QUESTIONS = ("query", "prompt", "instruction", "question", "input")
TURNS = ("messages", "conversations", "conversation")  # fields that contain the list of turns
FILES = ("image", "images", "video", "videos", "frames")
CLIPS = ("fps", "nframes", "sampling")  # sampling options for all videos of a record
PAIR = ("chosen", "rejected", "rejected_response", "rejected_messages")
ABOUT = ("system", "tools", "functions", "objects")  # fields of a conversation besides its turns and files
DOCUMENT = ("text", "caption", "texts", "text_list", "image_info")
FIELDS = frozenset((*ANSWERS, *QUESTIONS, "history", *TURNS, *FILES, *CLIPS, *PAIR, *ABOUT, *DOCUMENT, "facts"))

_LABELS = (
    "id idx index key uid uuid sample_id image_id video_id question_id prompt_id query_id conversation_id "
    "task kind type category topic subject domain difficulty label source sources data_source dataset dataset_name "
    "ds_name origin_dataset origin_split split subset license url urls metadata meta general_metadata tags language "
    "lang timestamp version width height image_wh image_size parallel_tool_calls"
)


@dataclass(frozen=True, eq=False)
class Names:
    """Known field names of one kind of object.

    ignored: fields that are ignored without a note.
    refused: unsupported fields that change the meaning, name -> advice for the user.
    renamed: wrong name -> right name of a field. Refused unless the right name is present, too.
    guarded: fields whose misspelling is refused.
    plain: names that are similar to guarded ones but mean something else.
    """

    ignored: frozenset[str]
    refused: Mapping[str, str]
    renamed: Mapping[str, str]
    guarded: frozenset[str]
    plain: frozenset[str] = frozenset()


_SOUND = "remove the record, audio is not supported"
_WEIGHT = 'give assistant turns a "weight"'
_SIZE = "set config.data.min_pixels and config.data.max_pixels"
_CUT = "cut the video before training"
_PARTS = 'make it a part of the content, {"type": "image", "image": ...}'

RECORD = Names(
    ignored=frozenset(_LABELS.split()),
    refused=dict.fromkeys(("audio", "audios"), _SOUND)
    | dict.fromkeys(("mask", "masks"), "remove the record, segmentation masks are not supported")
    | dict.fromkeys(("weight", "loss_weight", "loss_mask"), _WEIGHT)
    | {"input_ids": "give the text, not its tokens", "rejected_images": "both answers must be about the same images"},
    renamed=dict.fromkeys("img image_path image_file image_url image".split(), "image")
    | dict.fromkeys("imgs image_paths image_files image_urls images".split(), "images")
    | dict.fromkeys("video_path video_file video_url".split(), "video"),
    guarded=FIELDS - {"texts", "facts", "text", "fps"} | {"audio", "audios"},
    plain=frozenset(
        "captions answers questions inputs outputs prompts responses completions instructions frame object tool".split()
    ),
)
MESSAGE = Names(
    ignored=frozenset(("id", "timestamp", "created_at", "source")),
    refused=dict.fromkeys(("audio", "audios"), _SOUND)
    | dict.fromkeys(("image", "images", "video", "videos"), _PARTS)
    | dict.fromkeys(("loss_scale", "loss_weight", "loss_mask", "mask", "train_detail"), _WEIGHT)
    | {"objects": 'make it a field of the record, next to "messages"', "refusal": "make it the content of the message"}
    | {"tools": 'make it a field of the record, next to "messages"'},
    renamed={},
    guarded=frozenset(("role", "content", "value", "weight", "tool_calls", "reasoning_content")),
)
PART = Names(
    ignored=frozenset(("detail", "cache_control", "annotations", "index", "id")),
    refused=dict.fromkeys("min_pixels max_pixels total_pixels resized_height resized_width".split(), _SIZE)
    | dict.fromkeys(("video_start", "video_end"), _CUT)
    | dict.fromkeys(("min_frames", "max_frames"), 'give "nframes"'),
    renamed={},
    guarded=frozenset(("image", "image_url", "video", "video_url", "nframes", "sampling")),
)


NOT_READ = 'the field "{}" is not read'  # note of a record


class Bad(ValueError):
    """Reason why a record cannot be used: `Bad(reason, detail)`, without the record's name."""


@functools.lru_cache(maxsize=4096)
def unread(names: Names, fields: frozenset[str], read: frozenset[str]) -> tuple[str, ...]:
    """Returns the fields that are neither read nor ignored, sorted.

    Args:
        names: known names of this kind of object.
        fields: names of the object's fields that are not empty.
        read: names of the fields whose values are used.

    Raises:
        Bad: a field is unsupported and changes the meaning, or is misspelled.
    """
    others = sorted(fields - read - names.ignored)
    for field in others:
        if field in names.refused:
            raise Bad("unsupported field", f'"{field}": {names.refused[field]}')
        if (meant := _meant(names, field)) and meant not in fields:
            raise Bad("misspelled field", f'"{field}": did you mean "{meant}"?')
    return tuple(others)


def _meant(names: Names, field: str) -> str | None:
    """Returns the field that a wrong name probably means; None if the name is right or similar to no field."""
    if field in names.renamed:
        return names.renamed[field]
    lowered = field.lower()
    if field in names.guarded or field in names.plain or lowered in names.guarded:
        return lowered if lowered != field else None
    return next((name for name in sorted(names.guarded) if _one_edit_apart(lowered, name)), None)


def _one_edit_apart(a: str, b: str) -> bool:
    """Returns whether one letter was inserted, deleted or replaced, or two neighboring letters were swapped."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    start = next((i for i, (x, y) in enumerate(zip(longer, shorter)) if x != y), len(shorter))
    rest, other = longer[start:], shorter[start:]
    if len(longer) > len(shorter):
        return rest[1:] == other
    return rest[1:] == other[1:] or (rest[:2] == other[1::-1] and rest[2:] == other[2:])


def is_empty(value: Any) -> bool:
    """Returns whether a value is null, an empty text, list or object, or contains only such values."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    return _is_nothing(value) if inner is None else all(map(_is_nothing, inner))


def _is_nothing(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(inner is None or inner == "" for inner in value.values())
    return value is None or (isinstance(value, str | list | tuple) and not value)


def present(fields: Mapping[str, Any], kept: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the fields of an object that are not empty; those in `kept` unless they are null."""
    return {
        name: value for name, value in fields.items() if value is not None and (name in kept or not is_empty(value))
    }
