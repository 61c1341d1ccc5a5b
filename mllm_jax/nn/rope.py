"""Rotary positions in any number of axes: text, M-RoPE and the 2-D positions of patches are one function.

Every frequency slot reads one axis of the position. Chunked or interleaved M-RoPE and 2-D RoPE differ only in which.
"""

import jax.numpy as jnp
import numpy as np


def interleaved_axes(sections: tuple[int, ...]) -> np.ndarray:
    """Axis of each slot for Qwen3-VL's interleaved M-RoPE (arXiv 2511.21631): t h w t h w ..., what is left over is t.

    `sections` counts the slots of (t, h, w), e.g. (24, 20, 20). Returns int[sum(sections)].
    """
    axes = np.zeros(sum(sections), np.int32)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def rope_table(position, axes: np.ndarray, frequencies: np.ndarray):
    """Cosines and sines of every slot.

    Args:
      position: [... A] rotary positions on A axes.
      axes: int[H/2] the axis that each frequency slot reads.
      frequencies: f32[H/2] radians per position.
    Returns:
      (cos, sin), each f32[... H/2].
    """
    angle = jnp.take(position, jnp.asarray(axes), axis=-1).astype(jnp.float32) * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x, table):
    """Rotate x [... T N H] by a table of [... T H/2]; the pairs are (i, i + H/2), as in GPT-NeoX."""
    cos, sin = (part[..., None, :] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
