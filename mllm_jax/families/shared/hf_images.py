"""Arrays of Hugging Face's processors, for families that share a layout of them."""

from typing import Any

import numpy as np
from einops import rearrange

from mllm_jax.data.pipeline.hf_inputs import Arrays
from mllm_jax.data.vision.positions import in_a_line, on_a_grid
from mllm_jax.types import ImagePatches, TokenBlend, VisionSpan


def read_videos(arrays: Arrays, pixels: str, grids: str) -> list[tuple[ImagePatches, ...]]:
    """Images and clips of Qwen's processors, as their temporal patches.

    Args:
      pixels: name of f[patches C], merge-block-major.
      grids: name of i[clips 3], (t, h, w) in patches.
    """
    if (pixels in arrays) != (grids in arrays):
        raise ValueError(f"{pixels} and {grids} belong together; only one was given")
    videos, start = [], 0
    for t, h, w in arrays.get(grids, np.zeros((0, 3), int)).tolist():
        patches = arrays[pixels][start : start + t * h * w].astype(np.float32).reshape(t, h * w, -1)
        videos.append(tuple(ImagePatches(patch, (h, w), time) for time, patch in enumerate(patches)))
        start += t * h * w
    if pixels in arrays and start != len(arrays[pixels]):
        raise ValueError(f"{grids} counts {start} patches, {pixels} has {len(arrays[pixels])}")
    return videos


def one_by_one(images: tuple[ImagePatches, ...], merge: int, times: tuple[int, ...] = (0,)) -> VisionSpan:
    """All visual tokens of images of one size, in their order, with the rotary positions of a grid."""
    height, width = (side // merge for side in images[0].grid)
    position, advance = on_a_grid(height, width, times)
    return VisionSpan(images, np.arange(len(position)), position, advance)


def counted_like_text(images: tuple[ImagePatches, ...], order: np.ndarray, mix: TokenBlend | None = None) -> VisionSpan:
    """Visual tokens in a given order, with the rotary positions that text in their place would have."""
    return VisionSpan(images, np.asarray(order, np.int32), *in_a_line(len(order)), mix)


def whole(config: Any, pixels: np.ndarray) -> VisionSpan:
    """An image, or a tile, that is read as one: pixels [c h w]; `config` is a ModelConfig."""
    image = cut(pixels, config.encoder.patch_size, config.num_prefix_tokens, config.merge)
    image = image._replace(shows_prefix_tokens=config.inputs.shows_prefix_tokens)
    return counted_like_text((image,), np.arange(image.num_tokens(config.merge, config.queries)))


def cut(pixels: np.ndarray, patch: int, lead: int, merge: int = 1) -> ImagePatches:
    """An image of pixels f[c h w] -> patches, merge-block-major, with `lead` empty ones before them.

    What is left over of its sides is not read.
    """
    rows, columns = (side // (patch * merge) for side in pixels.shape[1:])
    whole = pixels[:, : rows * patch * merge, : columns * patch * merge].astype(np.float32)
    patches = rearrange(
        whole,
        "c (row m1 y) (column m2 x) -> (row column m1 m2) (c y x)",
        m1=merge, m2=merge, y=patch, x=patch,
    )  # fmt: skip
    empty = np.zeros((lead, patches.shape[1]), np.float32)
    return ImagePatches(np.concatenate([empty, patches]), (rows * merge, columns * merge))
