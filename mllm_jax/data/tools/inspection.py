"""Statistics of batches: lengths, sizes and fill, and some rows and conversations as a model reads them. No jax."""

import collections
from typing import NamedTuple

import numpy as np
from PIL import Image

from mllm_jax.data.pipeline.loader import Info
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.vision.images import unpatchify
from mllm_jax.types import Batch

KINDS = ("padding", "text", "learned text", "image", "video")  # of the places of a row
PADDING, TEXT, LEARNED, IMAGE, VIDEO = range(5)


class Stretch(NamedTuple):
    """Places of a row that are drawn as one."""

    kind: str  # of KINDS
    first: int
    count: int
    number: int  # of its conversation, or of its image; 0 = padding


class Row(NamedTuple):
    """A packed row."""

    tokens: list[Stretch]  # of T
    patches: list[list[Stretch]]  # of P, for each of R patch rows


class Shown(NamedTuple):
    """A part of a conversation: a text, or what stands in its place."""

    text: str = ""
    learned: bool = False
    images: tuple[Image.Image, ...] = ()  # in the size at which they are read
    video: bool = False


class Sample(NamedTuple):
    """A conversation as it is read."""

    kind: str
    tokens: int
    parts: list[Shown]


class Inspection:
    """Counts of all batches that were added, and the first of their rows and conversations.

    Args:
      rows: rows that are kept to be drawn.
      samples: conversations that are kept: the first of each kind of question, and then the first of all.
    """

    def __init__(self, processor: Processor, rows: int = 16, samples: int = 12):
        self.processor, self._samples = processor, samples
        self.tokens, self.visual, self.learned, self.images = [], [], [], []  # of every conversation
        self.kinds: collections.Counter[str] = collections.Counter()  # conversations
        self.sizes: collections.Counter[tuple[int, int]] = collections.Counter()  # images of (width, height) pixels
        self.fill: list[dict[str, float]] = []  # of every batch, see `packing.fill`
        self.rows: list[Row] = []
        self._wanted = rows
        self._first: list[Sample] = []
        self._of_kinds: dict[str, Sample] = {}

    @property
    def samples(self) -> list[Sample]:
        """At most as many as were asked for, those of one kind together."""
        found = list(self._of_kinds.values())
        found += [sample for sample in self._first if not any(sample is other for other in found)]
        return sorted(found[: self._samples], key=lambda sample: sample.kind)

    def add(self, batch: Batch, info: Info, whole: bool = True) -> None:
        """Adds a batch. whole: whether its fill counts, which is not so after the end of the data."""
        if whole:
            self.fill.append(info.fill)
        for row, kinds in enumerate(info.kinds):
            self._add_row(Batch(*(None if x is None else _row(x, row) for x in batch)), kinds)

    def _add_row(self, row: Batch, kinds: list[str]) -> None:
        """`row`: a batch without its first axis."""
        count, visual = len(kinds), row.vision_index != -1
        image, of_token = _images(row, self.processor.spec)
        pairs = np.unique(np.stack([row.segment, of_token])[:, of_token > 0], axis=1)
        counted = lambda segments: np.bincount(segments, minlength=count + 1)[1:].tolist()
        self.tokens += counted(row.segment)
        self.visual += counted(row.segment[visual])
        self.learned += counted(row.segment[row.weight > 0])
        self.images += counted(pairs[0])
        self.kinds.update(kinds)
        for number in range(1, image.max(initial=0) + 1):
            height, width = row.vision.grid[image == number][0].tolist()
            self.sizes[width * self.processor.spec.patch, height * self.processor.spec.patch] += 1
        code = self._codes(row, visual)
        if count and len(self.rows) < self._wanted:
            self.rows.append(_drawn(row, code, image, of_token))
        for number, kind in enumerate(kinds, 1):
            if len(self._first) < self._samples or kind not in self._of_kinds:
                here = row.segment == number
                sample = Sample(kind, int(here.sum()), self._parts(row, code, of_token, here))
                self._of_kinds.setdefault(kind, sample)
                self._first += [sample] * (len(self._first) < self._samples)

    def _codes(self, row: Batch, visual: np.ndarray) -> np.ndarray:
        """i32[T]: what stands at each place, as an index of KINDS."""
        learned = np.append(False, row.weight[:-1] > 0)  # the weight of a place is that of the token behind it
        video = visual & (row.tokens == (-1 if self.processor.video_id is None else self.processor.video_id))
        code = np.where(learned, LEARNED, np.where(row.segment > 0, TEXT, PADDING))
        return np.where(video, VIDEO, np.where(visual, IMAGE, code))

    def _parts(self, row: Batch, code: np.ndarray, of_token: np.ndarray, here: np.ndarray) -> list[Shown]:
        tokens, code, of_token = row.tokens[here], code[here], of_token[here]
        parts = []
        for first, last in _runs(code):
            kind = code[first]
            if kind in (TEXT, LEARNED):
                parts.append(Shown(self.processor.tokenizer.decode(tokens[first:last], special=True), kind == LEARNED))
            else:
                numbers = [number for number in dict.fromkeys(of_token[first:last].tolist()) if number]
                shown = tuple(self._image(row, number) for number in numbers)
                parts.append(Shown(images=shown, video=bool(kind == VIDEO)))
        return parts

    def _image(self, row: Batch, number: int) -> Image.Image:
        own = (row.vision.image == number) & (row.vision.coords[..., 0] >= 0)  # without what leads an image
        grid = tuple(row.vision.grid[own][0].tolist())
        spec = self.processor.spec
        return Image.fromarray(unpatchify(row.vision.patches[own], grid, spec.patch, spec.merge)[0])


def _row(value, row: int):
    """One row of an array, or of all arrays of a tuple."""
    if isinstance(value, tuple):
        return type(value)(*(part if part is None else part[row] for part in value))
    return value[row]


def _images(row: Batch, spec: ProcessorSpec) -> tuple[np.ndarray, np.ndarray]:
    """i32[R P] the image of each patch, and i32[T] that of each visual token; 0 = none."""
    if row.vision is None:
        return np.zeros((0, 0), np.int32), np.zeros_like(row.tokens)
    if spec.queries:
        of_visual = np.repeat(row.vision.slots.reshape(-1), spec.queries)
    else:
        of_visual = row.vision.image.reshape(-1)[:: spec.merge**2]
    shown = (row.vision_index >= 0) & (row.vision_index < len(of_visual))  # the last one is a newline
    return row.vision.image, np.where(shown, of_visual[np.where(shown, row.vision_index, 0)], 0)


def _drawn(row: Batch, code: np.ndarray, image: np.ndarray, of_token: np.ndarray) -> Row:
    edges = np.stack([code, row.segment], axis=-1)
    tokens = [Stretch(KINDS[code[a]], a, b - a, int(row.segment[a])) for a, b in _runs(edges)]
    videos = set(of_token[code == VIDEO].tolist())
    kind = lambda number: KINDS[PADDING if not number else VIDEO if number in videos else IMAGE]
    patches = [[Stretch(kind(int(part[a])), a, b - a, int(part[a])) for a, b in _runs(part)] for part in image]
    return Row(tokens, patches)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """[first, last) of every stretch of equal values [n ...]."""
    if not len(values):
        return []
    changes = np.flatnonzero((values[1:] != values[:-1]).reshape(len(values) - 1, -1).any(axis=1)) + 1
    edges = [0, *changes.tolist(), len(values)]
    return list(zip(edges, edges[1:]))
