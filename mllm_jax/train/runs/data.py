"""Data of a run: the shape of its batches, and the embedded sets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from mllm_jax.common.errors import suggestion
from mllm_jax.common.settings import (
    LARGEST,
    Config,
    Fraction,
    NonNegative,
    NonNegativeInt,
    OneOf,
    Positive,
    PositiveInt,
    Range,
    Seed,
)
from mllm_jax.data.pipeline.packing import Budget
from mllm_jax.data.records.parts import MEDIA
from mllm_jax.data.synthetic.captions import Captions
from mllm_jax.data.synthetic.scenes import DEFAULT_KINDS, KINDS, Scenes
from mllm_jax.data.video.videos import SAMPLINGS

Readers = Annotated[int, Range(least=0, most=1024)]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Shape of a batch, and reading of conversations.

    batch: rows of a batch, over all processes and accumulated parts.
    tokens, patch_rows, patches_per_row: a row holds `tokens` tokens and `patch_rows` x `patches_per_row` patches; no
      image exceeds `patches_per_row`. For image-text pairs, each text takes as many tokens as the model reads.
    images_per_row: largest number of images (or temporal patches) in a patch row, which connectors with queries need.
      0: any number.
    instruction_tokens: largest number of tokens of the text that the connector reads with an image, which connectors
      that read one need. 0: any number.
    min_pixels, max_pixels: limits of an image's size before the budget shrinks it. None: those of the processor.
    missing_rows: largest fraction of its rows that a truncated JPEG may lack. Default 0: truncated images are dropped.
    fps, max_frames, sampling: frames per second and largest number of frames of a video, spread evenly ("even") or
      denser where they differ ("motion"). None: those of the processor. A video in a message may set its own.
    user_content_tokens: whether texts of users may contain special tokens such as <|box_start|>, as answers may. None:
      as the processor sets.
    epochs: passes over the data. None: without end. They are the length of the run if optim.steps is 0; otherwise the
      data must not end before optim.steps.
    text_only: whether to leave all images and videos out, for a text-only baseline.
    streams: number of streams of conversations, each of which fills its own rows, so that the order of the data is the
      same on any number of processes that divides it. None: the largest divisor of `batch` up to 64.
    window, workers, processes, prefetch, fail_on_bad_record, max_bad_fraction: see
      `mllm_jax.data.pipeline.loader.make_loader`.
    """

    batch: PositiveInt = 8
    tokens: PositiveInt = 4096
    patch_rows: NonNegativeInt = 4
    patches_per_row: NonNegativeInt = 4096
    images_per_row: NonNegativeInt = 0
    instruction_tokens: NonNegativeInt = 0
    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None
    missing_rows: Fraction = 0.0
    fps: Positive | None = None
    max_frames: PositiveInt | None = None
    sampling: Annotated[str, OneOf(SAMPLINGS)] | None = None
    user_content_tokens: bool | None = None
    seed: Seed = 0
    epochs: PositiveInt | None = None
    text_only: bool = False
    streams: PositiveInt | None = None
    window: Annotated[float, Range(above=0, most=1e4)] = 4.0
    workers: Readers = 2
    processes: Readers = 0
    prefetch: NonNegativeInt = 2
    fail_on_bad_record: bool = False
    max_bad_fraction: Fraction = 0.05

    def __post_init__(self):
        super().__post_init__()
        if self.batch * self.tokens > LARGEST:
            raise ValueError(f"batch={self.batch} rows of tokens={self.tokens} must be at most {LARGEST} tokens")
        if None not in (self.min_pixels, self.max_pixels) and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} must not be more than max_pixels={self.max_pixels}")
        if self.streams is not None and self.batch % self.streams:
            raise ValueError(f"streams={self.streams} must divide batch={self.batch}")

    @property
    def budget(self) -> Budget:
        rows = 0 if self.text_only else self.patch_rows
        return Budget(self.tokens, rows, self.patches_per_row, self.images_per_row, self.instruction_tokens)


Cells = Annotated[int, Range(least=3)]  # of a side of a drawn image


def _check_cells(least: int, most: int) -> None:
    if least > most:
        raise ValueError(f"min_cells={least} must not be more than max_cells={most}")


@dataclass(frozen=True, kw_only=True)
class ScenesData(DataConfig):
    """Images and videos that are drawn on the fly (see `mllm_jax.data.synthetic.scenes`)."""

    kinds: Mapping[str, NonNegative] = field(default_factory=lambda: dict(DEFAULT_KINDS))
    cell: PositiveInt = 16
    min_cells: Cells = 3
    max_cells: Cells = 5

    def __post_init__(self):
        super().__post_init__()
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise ValueError(f"kinds: there is no {unknown[0]!r}; {suggestion(unknown[0], KINDS)}")
        if not any(self.kinds.values()):
            raise ValueError(f"kinds={dict(self.kinds)} no kind has a share above 0. Set one")
        _check_cells(self.min_cells, self.max_cells)

    def source(self, split: str = "train") -> Any:
        """The conversations of "train" or "heldout"."""
        sizes = {"cell": self.cell, "min_cells": self.min_cells, "max_cells": self.max_cells}
        return Scenes(split, self.seed, self.kinds, images=not self.text_only, **sizes)


@dataclass(frozen=True, kw_only=True)
class CaptionsData(DataConfig):
    """Captions of such images, truthful and false (see `mllm_jax.data.synthetic.captions`).

    false: share of the captions to train on that name an absent thing; held-out ones are true.
    """

    false: Fraction = 0.0
    cell: PositiveInt = 16
    min_cells: Cells = 3
    max_cells: Cells = 5

    def __post_init__(self):
        super().__post_init__()
        _check_cells(self.min_cells, self.max_cells)

    def source(self, split: str = "train") -> Any:
        """The captions of "train" or "heldout"."""
        sizes = {"cell": self.cell, "min_cells": self.min_cells, "max_cells": self.max_cells}
        false = self.false if split == "train" else 0.0
        return Captions(split, self.seed, false, images=not self.text_only, **sizes)


class WithoutImages:
    """A source of the same questions and answers, without what they are about."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return without_images(self.source[index])


def without_images(record: dict[str, Any]) -> dict[str, Any]:
    """The record without the images and videos of its messages."""

    def texts(content: Any) -> Any:
        return content if isinstance(content, str) else [part for part in content if part["type"] not in MEDIA]

    return record | {"messages": [message | {"content": texts(message["content"])} for message in record["messages"]]}
