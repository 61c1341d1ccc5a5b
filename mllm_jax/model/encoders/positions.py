"""Positions of patches: a learned table resampled to images of any size, and rotary positions.

Sizes are traced values, so that one program serves all images. An image as large as the table reads it unchanged.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mllm_jax.nn.rope import rope_table


def resample(table, coords, grid, kind: str):
    """A learned table [Y X D], Y = X, at every patch of images of any size.

    Args:
      coords: i32[... 3] (t, y, x); grid: i32[... 2] (h, w) of the patch's image.
      kind: "bilinear_aligned", whose corners are those of the table; or, as torch's `interpolate` without aligned
        corners, "bicubic", or "bilinear_antialias" and "bicubic_antialias", which average where images are smaller.
    Returns:
      f32[... D].
    """
    return RESAMPLING[kind](table, coords[..., 1:], grid)


def _aligned(table, places, grid):
    """Gathers four entries a patch: for large tables and rows, weights of all entries would be larger than features."""
    side = table.shape[0]
    source = places * ((side - 1) / jnp.maximum(grid - 1, 1).astype(jnp.float32))
    low = jnp.floor(source).astype(jnp.int32)
    high = jnp.minimum(low + 1, side - 1)
    fraction = source - low
    flat = rearrange(table, "Y X D -> (Y X) D")

    def corner(y, x, weight_y, weight_x):
        return jnp.take(flat, y * side + x, axis=0) * (weight_y * weight_x)[..., None]

    y0, x0, y1, x1 = low[..., 0], low[..., 1], high[..., 0], high[..., 1]
    fy, fx = fraction[..., 0], fraction[..., 1]
    return (
        corner(y0, x0, 1 - fy, 1 - fx)
        + corner(y0, x1, 1 - fy, fx)
        + corner(y1, x0, fy, 1 - fx)
        + corner(y1, x1, fy, fx)
    )


def _weighted(axis_weights, table, places, grid):
    """One product with the weights of all entries: how many count depends on an image's size, this shape does not."""
    y, x = (axis_weights(places[..., axis], grid[..., axis], table.shape[axis]) for axis in (0, 1))
    weights = rearrange(y[..., :, None] * x[..., None, :], "... Y X -> ... (Y X)")
    return jnp.matmul(weights, rearrange(table, "Y X D -> (Y X) D"), precision=jax.lax.Precision.HIGHEST)


def _between(kernel, place, size, side: int):
    """f32[... side] weights of a table's entries at a place of an axis; beyond its ends it is constant."""
    source = (place + 0.5) * (side / size.astype(jnp.float32))
    weights = kernel(jnp.abs(jnp.arange(-2, side + 2) + 0.5 - source[..., None]))
    before, inside, after = jnp.split(weights, (2, side + 2), axis=-1)
    return inside.at[..., 0].add(jnp.sum(before, axis=-1)).at[..., -1].add(jnp.sum(after, axis=-1))


def _averaged(kernel, place, size, side: int):
    """f32[... side] weights of a table's entries; on a shorter axis the kernel is as wide as a place of it."""
    scale = side / size.astype(jnp.float32)
    source, width = (place + 0.5) * scale, jnp.maximum(scale, 1)
    weights = kernel(jnp.abs(jnp.arange(side) + 0.5 - source[..., None]) / width[..., None])
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _linear(distance):
    return jnp.maximum(1 - distance, 0)


def _cubic(a: float, distance):
    """Keys's convolution kernel (IEEE Transactions on Acoustics, Speech, and Signal Processing 29, 1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return jnp.where(distance <= 1, near, jnp.where(distance < 2, far, 0))


RESAMPLING = {  # the slope of a cubic kernel is torch's, which is another one with antialiasing
    "bilinear_aligned": _aligned,
    "bilinear_antialias": partial(_weighted, partial(_averaged, _linear)),
    "bicubic": partial(_weighted, partial(_between, partial(_cubic, -0.75))),
    "bicubic_antialias": partial(_weighted, partial(_averaged, partial(_cubic, -0.5))),
}


def patch_rope(coords, head_dim: int, theta: float):
    """2-D RoPE: half of the frequency slots read the row, half the column."""
    slots = head_dim // 4
    axes = np.repeat([1, 2], slots)
    frequencies = theta ** (-np.arange(slots, dtype=np.float32) / slots)
    return rope_table(coords, axes, np.tile(frequencies, 2))
