"""Rules by which an image gets a size that a tower reads: cut from its middle, pulled to a square, or as it is."""

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

Filter = Annotated[int, Range(least=0, most=5)]  # of PIL
Level = Annotated[int, Range(least=0, most=255)]
Color = tuple[Level, Level, Level]
BILINEAR, BICUBIC = int(Image.Resampling.BILINEAR), int(Image.Resampling.BICUBIC)


def resize(image: Image.Image, size: tuple[int, int], filter: int = BICUBIC) -> np.ndarray:
    """An RGB image at `size` (height, width): u8[h w 3]."""
    height, width = size
    return np.asarray(image.resize((width, height), Image.Resampling(filter)))


def short_edge_size(height: int, width: int, edge: int) -> tuple[int, int]:
    """(height, width) of the same aspect ratio, the short side `edge` pixels, the long one rounded down.

    Raises ValueError if one side is more than 200 times the other: enlarged, it would fill the memory.
    """
    short, long = sorted((height, width))
    if long > MAX_ASPECT * short:
        raise ValueError(f"an image of {width}x{height} has an aspect ratio over {MAX_ASPECT}")
    sides = {short: edge, long: edge * long // short}
    return sides[height], sides[width]


def center_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle (height, width) of pixels [h w c]; where there are fewer, black pixels are put around them."""
    missing = [max(wanted - side, 0) for side, wanted in zip(pixels.shape, size)]
    pixels = np.pad(pixels, [*((-(-count // 2), count // 2) for count in missing), (0, 0)])
    top, left = ((side - wanted) // 2 for side, wanted in zip(pixels.shape, size))
    return pixels[top : top + size[0], left : left + size[1]]


def naflex_size(height: int, width: int, patch: int, patches: int) -> tuple[int, int]:
    """The largest (height, width) of whole patches with nearly this aspect ratio, of at most `patches` patches.

    The rule of NaFlex (SigLIP 2, arXiv 2502.14786): a scale is found by bisection, sides are rounded up.
    """
    low, high, precision = 1e-6, 100.0, 1e-5

    def at(scale: float) -> tuple[int, int]:
        return tuple(max(patch, math.ceil(side * scale / patch) * patch) for side in (height, width))

    while high - low >= precision:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(at(middle)) <= patches * patch**2 else (low, middle)
    return at(low)


class Rule(Config):
    """Resizing of an image, to one or several (data/vision/tiles.py), and selection of their visual tokens."""

    def among(self, count: int) -> "Rule":
        """The rule for each of several images of a conversation."""
        del count
        return self

    def within(self, limit: float) -> "Rule":
        """The same rule for images of at most this many pixels, as far as it can shrink them."""
        del limit
        return self

    def mix(self, size: tuple[int, int], factor: int) -> TokenBlend | None:
        """Blend of the visual tokens of `order`. None: there is no blend."""
        del size, factor


class Whole(Rule):
    """A rule that makes one image of an image: `sized` returns its size, `read` its pixels u8[h w 3]."""

    def sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """(height, width) of all images that an image of this size becomes."""
        return (self.sized(size),)

    def order(self, size: tuple[int, int], factor: int) -> np.ndarray:
        """Order of visual tokens in the text, with tokens of `factor` pixels a side: i32[m]."""
        return np.arange(math.prod(side // factor for side in self.sized(size)), dtype=np.int32)

    def images(self, image: Image.Image) -> Iterator[np.ndarray]:
        """u8[h w 3] of all of them."""
        yield self.read(image)


@dataclass(frozen=True)
class Crop(Whole):
    """CLIP's: the short side to `edge`, then the middle `size` of it."""

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
    """SigLIP's: all of it, whatever its aspect ratio."""

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
    """The rule of SigLIP 2's NaFlex: the full image, in its aspect ratio, in at most this many patches."""

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
    """LLaVA 1.5's (arXiv 2310.03744): put in the middle of a square of a color."""

    side: PositiveInt
    color: Color

    def sized(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.side, self.side

    def read(self, image: Image.Image) -> np.ndarray:
        long = max(image.size)
        check_bytes(4 * long**2, f"{image.width}x{image.height} pixels on a square")
        laid = Image.new("RGB", (long, long), self.color)
        laid.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
        return resize(laid, self.sized(image.size))

    def to_hf(self) -> dict[str, Any]:
        crop = Crop(self.side, self.sized((0, 0))).to_hf()
        return crop | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}


@dataclass(frozen=True)
class EndedSquare(Square):
    """LLaVA-OneVision's for one of several images: a NEWLINE ends it."""

    def order(self, size: tuple[int, int], factor: int) -> np.ndarray:
        return np.append(super().order(size, factor), np.int32(NEWLINE))


@dataclass(frozen=True)
class Halved(Stretch):
    """LLaVA-OneVision's for frames of videos: of the grid of visual tokens half as many rows and columns, resampled."""

    def order(self, size: tuple[int, int], factor: int) -> np.ndarray:
        return self._tokens(factor).order

    def mix(self, size: tuple[int, int], factor: int) -> TokenBlend:
        return self._tokens(factor).mix

    def _tokens(self, factor: int) -> Tokens:
        rows, columns = (side // factor for side in self.size)
        grid = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
        return joined([resampled(grid, (-(-rows // 2), -(-columns // 2)))])


def mean_color(mean: Iterable[float]) -> tuple[int, int, int]:
    """The color, in 0..255, that a tower normalizes to zero."""
    red, green, blue = (int(255 * value) for value in mean)
    return red, green, blue


def rule_from_hf(config: Mapping[str, Any]) -> Rule:
    """The rule that a preprocessor_config.json states. ValueError for one that is not known here."""
    if "max_num_patches" in config:
        return Keep(config.get("patch_size", 16), config["max_num_patches"], config.get("resample", BILINEAR))
    size, crop, filter = config.get("size"), config.get("crop_size"), config.get("resample", BICUBIC)
    size = {"shortest_edge": size} if isinstance(size, int) else size or {}  # a number before transformers 4.22
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if "shortest_edge" in size and config.get("do_pad") and config.get("image_mean"):
        return Square(size["shortest_edge"], mean_color(config["image_mean"]))
    if "shortest_edge" in size and (crop or {}).keys() >= {"height", "width"} and config.get("do_center_crop", True):
        return Crop(size["shortest_edge"], (crop["height"], crop["width"]), filter)
    if size.keys() >= {"height", "width"} and not config.get("do_center_crop", False):
        return Stretch((size["height"], size["width"]), filter)
    raise ValueError(
        "a preprocessor_config.json must state size.shortest_edge with crop_size (CLIP), size.height and size.width "
        f"(SigLIP) or max_num_patches (SigLIP 2); this one has size={config.get('size')}, crop_size={crop}"
    )
