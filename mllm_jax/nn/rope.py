"""Rotary positions in any number of axes: text, M-RoPE and the 2-D positions of patches are one function.

Every frequency slot reads one axis of the position. Chunked or interleaved M-RoPE and 2-D RoPE differ only in which.

A stretch lets a model read texts longer than those of its first training: it changes the frequencies, and may change
the size of the table (`table_scale`). Where `by_length` is True the frequencies depend on how long a text is.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.common.settings import Config, NonNegative, Positive, PositiveInt


@dataclass(frozen=True)
class LinearRopeScaling(Config):
    """Every frequency divided by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: Positive
    by_length: ClassVar[bool] = False
    table_scale: ClassVar[float] = 1.0

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """f32[H/2] radians per position."""
        return (frequencies(theta, head_dim) / self.factor).astype(np.float32)


@dataclass(frozen=True)
class DynamicNtkRopeScaling(Config):
    """A base that grows with the text beyond `length` tokens ("dynamic NTK").

    The slowest slot then rotates as far over the full text as it did over `length` tokens, and slightly less if
    `factor` is over 1.
    """

    factor: Positive
    length: PositiveInt
    by_length: ClassVar[bool] = True
    table_scale: ClassVar[float] = 1.0

    def frequencies(self, theta: float, head_dim: int, length):
        """f32[... H/2] radians per position, in texts of `length` i32[...] tokens."""
        grown = self.factor * jnp.maximum(length, self.length) / self.length - (self.factor - 1)
        base = theta * grown[..., None] ** (head_dim / (head_dim - 2))
        return base ** (-2 * np.arange(head_dim // 2, dtype=np.float32) / head_dim)


@dataclass(frozen=True)
class Llama3RopeScaling(Config):
    """Slots of short waves keep their frequency, of long waves have it divided, those between have a blend (Llama 3.1).

    factor: by how much slow frequencies are divided.
    length: tokens of the texts of the first training.
    slow, fast: turns within `length` up to which a frequency is divided, and from which on it is kept.
    """

    factor: Positive
    length: PositiveInt
    slow: Positive = 1.0
    fast: Positive = 4.0
    by_length: ClassVar[bool] = False
    table_scale: ClassVar[float] = 1.0

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """f32[H/2] radians per position."""
        plain = frequencies(theta, head_dim)
        turns = self.length * plain / (2 * np.pi)
        kept = np.clip((turns - self.slow) / (self.fast - self.slow), 0, 1)
        return (plain * (kept + (1 - kept) / self.factor)).astype(np.float32)


@dataclass(frozen=True)
class LongRopeScaling(Config):
    """A divisor per slot, one list for texts up to `length` tokens, one for longer ones (LongRoPE, arXiv 2402.13753).

    short, long: H/2 divisors.
    table_scale: of cosines and sines.
    """

    short: tuple[Positive, ...]
    long: tuple[Positive, ...]
    length: PositiveInt
    table_scale: Positive = 1.0
    by_length: ClassVar[bool] = True

    def frequencies(self, theta: float, head_dim: int, length):
        """f32[... H/2] radians per position, in texts of `length` i32[...] tokens."""
        plain = frequencies(theta, head_dim)
        short, long = ((plain / np.array(divisors)).astype(np.float32) for divisors in (self.short, self.long))
        return jnp.where((length > self.length)[..., None], long, short)


@dataclass(frozen=True)
class YarnRopeScaling(Config):
    """Rotary positions extended beyond the length of pretraining (YaRN, arXiv 2309.00071).

    Fast slots keep their frequency, slow slots have it divided, slots between have a blend.

    factor: ratio of the extended length to `length`.
    length: length of pretraining, in tokens.
    fast, slow: rotations within `length` above which a frequency is kept, and below which it is divided.
    mscale, mscale_all_dim: weights of the logarithm of `factor` in the sizes of the cosines and sines, and of the
      scores of latent attention (DeepSeek). 0: not set.
    attention_factor: factor of cosines and sines. None: follows from `factor` and, if both are set, the two above.
    truncate: whether both ends of the blend are rounded to whole slots.
    """

    factor: Positive
    length: PositiveInt
    fast: Positive = 32.0
    slow: Positive = 1.0
    mscale: NonNegative = 0.0
    mscale_all_dim: NonNegative = 0.0
    attention_factor: Positive | None = None
    truncate: bool = True
    by_length: ClassVar[bool] = False

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """f32[H/2] radians per position."""
        slot = lambda turns: head_dim * math.log(self.length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        first, last = slot(self.fast), slot(self.slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        divided = np.clip((np.arange(head_dim // 2) - first) / ((last - first) or 1e-3), 0, 1)
        return (frequencies(theta, head_dim) * (1 - divided + divided / self.factor)).astype(np.float32)

    @property
    def table_scale(self) -> float:
        """Factor of cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    @property
    def score_scale(self) -> float:
        """Factor of the scores of latent attention, in addition to 1 / sqrt(H)."""
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


def chunked_axes(sections: tuple[int, ...]) -> np.ndarray:
    """Axis of each slot for Qwen2-VL's M-RoPE (arXiv 2409.12191): those of t, of h, of w. int[sum(sections)]."""
    return np.repeat(np.arange(len(sections)), sections)


LAYOUTS = {"interleaved": interleaved_axes, "chunked": chunked_axes}


def rope_table(position, axes: np.ndarray, frequencies):
    """Cosines and sines of every slot.

    Args:
      position: [... A] rotary positions on A axes.
      axes: int[H/2] the axis that each frequency slot reads.
      frequencies: f32[H/2] radians per position, or f32[... H/2] where it is not the same everywhere.
    Returns:
      (cos, sin), each f32[... H/2].
    """
    angle = jnp.take(position, jnp.asarray(axes), axis=-1).astype(jnp.float32) * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def longest(position, segment):
    """i32[B T] tokens of the conversation that a token belongs to, from positions i32[B T A] and segments i32[B T].

    Of what stands here: a token that continues a cache counts itself and what came before.
    """
    end = jnp.max(position, axis=-1) + 1
    most = lambda end, segment: jnp.zeros(len(end) + 1, jnp.int32).at[segment].max(end)[segment]
    return jax.vmap(most)(end, segment)


def rotate(x, table):
    """Rotate x [... T N H] by a table of [... T h/2]; the pairs are (i, i + h/2), as in GPT-NeoX, of the first h."""
    cos, sin = (part[..., None, :] for part in table)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned + [rest] * (rest.shape[-1] > 0), axis=-1).astype(x.dtype)
