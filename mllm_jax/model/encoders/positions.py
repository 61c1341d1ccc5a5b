"""Positions of patches: a learned table resampled to images of any size, and rotary positions.

Image sizes are traced values, so that one program serves all images. An image of the table's size reads it unchanged.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mllm_jax.nn.rope import rope_table


def resample(table, coords, grid, kind: str):
    """Resamples a learned position table to the patches of images of any size.

    Args:
      table: [Y X D] with Y = X.
      coords: i32[... 3] coordinates (t, y, x) of each patch in its image.
      grid: i32[... 2] size (h, w) of each patch's image, in patches.
      kind: "bilinear_aligned" (aligned corners), or torch's `interpolate` without aligned corners: "bicubic",
        "bilinear_antialias" or "bicubic_antialias". The last two average entries if an image is smaller than the table.
    Returns:
      f32[... D].
    """
    return RESAMPLING[kind](table, coords[..., 1:], grid)


def _aligned(table, coords, grid):
    """Gathers four entries per patch: weights of all entries (`_weighted`) may take more memory than the features."""
    side = table.shape[0]
    source = coords * ((side - 1) / jnp.maximum(grid - 1, 1).astype(jnp.float32))
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


def _weighted(axis_weights, table, coords, grid):
    """Multiplies the table by weights of all its entries, so that no shape depends on the size of an image."""
    y, x = (axis_weights(coords[..., axis], grid[..., axis], table.shape[axis]) for axis in (0, 1))
    weights = rearrange(y[..., :, None] * x[..., None, :], "... Y X -> ... (Y X)")
    return jnp.matmul(weights, rearrange(table, "Y X D -> (Y X) D"), precision=jax.lax.Precision.HIGHEST)


def _between(kernel, coord, size, side: int):
    """Returns interpolation weights f32[... side] of the entries on an axis; the table is constant beyond its ends."""
    source = (coord + 0.5) * (side / size.astype(jnp.float32))
    weights = kernel(jnp.abs(jnp.arange(-2, side + 2) + 0.5 - source[..., None]))
    before, inside, after = jnp.split(weights, (2, side + 2), axis=-1)
    return inside.at[..., 0].add(jnp.sum(before, axis=-1)).at[..., -1].add(jnp.sum(after, axis=-1))


def _averaged(kernel, coord, size, side: int):
    """Returns antialiasing weights f32[... side] of the entries on an axis: smaller images have wider kernels."""
    scale = side / size.astype(jnp.float32)
    source, width = (coord + 0.5) * scale, jnp.maximum(scale, 1)
    weights = kernel(jnp.abs(jnp.arange(side) + 0.5 - source[..., None]) / width[..., None])
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _linear(distance):
    return jnp.maximum(1 - distance, 0)


def _cubic(a: float, distance):
    """Cubic convolution kernel of Keys (IEEE Transactions on Acoustics, Speech, and Signal Processing 29, 1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return jnp.where(distance <= 1, near, jnp.where(distance < 2, far, 0))


RESAMPLING = {  # cubic kernels have torch's slopes: -0.75, or -0.5 with antialiasing
    "bilinear_aligned": _aligned,
    "bilinear_antialias": partial(_weighted, partial(_averaged, _linear)),
    "bicubic": partial(_weighted, partial(_between, partial(_cubic, -0.75))),
    "bicubic_antialias": partial(_weighted, partial(_averaged, partial(_cubic, -0.5))),
}


def patch_rope(coords, head_dim: int, theta: float):
    """Returns the cosines and sines of 2-D RoPE: half of the frequencies rotate by the row, half by the column.

    Args:
      coords: i32[... 3] coordinates (t, y, x) of each patch.
      head_dim: values of a head, a multiple of 4.
      theta: base of the frequencies.
    """
    slots = head_dim // 4
    axes = np.repeat([1, 2], slots)
    frequencies = theta ** (-np.arange(slots, dtype=np.float32) / slots)
    return rope_table(coords, axes, np.tile(frequencies, 2))
