"""Rules that resize an image for a tower: center crop, stretch, padding to a square, or native aspect ratio."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from PIL import Image

from mllm_jax.common.settings import Config, PositiveInt, Range
from mllm_jax.data.vision.images import MAX_ASPECT, check_bytes
from mllm_jax.data.vision.token_blend import Tokens, joined, resampled
from mllm_jax.types import NEWLINE, TokenBlend

Filter = Annotated[int, Range(least=0, most=5)]  # PIL's Resampling
Level = Annotated[int, Range(least=0, most=255)]
Color = tuple[Level, Level, Level]
BILINEAR, BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)


def resize(image: Image.Image, size: tuple[int, int], filter: int = BICUBIC) -> np.ndarray:
    """Resizes an RGB image to `size` (height, width): u8[h w 3]."""
    height, width = size
    return np.asarray(image.resize((width, height), Image.Resampling(filter)))


def short_edge_size(height: int, width: int, edge: int) -> tuple[int, int]:
    """Returns (height, width) of the same aspect ratio, the short side `edge` pixels and the long side rounded down.

    Raises ValueError if one side is more than 200 times the other: the enlarged image would fill the memory.
    """
    short, long = sorted((height, width))
    if long > MAX_ASPECT * short:
        raise ValueError(f"an image of {width}x{height} has an aspect ratio over {MAX_ASPECT}")
    sides = {short: edge, long: edge * long // short}
    return sides[height], sides[width]


def center_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crops the middle (height, width) of pixels [h w c]; smaller images are padded with black on all sides."""
    missing = [max(wanted - side, 0) for side, wanted in zip(pixels.shape, size)]
    pixels = np.pad(pixels, [*((-(-count // 2), count // 2) for count in missing), (0, 0)])
    top, left = ((side - wanted) // 2 for side, wanted in zip(pixels.shape, size))
    return pixels[top : top + size[0], left : left + size[1]]


def naflex_size(height: int, width: int, patch: int, patches: int) -> tuple[int, int]:
    """Returns the largest (height, width) in multiples of `patch`, near this aspect ratio, with <= `patches` patches.

    This is NaFlex (SigLIP 2, arXiv 2502.14786): the scale is found by bisection, and sides are rounded up.
    """
    low, high, precision = 1e-6, 100.0, 1e-5

    def at(scale: float) -> tuple[int, int]:
        return tuple(max(patch, math.ceil(side * scale / patch) * patch) for side in (height, width))

    while high - low >= precision:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(at(middle)) <= patches * patch**2 else (low, middle)
    return at(low)


class Rule(Config):
    """Rule that turns an image into one or several images (data/vision/tiles.py) and selects their visual tokens."""

    def among(self, count: int) -> "Rule":
        """Returns the rule for each image of a conversation with `count` images."""
        del count
        return self

    def within(self, limit: float) -> "Rule":
        """Returns the rule with outputs of at most `limit` pixels, as far as it can reduce them."""
        del limit
        return self

    def mix(self, size: tuple[int, int], factor: int) -> TokenBlend | None:
        """Returns the blend of the visual tokens in `order`. None: no tokens are blended."""
        del size, factor


class Whole(Rule):
    """Rule that turns an image into one image: `sized` returns its (height, width), `read` its pixels u8[h w 3]."""

    def sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Returns (height, width) of all images that an image of this size becomes."""
        return (self.sized(size),)

    def order(self, size: tuple[int, int], factor: int) -> np.ndarray:
        """Returns the indices of the visual tokens in the text, with tokens of `factor` pixels a side: i32[m]."""
        return np.arange(math.prod(side // factor for side in self.sized(size)), dtype=np.int32)

    def images(self, image: Image.Image) -> Iterator[np.ndarray]:
        """Yields the pixels u8[h w 3] of all images that `image` becomes."""
        yield self.read(image)


@dataclass(frozen=True)
class Crop(Whole):
    """Rule of CLIP: resizes the short side to `edge`, then crops the middle `size`."""

    edge: PositiveInt
    size: tuple[PositiveInt, PositiveInt]
    filter: Filter = BICUBIC

    def sized(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.size

    def read(self, image: Image.Image) -> np.ndarray:
        return center_crop(resize(image, short_edge_size(image.height, image.width, self.edge), self.filter), self.size)

    def to_hf(self) -> dict[str, Any]:
        height, width = self.size
        sizes = {"size": {"shortest_edge": self.edge}, "crop_size": {"height": height, "width": width}}
        return {"image_processor_type": "CLIPImageProcessor", "resample": self.filter, **sizes}


@dataclass(frozen=True)
class Stretch(Whole):
    """Rule of SigLIP: resizes the image to `size`, whatever its aspect ratio."""

    size: tuple[PositiveInt, PositiveInt]
    filter: Filter = BICUBIC

    def sized(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.size

    def read(self, image: Image.Image) -> np.ndarray:
        return resize(image, self.size, self.filter)

    def to_hf(self) -> dict[str, Any]:
        size = dict(zip(("height", "width"), self.size))
        return {"image_processor_type": "SiglipImageProcessor", "resample": self.filter, "size": size}


@dataclass(frozen=True)
class Keep(Whole):
    """Rule of SigLIP 2 (NaFlex): keeps the aspect ratio, with at most `patches` patches."""

    patch: PositiveInt
    patches: PositiveInt
    filter: Filter = BILINEAR

    def within(self, limit: float) -> "Keep":
        return replace(self, patches=max(1, int(min(self.patches, limit // self.patch**2))))

    def sized(self, size: tuple[int, int]) -> tuple[int, int]:
        return naflex_size(*size, self.patch, self.patches)

    def read(self, image: Image.Image) -> np.ndarray:
        return resize(image, self.sized((image.height, image.width)), self.filter)

    def to_hf(self) -> dict[str, Any]:
        sizes = {"patch_size": self.patch, "max_num_patches": self.patches}
        return {"image_processor_type": "Siglip2ImageProcessor", "resample": self.filter, **sizes}


@dataclass(frozen=True)
class Square(Whole):
    """Rule of LLaVA 1.5 (arXiv 2310.03744): centers the image on a square of `color`, resized to `side`."""

    side: PositiveInt
    color: Color

    def sized(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.side, self.side

    def read(self, image: Image.Image) -> np.ndarray:
        long = max(image.size)
        check_bytes(4 * long**2, f"{image.width}x{image.height} pixels on a square")
        square = Image.new("RGB", (long, long), self.color)
        square.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
        return resize(square, self.sized(image.size))

    def to_hf(self) -> dict[str, Any]:
        crop = Crop(self.side, self.sized((0, 0))).to_hf()
        return crop | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}


@dataclass(frozen=True)
class EndedSquare(Square):
    """Rule of LLaVA-OneVision for one of several images: a square followed by a NEWLINE."""

    def order(self, size: tuple[int, int], factor: int) -> np.ndarray:
        return np.append(super().order(size, factor), np.int32(NEWLINE))


@dataclass(frozen=True)
class Halved(Stretch):
    """Rule of LLaVA-OneVision for video frames: halves the rows and columns of the grid of visual tokens."""

    def order(self, size: tuple[int, int], factor: int) -> np.ndarray:
        return self._tokens(factor).order

    def mix(self, size: tuple[int, int], factor: int) -> TokenBlend:
        return self._tokens(factor).mix

    def _tokens(self, factor: int) -> Tokens:
        rows, columns = (side // factor for side in self.size)
        grid = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
        return joined([resampled(grid, (-(-rows // 2), -(-columns // 2)))])


def mean_color(mean: Iterable[float]) -> tuple[int, int, int]:
    """Returns the RGB color (0 to 255) that normalization with `mean` maps to zero."""
    red, green, blue = (int(255 * value) for value in mean)
    return red, green, blue


def rule_from_hf(config: Mapping[str, Any]) -> Rule:
    """Returns the rule of a preprocessor_config.json. Raises ValueError for an unsupported one."""
    if "max_num_patches" in config:
        return Keep(config.get("patch_size", 16), config["max_num_patches"], config.get("resample", BILINEAR))
    size, crop, filter = config.get("size"), config.get("crop_size"), config.get("resample", BICUBIC)
    size = {"shortest_edge": size} if isinstance(size, int) else size or {}  # an int before transformers 4.22
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if "shortest_edge" in size and config.get("do_pad") and config.get("image_mean"):
        return Square(size["shortest_edge"], mean_color(config["image_mean"]))
    if "shortest_edge" in size and (crop or {}).keys() >= {"height", "width"} and config.get("do_center_crop", True):
        return Crop(size["shortest_edge"], (crop["height"], crop["width"]), filter)
    if size.keys() >= {"height", "width"} and not config.get("do_center_crop", False):
        return Stretch((size["height"], size["width"]), filter)
    raise ValueError(
        f"preprocessor_config.json: size={config.get('size')} and crop_size={crop} are not supported. Set "
        "size.shortest_edge with crop_size (CLIP), size.height and size.width (SigLIP) or max_num_patches (SigLIP 2)."
    )
