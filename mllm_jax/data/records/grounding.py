"""Writes boxes and points of images in texts, in the notation that a model was trained on.

A record contains them in "objects", for the placeholders `<ref-object>` and `<bbox>` in its texts, as in ms-swift:

    {"objects": {"ref": ["a cat"], "bbox": [[10, 20, 110, 220]]}, "messages": [..., "<ref-object><bbox> sleeps."]}

They become parts of a content, which a processor writes as text once it knows the size of the image:

    {"type": "ref", "ref": "a cat"}
    {"type": "bbox", "bbox": [10, 20, 110, 220], "bbox_type": "real", "image_id": 0}

A box is [x1, y1, x2, y2] and a point [x, y], in pixels of the image after its EXIF rotation ("real") or in fractions of
its sides ("norm1"). `image_id` is the index of the image in the conversation, from 0.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_jax.data.records.content import texts_of
from mllm_jax.data.records.fields import Bad
from mllm_jax.data.text.chat_template import CONTENT_TOKENS
from mllm_jax.data.vision.images import open_image, upright_size

TYPES = ("ref", "bbox")
BOX_TYPES = ("real", "norm1")
FIELDS = {"ref": frozenset(("type", "ref")), "bbox": frozenset(("type", "bbox", "bbox_type", "image_id"))}
PLACEHOLDER = re.compile("<(ref-object|bbox)>")
OUTSIDE = 0.01  # fraction of a side by which a box may exceed its image, due to rounding


@dataclass(frozen=True)
class Grounding:
    """Notation of names, boxes and points in a model's texts, as templates of `str.format`.

    box: template of a box with {x1}, {y1}, {x2}, {y2}.
    point: template of a point with {x}, {y}. None: the model has no notation of points.
    scale: length of a side of the image in coordinates. None: pixels of the resized image.
    largest: largest coordinate.
    name: template of a name with {name}.
    boxes: template of consecutive boxes with {boxes}, which `between` joins.
    between: separator of consecutive boxes.
    named_box, named_point: template of a {box} right after its {name}, which is {json} as JSON. None: name, then box.
    """

    box: str
    point: str | None = None
    scale: int | None = 1000
    largest: int = 1000
    name: str = "{name}"
    boxes: str = "{boxes}"
    between: str = ""
    named_box: str | None = None
    named_point: str | None = None

    def write(self, name: str | None, places: Sequence[Sequence[float]]) -> str:
        """Returns the text of a name, if any, and of consecutive boxes and points in fractions of the image's sides.

        Raises ValueError if the model has no notation for them.
        """
        texts = [self._place(place) for place in places]
        if name is not None and texts:
            templates = [self.named_box if len(place) == 4 else self.named_point for place in places]
            if None not in templates:
                text = json.dumps(name, ensure_ascii=False)
                return self.between.join(t.format(name=name, json=text, box=box) for t, box in zip(templates, texts))
        boxes = self.boxes.format(boxes=self.between.join(texts)) if texts else ""
        return ("" if name is None else self.name.format(name=name)) + boxes

    def _place(self, place: Sequence[float]) -> str:
        if self.scale is None:
            raise ValueError(
                "this model writes boxes in pixels of the resized image, whose size depends on the rest of the "
                "conversation. Write such boxes into the texts, and set config.data.min_pixels and max_pixels."
            )
        if len(place) == 2 and self.point is None:
            raise ValueError("this model has no published notation of points. Use a box, or remove the record.")
        numbers = [min(max(round(share * self.scale), 0), self.largest) for share in place]
        if len(place) == 2:
            return self.point.format(**dict(zip(("x", "y"), numbers)))
        return self.box.format(**dict(zip(("x1", "y1", "x2", "y2"), numbers)))


QWEN3_VL = Grounding(  # the 2D grounding cookbook of Qwen3-VL
    box="[{x1}, {y1}, {x2}, {y2}]",
    point="[{x}, {y}]",
    between=", ",
    named_box='{{"bbox_2d": {box}, "label": {json}}}',
    named_point='{{"point_2d": {box}, "label": {json}}}',
)


def with_objects(messages: Sequence[dict[str, Any]], objects: Any) -> list[dict[str, Any]]:
    """Replaces placeholders in messages by parts of the record's objects. Raises Bad if they do not match."""
    if not isinstance(objects, Mapping) or (unknown := objects.keys() - {"ref", "bbox", "bbox_type", "image_id"}):
        fault = "must be an object" if not isinstance(objects, Mapping) else f"has the unknown field {min(unknown)!r}"
        raise Bad("not boxes", f'"objects" {fault}; it has "ref", "bbox", "bbox_type" and "image_id"')
    names, boxes = (objects.get(name) or [] for name in TYPES)
    images = objects.get("image_id") or 0
    lists = isinstance(names, list) and isinstance(boxes, list)
    images = [images] * len(boxes) if lists and not isinstance(images, list) else images
    if not lists or len(images) != len(boxes):
        raise Bad("not boxes", '"ref", "bbox" and "image_id" of "objects" must be lists, the last two of one length')
    kind = objects.get("bbox_type") or "real"
    parts = {
        "ref-object": [{"type": "ref", "ref": name} for name in names],
        "bbox": [{"type": "bbox", "bbox": b, "bbox_type": kind, "image_id": i} for b, i in zip(boxes, images)],
    }
    existing = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    count = sum(part["type"] == "image" for part in existing)
    if kind == "real" and (missing := [image for image in images if isinstance(image, int) and image >= count]):
        raise Bad("not boxes", f"a box of image {missing[0]}: there are {count} images, counted from 0")
    texts = [text for message in messages for text in texts_of(message["content"])]
    placeholders = [name for text in texts for name in PLACEHOLDER.findall(text)]
    for name, entries in parts.items():
        if placeholders.count(name) != len(entries):
            detail = f"{placeholders.count(name)} <{name}> for {len(entries)}"
            raise Bad("placeholders and objects differ in number", detail)
    queues = {name: iter(entries) for name, entries in parts.items()}
    return [message | {"content": _placed(message["content"], queues)} for message in messages]


def at_placeholders(
    text: str, pattern: re.Pattern[str], queues: Mapping[str, Iterator[dict[str, Any]]]
) -> list[dict[str, Any]] | None:
    """Splits a text into parts, with each placeholder replaced by the next part of its name; None without any.

    Example with queues of a box B: "a <bbox>." becomes text "a ", B, text ".".
    """
    pieces = pattern.split(text)  # text, name, text, name, text
    if len(pieces) == 1:
        return None
    parts = [next(queues[piece]) if i % 2 else {"type": "text", "text": piece} for i, piece in enumerate(pieces)]
    return [part for part in parts if part["type"] != "text" or part["text"]]


def checked(part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a part of type "ref" or "bbox" with all its fields. Raises Bad if one is invalid."""
    if part["type"] == "ref":
        if not isinstance(part.get("ref"), str):
            raise Bad("not boxes", 'a part of type "ref" needs a text')
        return {"type": "ref", "ref": part["ref"]}
    box, kind, image = part.get("bbox"), part.get("bbox_type", "real"), part.get("image_id", 0)
    numbers = isinstance(box, list | tuple) and len(box) in (2, 4) and all(map(_is_number, box))
    if not numbers or (len(box) == 4 and not (box[0] <= box[2] and box[1] <= box[3])):
        raise Bad("not boxes", f"{box!r:.80} must be a box [x1, y1, x2, y2] with x1 <= x2, y1 <= y2, or a point [x, y]")
    if kind not in BOX_TYPES or not isinstance(image, int) or image < 0:
        raise Bad("not boxes", f'"bbox_type" must be one of {", ".join(BOX_TYPES)}, and "image_id" 0 or more')
    return {"type": "bbox", "bbox": [float(x) for x in box], "bbox_type": kind, "image_id": image}


def written(messages: Sequence[dict[str, Any]], grounding: Grounding | None) -> list[dict[str, Any]]:
    """Returns messages with names, boxes and points written as text. Reads only the headers of images.

    Messages that had any also get {CONTENT_TOKENS: True}: tags such as `<|box_start|>` are tokens there for any role.

    Raises ValueError if the model has no notation for them, or a box lies outside its image.
    """
    contents = [message.get("content") if isinstance(message, Mapping) else None for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    has_boxes = lambda parts: any(isinstance(part, Mapping) and part.get("type") in TYPES for part in parts)
    if not has_boxes(parts):
        return list(messages)
    if grounding is None:
        raise ValueError(
            "this conversation has boxes, but this model has no published notation of boxes. Write them into the texts."
        )
    images = [part["image"] for part in parts if part.get("type") == "image"]

    @functools.cache
    def size(number: int) -> tuple[int, int]:
        if number >= len(images):
            raise ValueError(f"a box of image {number}: there are {len(images)} images, counted from 0")
        return upright_size(open_image(images[number]))[::-1]  # (width, height)

    def shares(part: Mapping[str, Any]) -> list[float]:
        sides = (1, 1) if part["bbox_type"] == "norm1" else size(part["image_id"])
        fractions = [x / side for x, side in zip(part["bbox"], itertools.cycle(sides))]
        if min(fractions) < -OUTSIDE or max(fractions) > 1 + OUTSIDE:
            raise ValueError(
                f"the box {part['bbox']} lies outside of its image, {sides[0]} x {sides[1]}. Correct it, or remove it."
            )
        return fractions

    return [
        message | {"content": _joined(_texts_written(content, grounding, shares)), CONTENT_TOKENS: True}
        if isinstance(content, list) and has_boxes(content)
        else message
        for message, content in zip(messages, contents)
    ]


def _texts_written(parts: Sequence[dict[str, Any]], grounding: Grounding, shares: Any) -> Iterator[dict[str, Any]]:
    """Yields parts with texts in place of names, boxes and points; a name includes the boxes right after it."""
    place = 0
    while place < len(parts):
        part = parts[place]
        if part["type"] not in TYPES:
            yield part
            place += 1
            continue
        name = part["ref"] if part["type"] == "ref" else None
        following = itertools.takewhile(lambda other: other["type"] == "bbox", parts[place + (name is not None) :])
        boxes = [shares(box) for box in following]
        yield {"type": "text", "text": grounding.write(name, boxes)}
        place += (name is not None) + len(boxes)


def _joined(parts: Iterator[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Joins neighboring texts; returns a content of a single text as a text."""
    joined = []
    for is_text, group in itertools.groupby(parts, lambda part: part["type"] == "text"):
        group = list(group)
        joined += [{"type": "text", "text": "".join(part["text"] for part in group)}] if is_text else group
    return joined[0]["text"] if len(joined) == 1 and joined[0]["type"] == "text" else joined


def _placed(content: Any, queues: Mapping[str, Iterator[dict[str, Any]]]) -> Any:
    if isinstance(content, str):
        return at_placeholders(content, PLACEHOLDER, queues) or content
    placed = lambda part: at_placeholders(part["text"], PLACEHOLDER, queues) if part["type"] == "text" else None
    return [new for part in content for new in placed(part) or [part]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
