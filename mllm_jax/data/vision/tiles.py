"""Cuts images of any size into tiles of one size. PIL and numpy only.

AnyRes (LLaVA-NeXT, llava/mm_utils.py of haotian-liu/LLaVA) centers an image on the best of several canvases and keeps
its aspect ratio. The dynamic tiles of InternVL (arXiv 2404.16821, section 3.3) stretch it to the best grid.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image

from mllm_jax.common.settings import NonNegativeInt, PositiveInt
from mllm_jax.data.vision.images import resized
from mllm_jax.data.vision.resize import Color, EndedSquare, Rule
from mllm_jax.data.vision.token_blend import Tokens, alone, end_rows, joined, resampled
from mllm_jax.types import TokenBlend

Size = tuple[int, int]  # (height, width)


def best_canvas(size: Size, pinpoints: Sequence[Size]) -> Size:
    """Returns the canvas that keeps most pixels of an image; ties go to the least waste, then to the first canvas."""
    height, width = size

    def worth(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - math.prod(canvas)

    return max(pinpoints, key=worth)


def fitted(size: Size, canvas: Size) -> Size:
    """Returns the largest size of this aspect ratio within a canvas, with sides rounded up."""
    height, width = size
    tall, wide = canvas[0] / height, canvas[1] / width
    if wide < tall:
        return min(math.ceil(height * wide), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * tall), canvas[1])


def anyres_tiles(image: Image.Image, canvas: Size, tile: int) -> np.ndarray:
    """Returns the image stretched to one tile, then the tiles of its canvas row by row: u8[tiles tile tile 3].

    The image is centered on the canvas, with black around it.
    """
    height, width = fitted((image.height, image.width), canvas)
    padded = np.zeros((*canvas, 3), np.uint8)
    top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
    padded[top : top + height, left : left + width] = resized(image, (height, width))
    return np.concatenate([resized(image, (tile, tile))[None], _cut(padded, tile)])


def anyres_tokens(size: Size, canvas: Size, tile: int, side: int, most: int = 0) -> Tokens:
    """Returns the visual tokens of an image of `size` pixels on a canvas, in the order of the text.

    All tokens of the overview tile come first. Then the grid of all tiles follows row by row, without the rows or
    columns of padding around the image, and with a NEWLINE after each row.

    Example with canvas 2 x 2 tiles, side=1, and an image that fills it: 0, 1 2 NEWLINE, 3 4 NEWLINE.

    Args:
      tile: side of a tile in pixels.
      side: visual tokens along the side of a tile.
      most: number of tiles. A grid with over 1.21 times their tokens is resampled to about their number. 0: never.
    """
    rows, columns = canvas[0] // tile, canvas[1] // tile
    tokens = np.arange((1 + rows * columns) * side**2, dtype=np.int32)[side**2 :]
    shape = {"rows": rows, "columns": columns, "y": side, "x": side}
    grid = _uncovered(rearrange(tokens, "(rows columns y x) -> (rows y) (columns x)", **shape), size)
    ratio = math.sqrt(grid.size / (most * side**2)) if most else 0
    if ratio > 1.1:
        tokens = resampled(grid, (int(grid.shape[0] // ratio), int(grid.shape[1] // ratio)))
    else:
        tokens = alone(grid)
    return joined([alone(np.arange(side**2)), end_rows(tokens)])


def _uncovered(grid: np.ndarray, size: Size) -> np.ndarray:
    """Returns the part of a grid of tokens that a centered image of `size` covers."""
    (height, width), (rows, columns) = size, grid.shape
    if width / height > columns / rows:
        edge = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[edge : rows - edge]
    edge = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, edge : columns - edge]


def dynamic_grid(size: Size, low: int, high: int, tile: int) -> Size:
    """Returns (rows, columns) of `low` to `high` tiles with the aspect ratio closest to the image's.

    Among equally close grids, a larger one is chosen if the image has over half of its area.
    """
    height, width = size
    grids = [(r, c) for c in range(1, high + 1) for r in range(1, high + 1) if low <= r * c <= high]
    best, closest = (1, 1), math.inf
    for rows, columns in sorted(grids, key=math.prod):
        distance = abs(width / height - columns / rows)
        if distance < closest or (distance == closest and height * width > 0.5 * tile**2 * rows * columns):
            best, closest = (rows, columns), distance
    return best


def dynamic_tiles(image: Image.Image, grid: Size, tile: int) -> np.ndarray:
    """Returns the tiles of a grid row by row; if there are several, also an overview tile: u8[tiles tile tile 3]."""
    tiles = _cut(resized(image, (grid[0] * tile, grid[1] * tile)), tile)
    return tiles if len(tiles) == 1 else np.concatenate([tiles, resized(image, (tile, tile))[None]])


@dataclass(frozen=True)
class AnyRes(Rule):
    """Rule of LLaVA-NeXT and of LLaVA-OneVision (arXiv 2408.03326).

    pinpoints: canvases (height, width) in pixels.
    tile: side of a tile in pixels.
    most: number of tiles to whose visual tokens larger grids are resampled. 0: no limit.
    color: color around images in conversations with several, which become one tile each. None: they are cut into tiles.
    """

    pinpoints: tuple[tuple[PositiveInt, PositiveInt], ...]
    tile: NonNegativeInt
    most: NonNegativeInt = 0
    color: Color | None = None

    def among(self, count: int) -> Rule:
        return self if count == 1 or self.color is None else EndedSquare(self.tile, self.color)

    def within(self, limit: float) -> "AnyRes":
        small = tuple(canvas for canvas in self.pinpoints if math.prod(canvas) + self.tile**2 <= limit)
        return replace(self, pinpoints=small or (min(self.pinpoints, key=math.prod),))

    def sizes(self, size: Size) -> tuple[Size, ...]:
        canvas = best_canvas(size, self.pinpoints)
        return ((self.tile, self.tile),) * (1 + math.prod(canvas) // self.tile**2)

    def order(self, size: Size, factor: int) -> np.ndarray:
        return self._tokens(size, factor).order

    def mix(self, size: Size, factor: int) -> TokenBlend | None:
        return self._tokens(size, factor).mix if self.most else None

    def _tokens(self, size: Size, factor: int) -> Tokens:
        return anyres_tokens(size, best_canvas(size, self.pinpoints), self.tile, self.tile // factor, self.most)

    def images(self, image: Image.Image) -> Iterator[np.ndarray]:
        yield from anyres_tiles(image, best_canvas((image.height, image.width), self.pinpoints), self.tile)

    def to_hf(self) -> dict[str, Any]:
        side, pinpoints = {"height": self.tile, "width": self.tile}, [list(canvas) for canvas in self.pinpoints]
        if self.color is not None:
            return _named("LlavaOnevision") | {"image_grid_pinpoints": pinpoints, "size": side}
        sizes = {"size": {"shortest_edge": self.tile}, "crop_size": side}
        return _named("LlavaNext") | {"image_grid_pinpoints": pinpoints, **sizes}


@dataclass(frozen=True)
class Tiles(Rule):
    """Rule of InternVL: `low` to `high` tiles of `tile` pixels a side, and an overview tile if there are several."""

    tile: PositiveInt
    low: PositiveInt = 1
    high: PositiveInt = 12

    def within(self, limit: float) -> "Tiles":
        room = limit / self.tile**2  # several tiles need an overview tile, too
        return replace(self, high=max(self.low, int(min(self.high, room - 1 if room >= 3 else 1))))

    def sizes(self, size: Size) -> tuple[Size, ...]:
        count = math.prod(dynamic_grid(size, self.low, self.high, self.tile))
        return ((self.tile, self.tile),) * (count + (count > 1))

    def order(self, size: Size, factor: int) -> np.ndarray:
        return np.arange(len(self.sizes(size)) * (self.tile // factor) ** 2, dtype=np.int32)

    def images(self, image: Image.Image) -> Iterator[np.ndarray]:
        yield from dynamic_tiles(
            image, dynamic_grid((image.height, image.width), self.low, self.high, self.tile), self.tile
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": True,
            "min_patches": self.low,
            "max_patches": self.high,
            "size": {"height": self.tile, "width": self.tile},
        }


def _named(family: str) -> dict[str, str]:
    return {"image_processor_type": f"{family}ImageProcessor", "processor_class": f"{family}Processor"}


def _cut(pixels: np.ndarray, tile: int) -> np.ndarray:
    return rearrange(pixels, "(rows y) (columns x) c -> (rows columns) y x c", y=tile, x=tile)
