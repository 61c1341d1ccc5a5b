"""Rotary positions in any number of axes: text, M-RoPE and the 2-D positions of patches are one function.

Every frequency slot reads one axis of the position. Chunked or interleaved M-RoPE and 2-D RoPE differ only in which.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class YarnConfig:
    """Rotary positions stretched beyond the length of the first training (YaRN, arXiv 2309.00071).

    Slots that turn often keep their frequency, slots that hardly turn have it divided, those between have a blend.

    factor: by how much texts grow.
    length: tokens of the texts of the first training.
    fast, slow: turns within `length` from which on a frequency is kept, and up to which it is divided.
    mscale, mscale_all_dim: by how much the cosines and sines, and the scores of attention, grow with the logarithm of
      `factor`; the names are those of DeepSeek's config.json.
    """

    factor: float
    length: int
    fast: float = 32.0
    slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """f32[H/2] radians per position."""
        slot = lambda turns: head_dim * math.log(self.length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        first = max(math.floor(slot(self.fast)), 0)
        last = min(math.ceil(slot(self.slow)), head_dim - 1)
        divided = np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0, 1)
        return (frequencies(theta, head_dim) * (1 - divided + divided / self.factor)).astype(np.float32)

    @property
    def table_scale(self) -> float:
        """Factor of cosines and sines."""
        return self._growth(self.mscale) / self._growth(self.mscale_all_dim)

    @property
    def score_scale(self) -> float:
        """Factor of the scores of attention, beside 1 / sqrt(H)."""
        return self._growth(self.mscale_all_dim) ** 2

    def _growth(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(max(self.factor, 1)) + 1


def frequencies(theta: float, head_dim: int) -> np.ndarray:
    """f64[H/2] radians per position of every slot (RoPE, arXiv 2104.09864)."""
    return theta ** (-2 * np.arange(head_dim // 2) / head_dim)


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
