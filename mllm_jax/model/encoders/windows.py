"""Window attention of vision transformers (Qwen2.5-VL, arXiv 2502.13923, section 2.1.1)."""

import jax
import jax.numpy as jnp


def window_segments(image, coords, grid, side: int):
    """Numbers the windows of all images, for use as attention segments; patches are not reordered.

    Windows start at an image's upper left corner; those at the right and lower edges may be smaller. The number of a
    window is its index in the image (row by row) plus 1 plus the column of the image's first patch. Numbers are unique,
    because an image of n patches has at most n windows. They grow down the image, so that blocks of patches without a
    common window have disjoint ranges, which attention kernels skip.

    Example: side=2, an image of 2 x 4 patches and one of 1 x 2, each with its patches in row-major order
    -> [1 1 2 2 1 1 2 2 9 9].

    Args:
      image, coords, grid: i32[rows P], i32[rows P 3] and i32[rows P 2], fields of `Vision`.
      side: side of a window in patches.
    Returns:
      i32[rows P]. 0: padding.
    """
    starts = jnp.diff(image, axis=1, prepend=-1) != 0
    first = jax.lax.cummax(jnp.where(starts, jnp.arange(image.shape[1]), 0), axis=1)
    windows_per_row = -(-grid[..., 1] // side)
    window = coords[..., 1] // side * windows_per_row + coords[..., 2] // side
    return jnp.where(image > 0, 1 + first + window, 0)
