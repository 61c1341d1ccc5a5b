"""Boxes and points of images in texts, in the format that a model was trained on.

A record has them beside its messages, for the placeholders `<ref-object>` and `<bbox>` in its texts, as ms-swift does:

    {"objects": {"ref": ["a cat"], "bbox": [[10, 20, 110, 220]]}, "messages": [..., "<ref-object><bbox> sleeps."]}

They become parts of a content, which a processor writes as text once it knows the size of the image:

    {"type": "ref", "ref": "a cat"}
    {"type": "bbox", "bbox": [10, 20, 110, 220], "bbox_type": "real", "image_id": 0}

A box is [x1, y1, x2, y2] and a point [x, y], in pixels of the upright image ("real": after any rotation by its EXIF
data) or as fractions of its sides ("norm1"). `image_id` counts the images of a conversation from 0.
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
OUTSIDE = 0.01  # of a side, by which a box may leave its image, as rounded ones do


@dataclass(frozen=True)
class Grounding:
    """Spelling of names, boxes and points in a model's texts, as templates of `str.format`.

    box: a box of {x1}, {y1}, {x2}, {y2}.
    point: a point of {x}, {y}. None: the model was trained on none.
    scale: what a side of the image measures in these numbers. None: pixels of the image as the model reads it.
    largest: largest number.
    name: the {name} of a thing.
    boxes: {boxes} that stand together; `between` joins them.
    named_box, named_point: a {box} right after its {name}, which as JSON is {json}. None: the name, then the box.
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
        """The text of boxes and points that stand together, shares of the sides of their image, after their name.

        Raises ValueError: the model has no such way to write them.
        """
        written = [self._place(place) for place in places]
        if name is not None and written:
            named = [self.named_box if len(place) == 4 else self.named_point for place in places]
            if None not in named:
                text = json.dumps(name, ensure_ascii=False)
                return self.between.join(n.format(name=name, json=text, box=box) for n, box in zip(named, written))
        boxes = self.boxes.format(boxes=self.between.join(written)) if written else ""
        return ("" if name is None else self.name.format(name=name)) + boxes

    def _place(self, place: Sequence[float]) -> str:
        if self.scale is None:
            raise ValueError(
                "this model writes boxes in pixels of the image as it reads it, whose size depends on the rest of the "
                "conversation; write such boxes into the texts, and set config.data.min_pixels and max_pixels"
            )
        if len(place) == 2 and self.point is None:
            raise ValueError("this model has no published way to write points; give a box, or leave the record out")
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
    """Messages whose placeholders are parts, of the objects of a record. Raises Bad where they do not fit."""
    if not isinstance(objects, Mapping) or (unknown := objects.keys() - {"ref", "bbox", "bbox_type", "image_id"}):
        what = "must be an object" if not isinstance(objects, Mapping) else f"has the unknown field {min(unknown)!r}"
        raise Bad("not boxes", f'"objects" {what}; it has "ref", "bbox", "bbox_type" and "image_id"')
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
    shown = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    count = sum(part["type"] == "image" for part in shown)
    if kind == "real" and (lost := [image for image in images if isinstance(image, int) and image >= count]):
        raise Bad("not boxes", f"a box of image {lost[0]}: there are {count} images, counted from 0")
    texts = [text for message in messages for text in texts_of(message["content"])]
    asked = [name for text in texts for name in PLACEHOLDER.findall(text)]
    for name, found in parts.items():
        if asked.count(name) != len(found):
            raise Bad("placeholders and objects differ in number", f"{asked.count(name)} <{name}> for {len(found)}")
    queues = {name: iter(found) for name, found in parts.items()}
    return [message | {"content": _placed(message["content"], queues)} for message in messages]


def at_placeholders(
    text: str, pattern: re.Pattern[str], queues: Mapping[str, Iterator[dict[str, Any]]]
) -> list[dict[str, Any]] | None:
    """The parts of a text, with the next part of its kind for each placeholder. None: the text has no placeholders."""
    pieces = pattern.split(text)  # text, name, text, name, text
    if len(pieces) == 1:
        return None
    parts = [next(queues[piece]) if i % 2 else {"type": "text", "text": piece} for i, piece in enumerate(pieces)]
    return [part for part in parts if part["type"] != "text" or part["text"]]


def checked(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a name, a box or a point with all its fields. Raises Bad where one is wrong."""
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
    """Returns messages with their names, boxes and points as text. Only the headers of images are read.

    Messages that had some also have {CONTENT_TOKENS: True}: tags such as `<|box_start|>` are tokens there in any role.

    Raises ValueError: the model has no format for them, or a box lies outside its image.
    """
    contents = [message.get("content") if isinstance(message, Mapping) else None for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    has_boxes = lambda parts: any(isinstance(part, Mapping) and part.get("type") in TYPES for part in parts)
    if not has_boxes(parts):
        return list(messages)
    if grounding is None:
        raise ValueError("there are boxes in this conversation, and no published way for this model to write them")
    images = [part["image"] for part in parts if part.get("type") == "image"]

    @functools.cache
    def size(number: int) -> tuple[int, int]:
        if number >= len(images):
            raise ValueError(f"a box of image {number}: there are {len(images)} images, counted from 0")
        return upright_size(open_image(images[number]))[::-1]  # (width, height)

    def shares(part: Mapping[str, Any]) -> list[float]:
        sides = (1, 1) if part["bbox_type"] == "norm1" else size(part["image_id"])
        found = [x / side for x, side in zip(part["bbox"], itertools.cycle(sides))]
        if min(found) < -OUTSIDE or max(found) > 1 + OUTSIDE:
            raise ValueError(f"the box {part['bbox']} is outside of its image, {sides[0]} x {sides[1]}")
        return found

    return [
        message | {"content": _joined(_texts_written(content, grounding, shares)), CONTENT_TOKENS: True}
        if isinstance(content, list) and has_boxes(content)
        else message
        for message, content in zip(messages, contents)
    ]


def _texts_written(parts: Sequence[dict[str, Any]], grounding: Grounding, shares: Any) -> Iterator[dict[str, Any]]:
    """Parts with texts in place of names, boxes and points; a name takes those that stand right after it."""
    place = 0
    while place < len(parts):
        part = parts[place]
        if part["type"] not in TYPES:
            yield part
            place += 1
            continue
        name = part["ref"] if part["type"] == "ref" else None
        after = itertools.takewhile(lambda other: other["type"] == "bbox", parts[place + (name is not None) :])
        boxes = [shares(box) for box in after]
        yield {"type": "text", "text": grounding.write(name, boxes)}
        place += (name is not None) + len(boxes)


def _joined(parts: Iterator[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Joins neighboring texts; a content of texts only becomes a text."""
    found = []
    for is_text, group in itertools.groupby(parts, lambda part: part["type"] == "text"):
        group = list(group)
        found += [{"type": "text", "text": "".join(part["text"] for part in group)}] if is_text else group
    return found[0]["text"] if len(found) == 1 and found[0]["type"] == "text" else found


def _placed(content: Any, queues: Mapping[str, Iterator[dict[str, Any]]]) -> Any:
    if isinstance(content, str):
        return at_placeholders(content, PLACEHOLDER, queues) or content
    placed = lambda part: at_placeholders(part["text"], PLACEHOLDER, queues) if part["type"] == "text" else None
    return [new for part in content for new in placed(part) or [part]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
