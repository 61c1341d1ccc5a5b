"""Read the arrays of Hugging Face's processors: images and videos to VisionSpans, for several families."""

from typing import Any

import numpy as np
from einops import rearrange

from mllm_jax.data.pipeline.hf_inputs import Arrays
from mllm_jax.data.vision.positions import in_a_line, on_a_grid
from mllm_jax.types import ImagePatches, TokenBlend, VisionSpan


def read_videos(arrays: Arrays, pixels: str, grids: str) -> list[tuple[ImagePatches, ...]]:
    """Returns the temporal patches of each image or video in arrays of Qwen's processors.

    Args:
      pixels: name of the patches f[patches C], merge-block-major.
      grids: name of the grids i[videos 3], (t, h, w) in patches.
    Raises:
      ValueError: one of the arrays is missing, or the grids do not add up to the number of patches.
    """
    if (pixels in arrays) != (grids in arrays):
        raise ValueError(f"{pixels}, {grids}: only one of them is given. Pass both.")
    videos, start = [], 0
    for t, h, w in arrays.get(grids, np.zeros((0, 3), int)).tolist():
        patches = arrays[pixels][start : start + t * h * w].astype(np.float32).reshape(t, h * w, -1)
        videos.append(tuple(ImagePatches(patch, (h, w), time) for time, patch in enumerate(patches)))
        start += t * h * w
    if pixels in arrays and start != len(arrays[pixels]):
        raise ValueError(
            f"{grids}: adds up to {start} patches, but {pixels} has {len(arrays[pixels])}. Pass both complete."
        )
    return videos


def one_by_one(images: tuple[ImagePatches, ...], merge: int, times: tuple[int, ...] = (0,)) -> VisionSpan:
    """Returns all visual tokens of images of one size, in order, with the rotary positions of a grid.

    Args:
      merge: patches per side of a visual token.
      times: temporal positions of the images.
    """
    height, width = (side // merge for side in images[0].grid)
    position, advance = on_a_grid(height, width, times)
    return VisionSpan(images, np.arange(len(position)), position, advance)


def counted_like_text(images: tuple[ImagePatches, ...], order: np.ndarray, mix: TokenBlend | None = None) -> VisionSpan:
    """Returns visual tokens in the given order, with the rotary positions that text tokens would have."""
    return VisionSpan(images, np.asarray(order, np.int32), *in_a_line(len(order)), mix)


def whole(config: Any, pixels: np.ndarray) -> VisionSpan:
    """Returns the visual tokens of an untiled image or of one tile: pixels [c h w]; `config` is a ModelConfig."""
    image = cut(pixels, config.encoder.patch_size, config.num_prefix_tokens, config.merge)
    image = image._replace(shows_prefix_tokens=config.inputs.shows_prefix_tokens)
    return counted_like_text((image,), np.arange(image.num_tokens(config.merge, config.queries)))


def untiled(config: Any, arrays: Arrays) -> list[VisionSpan]:
    """Returns the images, or tiles with placeholders of their own, in `pixel_values` f[images c h w]."""
    return [whole(config, pixels) for pixels in arrays.get("pixel_values", ())]


def cut(pixels: np.ndarray, patch: int, lead: int, merge: int = 1) -> ImagePatches:
    """Returns the patches of an image f[c h w], merge-block-major, after `lead` zero patches for prefix tokens.

    A remainder of less than `patch * merge` pixels per side is dropped.
    """
    rows, columns = (side // (patch * merge) for side in pixels.shape[1:])
    cropped = pixels[:, : rows * patch * merge, : columns * patch * merge].astype(np.float32)
    patches = rearrange(
        cropped,
        "c (row m1 y) (column m2 x) -> (row column m1 m2) (c y x)",
        m1=merge, m2=merge, y=patch, x=patch,
    )  # fmt: skip
    empty = np.zeros((lead, patches.shape[1]), np.float32)
    return ImagePatches(np.concatenate([empty, patches]), (rows * merge, columns * merge))
