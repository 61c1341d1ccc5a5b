"""Converts still images (files, arrays or PIL images) to upright RGB and to patches. PIL and numpy only."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from mllm_jax.data.media import resolve, source_name
from mllm_jax.data.vision.image_files import open_file, orientation, truncated_image

MAX_PIXELS = 2**27  # a larger image is a decompression bomb or a mistake
MAX_BYTES = 2**29  # limit of an image's pixels and their copies; a file of 16 kB may claim any size
LARGE = 2**25  # pixels above which a JPEG may be decoded at a half, a quarter or an eighth of its sides
BAND = 2**20  # pixels that are converted at a time
BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}  # bytes per pixel by mode; default 4
DECODERS = {"AVIF": 4, "HEIF": 4, "JPEG2000": 16, "WEBP": 4}  # bytes per pixel of a decoder, in addition to PIL's image
MAX_ASPECT = 200
DISTORTED = 1.25  # largest factor by which an aspect ratio may change without counting as distorted
TRUNCATED = "rows of a truncated JPEG are missing"
TURNED = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextlib.contextmanager
def _reading(source: Any) -> Iterator[None]:
    """Names the file in errors. PIL's readers raise anything from SyntaxError to struct.error on a damaged file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{source_name(source)}: not a readable image ({error})") from error


def open_image(source: Any) -> Image.Image:
    """Opens an image without decoding its pixels (a file's header is enough for `upright_size`).

    `source`: a path, the bytes of a file, a PIL image, or an array u8[h w], u8[h w 1], u8[h w 3] or u8[h w 4].
    Raises ValueError, naming the file, if it is no image or too large; FileNotFoundError if it is missing.
    """
    source = resolve(source)
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.shape[2:] not in ((), (1,), (3,), (4,)):
            raise ValueError(f"an image array must be u8[h w], or u8[h w 1|3|4], got {source.dtype}{source.shape}")
        return Image.fromarray(source[..., 0] if source.shape[2:] == (1,) else source)
    if not isinstance(source, (str, os.PathLike, bytes)):
        raise ValueError(f"an image must be a path, bytes, an array or a PIL image, got {type(source).__name__}")
    if not isinstance(source, bytes) and not os.path.exists(source):
        raise FileNotFoundError(f"{source_name(source)}: no such image. Correct its path.")
    with _reading(source):
        image = open_file(source)
    try:
        check_pixels(image.height, image.width)
    except ValueError as error:
        raise ValueError(f"{source_name(source)}: {error}") from error
    if not isinstance(image, JpegImageFile):  # a JPEG may be decoded at a smaller size
        with _reading(source):
            _check_memory(image)
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Returns (height, width) after the EXIF rotation, without decoding the pixels."""
    if isinstance(image, TiffImageFile):  # PIL rotates TIFF files and reports their upright size
        return image.height, image.width
    return (image.width, image.height) if orientation(image) >= 5 else (image.height, image.width)


def upright_rgb(image: Image.Image, missing_rows: float = 0.0, size: tuple[int, int] | None = None) -> Image.Image:
    """Decodes to 8-bit RGB: applies EXIF rotation, blends transparency with white, scales deep gray to 8 bits.

    Args:
      missing_rows: largest share of rows that a JPEG may lack, from 0 to 1. They are gray or lack detail, and
        `info["missing_rows"]` of the result is their share. A file that only lacks its end marker lacks no rows.
      size: (height, width) that the image is resized to next. A JPEG of more than LARGE pixels may be decoded at a
        reduced size with sides of at least twice `size`. None: full size.

    Raises:
      ValueError: the pixels cannot be decoded (a truncated or damaged file) or take more than MAX_BYTES. The message
        names the file.
    """
    with _reading(image):
        image = _decoded(image, missing_rows, size)
        if image.mode != "RGB" or image.has_transparency_data:
            image = _to_rgb(image)
        turned = TURNED.get(orientation(image))
        return image if turned is None else image.transpose(turned)


def _decoded(image: Image.Image, missing_rows: float, size: tuple[int, int] | None) -> Image.Image:
    stored = image.width * image.height
    if isinstance(image, JpegImageFile) and size is not None and stored > LARGE:
        height, width = size if orientation(image) < 5 else size[::-1]
        image.draft(None, (2 * width, 2 * height))
    _check_memory(image, stored)
    try:
        image.load()
        return image
    except OSError as error:
        if stored > LARGE or (truncated := truncated_image(image)) is None:
            raise
        decoded, missing = truncated
        if missing > missing_rows:
            raise ValueError(
                f"it is cut off: {missing:.1%} of its rows are missing, over missing_rows={missing_rows}"
            ) from error
        if missing:
            decoded.info["missing_rows"] = missing
        return decoded


def _check_memory(image: Image.Image, stored: int = 0) -> None:
    """Raises ValueError if the pixels of an image and their copies as upright RGB take more than MAX_BYTES.

    `stored`: number of pixels in the file. A progressive JPEG is held at full size even if it is decoded at another.
    """
    copies = (image.mode != "RGB" or image.has_transparency_data) + (orientation(image) != 1)
    pixel = BYTES.get(image.mode, 4) + 4 * copies + DECODERS.get(image.format, 0)
    needed = image.width * image.height * pixel
    if image.info.get("progressive") and isinstance(image, JpegImageFile):
        sampling = [across * down for _, across, down, _ in image.layer]
        needed += 2 * stored * sum(sampling) // max(sampling)
    check_bytes(needed, f"{image.width}x{image.height} pixels of mode {image.mode}")


def check_bytes(needed: int, what: str) -> None:
    """Raises ValueError if something takes more than MAX_BYTES."""
    if needed > MAX_BYTES:
        raise ValueError(f"{what} take {needed / 2**20:.0f} MB of memory, over {MAX_BYTES / 2**20:.0f}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB, in bands of rows: intermediate results take many times the memory of the image."""
    rows = max(1, BAND // image.width)
    edges = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    convert = _on_white if image.has_transparency_data else lambda band: band.convert("RGB")
    if image.mode.startswith(("I", "F")):
        peak = max((_values(image.crop(edge)).max(initial=0) for edge in edges), default=0)
        convert = lambda band: _to_8_bits(band, peak).convert("RGB")
    rgb = Image.new("RGB", image.size)
    rgb.info = dict(image.info)
    for edge in edges:
        rgb.paste(convert(image.crop(edge)), edge)
    return rgb


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _values(image: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(image, np.float64))


def _to_8_bits(image: Image.Image, peak: float) -> Image.Image:
    """Scales 16-bit, 32-bit and float gray to 8 bits; PIL's conversion clips at 255 instead."""
    if image.mode == "F":
        full = 1.0 if peak <= 1 else 255.0
    elif image.mode == "I":  # 32-bit files contain 8-bit or 16-bit gray far more often than 32-bit gray
        full = 255.0 if peak <= 255 else 65535.0
    else:
        full = 65535.0
    return Image.fromarray(np.clip(np.rint(_values(image) * (255 / full)), 0, 255).astype(np.uint8))


def load_image(source: Any, missing_rows: float = 0.0, size: tuple[int, int] | None = None) -> Image.Image:
    """Loads any supported source as an upright RGB image: `open_image`, then `upright_rgb`."""
    return upright_rgb(open_image(source), missing_rows, size)


def notes(image: Image.Image) -> list[str]:
    """Returns the defects of a loaded image, as texts that runs count."""
    return [TRUNCATED] if image.info.get("missing_rows") else []


def shrunk_size(height: int, width: int, factor: int, max_pixels: int, frames: int = 1) -> tuple[int, int]:
    """Returns (height, width) in multiples of `factor` with nearly this aspect ratio, at most `max_pixels` in `frames`.

    A side is at least `factor`, which may exceed `max_pixels`.
    """
    scale = math.sqrt((frames * height * width) / max_pixels)
    return tuple(max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))


def check_size(height: int, width: int) -> None:
    """Raises ValueError for an unsupported size: too many pixels, or an aspect ratio over MAX_ASPECT."""
    check_pixels(height, width)
    check_aspect(height, width)


def check_pixels(height: int, width: int) -> None:
    """Raises ValueError if an image has more than MAX_PIXELS pixels."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"an image of {width}x{height} has over {MAX_PIXELS} pixels")


def check_aspect(height: int, width: int) -> None:
    """Raises ValueError if one side is more than 200 times the other: resizing could enlarge it without bound."""
    if min(height, width) < 1 or max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(f"an image of {width}x{height} has an aspect ratio over {MAX_ASPECT}")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Returns the (height, width) to which Qwen2-VL (arXiv 2409.12191) resizes an image, in multiples of `factor`.

    They are close to its size and aspect ratio, with the rounding of Qwen2-VL: halves go to the even multiple. A side
    under half of `factor` becomes `factor`, as in the official code (transformers' copy rounds it to 0 and enlarges).

    Args:
      factor: side of a visual token in pixels (patch x merge).
      min_pixels: lower bound of height x width.
      max_pixels: upper bound of height x width.

    Raises:
      ValueError: one side is more than 200 times the other.
    """
    check_aspect(height, width)
    rounded = tuple(max(factor, round(side / factor) * factor) for side in (height, width))
    if math.prod(rounded) > max_pixels:
        return shrunk_size(height, width, factor, max_pixels)
    if math.prod(rounded) < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * scale / factor) * factor for side in (height, width))
    return rounded


def fitted_size(height: int, width: int, factor: int, max_pixels: float) -> tuple[int, int]:
    """Returns (height, width) for an image that must be smaller than the processor of its model would make it.

    This is `shrunk_size`, unless it changes the aspect ratio by more than DISTORTED: it rounds both sides down, so that
    a long image of 1.5 `factor` in height becomes 1 `factor` high and too long. Then the largest neighboring size with
    a better aspect ratio is used. If even one row of such a size exceeds `max_pixels`, that row is returned.

    Example: in units of `factor`, 20:1 is 1 x 20 instead of 1 x 30 within 45, and 1 x 16 instead of 1 x 4 within 1.
    """
    aspect, most = max(height, width) / min(height, width), max(1, int(max_pixels / factor**2))
    shorts = {max(1, math.floor(math.sqrt(most / aspect)) + extra) for extra in (0, 1)}
    sizes = {(short, long) for short in shorts for long in (math.floor(short * aspect), math.ceil(short * aspect))}
    sizes = {(short, min(long, most // short)) for short, long in sizes if short <= most}
    shrunk = sorted(side // factor for side in shrunk_size(height, width, factor, max_pixels))

    def distortion(size: tuple[int, int]) -> float:
        ratio = size[1] / size[0] / aspect
        return max(ratio, 1 / ratio)

    least = math.ceil(aspect / DISTORTED) if aspect >= 2 else 1  # below 2:1, a square is accepted
    if most <= least:
        short, long = 1, least
    elif math.prod(shrunk) <= most and distortion(shrunk) <= DISTORTED:
        short, long = shrunk
    else:
        good = [size for size in sizes if distortion(size) <= DISTORTED]
        short, long = max(good, key=math.prod) if good else min(sizes, key=distortion)
    return (short * factor, long * factor) if height <= width else (long * factor, short * factor)


def resized(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resizes an RGB image to `size` (height, width), bicubic: u8[h w 3]."""
    height, width = size
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def patchify(frames: np.ndarray, patch: int, temporal_patch: int, merge: int) -> np.ndarray:
    """Cuts one temporal patch of pixels into patches: u8[t h w 3], 1 <= t <= temporal_patch, to u8[p C].

    Rows are in merge-block-major order (the merge x merge patches of a visual token are adjacent, blocks row by row),
    values in (channel, time, y, x) order. Missing frames repeat the last one: a still image is one frame. Pixels beyond
    the last full block are dropped. Example, patches of a 4 x 4 grid with merge=2: 0 1 4 5, 2 3 6 7, 8 9 12 13, ...
    """
    height, width = (side // (patch * merge) * patch * merge for side in frames.shape[1:3])
    frames = frames[np.minimum(np.arange(temporal_patch), len(frames) - 1)]
    return rearrange(
        frames[:, :height, :width],
        "t (row m1 y) (column m2 x) c -> (row column m1 m2) (c t y x)",
        m1=merge, m2=merge, y=patch, x=patch,
    )  # fmt: skip


def unpatchify(patches: np.ndarray, grid: tuple[int, int], patch: int, merge: int) -> np.ndarray:
    """Inverts `patchify`: patches u8[p C] of an image of `grid` = (h, w) patches to pixels u8[t h w 3]."""
    return rearrange(
        patches,
        "(row column m1 m2) (c t y x) -> t (row m1 y) (column m2 x) c",
        row=grid[0] // merge, m1=merge, m2=merge, c=3, y=patch, x=patch,
    )  # fmt: skip
