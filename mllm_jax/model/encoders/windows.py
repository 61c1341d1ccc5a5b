"""Windows of an image, which attend within themselves (Qwen2.5-VL, arXiv 2502.13923, section 2.1.1)."""

import jax
import jax.numpy as jnp


def window_segments(image, coords, grid, side: int):
    """A number for every window of every image, to be used as a segment: patches stay where they are.

    Windows begin at an image's upper left corner; those at the other edges are smaller. An image of n patches has at
    most n windows, so that counting on from the place of its first patch gives each its own number; and as these grow
    down the image, blocks of patches that share no window have ranges that do not overlap, which kernels leave out.

    Args:
      image: i32[rows P]; coords: i32[rows P 3]; grid: i32[rows P 2]: those of a `Vision`.
      side: of a window, in patches.
    Returns:
      i32[rows P], 0 = padding.
    """
    begins = jnp.diff(image, axis=1, prepend=-1) != 0
    first = jax.lax.cummax(jnp.where(begins, jnp.arange(image.shape[1]), 0), axis=1)
    across = -(-grid[..., 1] // side)
    window = coords[..., 1] // side * across + coords[..., 2] // side
    return jnp.where(image > 0, 1 + first + window, 0)
