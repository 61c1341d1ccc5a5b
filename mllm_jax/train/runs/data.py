"""Data settings of a run: the shape of its batches, and the embedded data sets."""

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
    """Shape of batches, and how records are read.

    batch: number of rows of a batch, over all processes and accumulated parts.
    tokens, patch_rows, patches_per_row: budget of a row: `tokens` tokens and `patch_rows` x `patches_per_row` patches.
      An image has at most `patches_per_row`. In image-text pairs, each text takes the model's text length.
    images_per_row: largest number of images (or temporal patches) in a patch row. Connectors with queries need it. 0:
      unlimited.
    instruction_tokens: largest number of tokens of the instruction of an image. Connectors that read instructions need
      it. 0: unlimited.
    min_pixels, max_pixels: limits to which images are resized, before the budget applies. None: the processor's.
    missing_rows: largest fraction of rows that a truncated JPEG may lack. 0: truncated images are rejected.
    fps, max_frames, sampling: frames per second and maximum number of frames of a video, sampled evenly ("even") or
      denser at motion ("motion"). None: the processor's. A video in a message may override them.
    user_content_tokens: allow special tokens such as <|box_start|> in texts of users, as in answers. None: the
      processor's setting.
    seed: seed of the order of the data.
    epochs: number of passes over the data. None: unlimited. Sets the length of the run if optim.steps is 0; otherwise
      the data must last for optim.steps.
    text_only: remove all images and videos, for a text-only baseline.
    streams: number of streams, each of which fills rows of its own. The order of the data is the same on any number of
      processes that divides it. None: the largest divisor of `batch` up to 64.
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
            raise ValueError(f"batch={self.batch} rows of tokens={self.tokens} must be at most {LARGEST} tokens.")
        if None not in (self.min_pixels, self.max_pixels) and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} must be at most max_pixels={self.max_pixels}.")
        if self.streams is not None and self.batch % self.streams:
            raise ValueError(f"streams={self.streams} must divide batch={self.batch}.")

    @property
    def budget(self) -> Budget:
        rows = 0 if self.text_only else self.patch_rows
        return Budget(self.tokens, rows, self.patches_per_row, self.images_per_row, self.instruction_tokens)


Cells = Annotated[int, Range(least=3)]  # cells per side of a drawn image


def _check_cells(least: int, most: int) -> None:
    if least > most:
        raise ValueError(f"min_cells={least} must be at most max_cells={most}.")


@dataclass(frozen=True, kw_only=True)
class ScenesData(DataConfig):
    """Questions on images and videos that are drawn on the fly (see `mllm_jax.data.synthetic.scenes`).

    kinds: relative weight of each kind of question.
    cell: side of a cell, pixels.
    min_cells, max_cells: limits of the number of cells per side of an image.
    """

    kinds: Mapping[str, NonNegative] = field(default_factory=lambda: dict(DEFAULT_KINDS))
    cell: PositiveInt = 16
    min_cells: Cells = 3
    max_cells: Cells = 5

    def __post_init__(self):
        super().__post_init__()
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise ValueError(f"kinds: there is no {unknown[0]!r}; {suggestion(unknown[0], KINDS)}")
        if not any(self.kinds.values()):
            raise ValueError(f"kinds={dict(self.kinds)}: no kind has a weight above 0. Set one.")
        _check_cells(self.min_cells, self.max_cells)

    def source(self, split: str = "train") -> Any:
        """Returns the conversations of "train" or "heldout"."""
        sizes = {"cell": self.cell, "min_cells": self.min_cells, "max_cells": self.max_cells}
        return Scenes(split, self.seed, self.kinds, images=not self.text_only, **sizes)


@dataclass(frozen=True, kw_only=True)
class CaptionsData(DataConfig):
    """True and false captions of drawn images (see `mllm_jax.data.synthetic.captions`).

    false: fraction of training captions that name an absent object. Held-out captions are true.
    cell, min_cells, max_cells: as in `ScenesData`.
    """

    false: Fraction = 0.0
    cell: PositiveInt = 16
    min_cells: Cells = 3
    max_cells: Cells = 5

    def __post_init__(self):
        super().__post_init__()
        _check_cells(self.min_cells, self.max_cells)

    def source(self, split: str = "train") -> Any:
        """Returns the captions of "train" or "heldout"."""
        sizes = {"cell": self.cell, "min_cells": self.min_cells, "max_cells": self.max_cells}
        false = self.false if split == "train" else 0.0
        return Captions(split, self.seed, false, images=not self.text_only, **sizes)


class WithoutImages:
    """A source without its images and videos, for a text-only baseline."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return without_images(self.source[index])


def without_images(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the record without the images and videos of its messages."""

    def without_media(content: Any) -> Any:
        return content if isinstance(content, str) else [part for part in content if part["type"] not in MEDIA]

    return record | {
        "messages": [message | {"content": without_media(message["content"])} for message in record["messages"]]
    }
