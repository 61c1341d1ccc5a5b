"""Names of the fields that records, messages and parts of a content may have: read, ignored, refused, misspelled.

Values are not looked at here, so that a set of names is judged once however many records have it.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ANSWERS = ("response", "completion", "output", "answer")  # columns of an answer, in Alpaca's and other tables
QUESTIONS = ("query", "prompt", "instruction", "question", "input")
TURNS = ("messages", "conversations", "conversation")  # fields that hold a conversation turn by turn
FILES = ("image", "images", "video", "videos", "frames")
CLIPS = ("fps", "nframes", "sampling")  # of all videos of a record
PAIR = ("chosen", "rejected", "rejected_response", "rejected_messages")
ABOUT = ("system", "tools", "functions", "objects")  # fields of a conversation other than its turns
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
    """Meanings of the fields of one kind of object.

    ignored: fields that are left out without a word.
    refused: fields that change the meaning and cannot be honored, name -> what to do instead.
    renamed: other names of a field, refused unless the field is there, too.
    guarded: fields whose misspelling is refused.
    plain: names that are near a guarded one, and known to mean something else.
    """

    ignored: frozenset[str]
    refused: Mapping[str, str]
    renamed: Mapping[str, str]
    guarded: frozenset[str]
    plain: frozenset[str] = frozenset()


_SOUND = "remove the record, sound is not read"
_WEIGHT = 'give assistant turns a "weight"'
_SIZE = "set config.data.min_pixels and config.data.max_pixels"
_CUT = "cut the video beforehand"
_PARTS = 'make it a part of the content, {"type": "image", "image": ...}'

RECORD = Names(
    ignored=frozenset(_LABELS.split()),
    refused=dict.fromkeys(("audio", "audios"), _SOUND)
    | dict.fromkeys(("mask", "masks"), "remove the record, segmentation masks are not read")
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
    | {"objects": 'make it a field of the record, beside "messages"', "refusal": "make it the content of the message"}
    | {"tools": 'make it a field of the record, beside "messages"'},
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


NOT_READ = 'the field "{}" is not read'  # a note of what is left out of a record


class Bad(ValueError):
    """Reason why a record cannot be used: `Bad(reason, detail)`, raised where the record's name is unknown."""


@functools.lru_cache(maxsize=4096)
def unread(names: Names, fields: frozenset[str], read: frozenset[str]) -> tuple[str, ...]:
    """The fields that are neither read nor known to be ignorable, in order.

    Args:
        fields: those that an object has and that are not empty.
        read: those whose values are used.

    Raises:
        Bad: a field changes the meaning and cannot be honored, or is a misspelled one.
    """
    rest = sorted(fields - read - names.ignored)
    for field in rest:
        if field in names.refused:
            raise Bad("unsupported field", f'"{field}": {names.refused[field]}')
        if (meant := _meant(names, field)) and meant not in fields:
            raise Bad("misspelled field", f'"{field}": did you mean "{meant}"?')
    return tuple(rest)


def _meant(names: Names, field: str) -> str | None:
    """The field that a name stands for, where it is none itself."""
    if field in names.renamed:
        return names.renamed[field]
    lowered = field.lower()
    if field in names.guarded or field in names.plain or lowered in names.guarded:
        return lowered if lowered != field else None
    return next((name for name in sorted(names.guarded) if _one_edit_apart(lowered, name)), None)


def _one_edit_apart(a: str, b: str) -> bool:
    """Returns whether a letter was added, left out or replaced, or two neighboring letters were swapped."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    start = next((i for i, (x, y) in enumerate(zip(longer, shorter)) if x != y), len(shorter))
    rest, other = longer[start:], shorter[start:]
    if len(longer) > len(shorter):
        return rest[1:] == other
    return rest[1:] == other[1:] or (rest[:2] == other[1::-1] and rest[2:] == other[2:])


def is_empty(value: Any) -> bool:
    """Returns whether a value is null, or an empty text, list or object, or contains only such values."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    return _is_nothing(value) if inner is None else all(map(_is_nothing, inner))


def _is_nothing(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(inner is None or inner == "" for inner in value.values())
    return value is None or (isinstance(value, str | list | tuple) and not value)


def present(fields: Mapping[str, Any], kept: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of an object that are not empty; of the `kept` ones all that are not null."""
    return {
        name: value for name, value in fields.items() if value is not None and (name in kept or not is_empty(value))
    }
