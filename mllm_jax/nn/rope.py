"""Rotary positions with any number of axes, for text, M-RoPE and the 2-D positions of patches.

Every frequency slot reads one axis of the position. Chunked M-RoPE, interleaved M-RoPE and 2-D RoPE differ only in the
axis that each slot reads.

A scaling extends a model to texts longer than those of its pretraining: it changes the frequencies, and may scale the
cosines and sines (`table_scale`). If `by_length` is True, the frequencies depend on the length of the text.
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
    """Divides every frequency by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: Positive
    by_length: ClassVar[bool] = False
    table_scale: ClassVar[float] = 1.0

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """Returns f32[H/2] radians per position."""
        return (frequencies(theta, head_dim) / self.factor).astype(np.float32)


@dataclass(frozen=True)
class DynamicNtkRopeScaling(Config):
    """Increases the base for texts longer than `length` tokens ("dynamic NTK").

    The slowest slot rotates as far over such a text as it did over `length` tokens, or slightly less if `factor` is
    over 1.
    """

    factor: Positive
    length: PositiveInt
    by_length: ClassVar[bool] = True
    table_scale: ClassVar[float] = 1.0

    def frequencies(self, theta: float, head_dim: int, length):
        """Returns f32[... H/2] radians per position in texts of `length` i32[...] tokens."""
        growth = self.factor * jnp.maximum(length, self.length) / self.length - (self.factor - 1)
        base = theta * growth[..., None] ** (head_dim / (head_dim - 2))
        return base ** (-2 * np.arange(head_dim // 2, dtype=np.float32) / head_dim)


@dataclass(frozen=True)
class Llama3RopeScaling(Config):
    """Divides low frequencies, keeps high ones, and interpolates between (Llama 3.1).

    factor: divisor of low frequencies.
    length: pretraining length, in tokens.
    slow, fast: rotations within `length` up to which a frequency is divided, and from which it is kept.
    """

    factor: Positive
    length: PositiveInt
    slow: Positive = 1.0
    fast: Positive = 4.0
    by_length: ClassVar[bool] = False
    table_scale: ClassVar[float] = 1.0

    def frequencies(self, theta: float, head_dim: int) -> np.ndarray:
        """Returns f32[H/2] radians per position."""
        plain = frequencies(theta, head_dim)
        rotations = self.length * plain / (2 * np.pi)
        weight = np.clip((rotations - self.slow) / (self.fast - self.slow), 0, 1)
        return (plain * (weight + (1 - weight) / self.factor)).astype(np.float32)


@dataclass(frozen=True)
class LongRopeScaling(Config):
    """Divides each slot's frequency by a divisor of its own (LongRoPE, arXiv 2402.13753).

    short, long: H/2 divisors for texts up to `length` tokens, and for longer texts.
    length: pretraining length, in tokens.
    table_scale: factor of cosines and sines.
    """

    short: tuple[Positive, ...]
    long: tuple[Positive, ...]
    length: PositiveInt
    table_scale: Positive = 1.0
    by_length: ClassVar[bool] = True

    def frequencies(self, theta: float, head_dim: int, length):
        """Returns f32[... H/2] radians per position in texts of `length` i32[...] tokens."""
        plain = frequencies(theta, head_dim)
        short, long = ((plain / np.array(divisors)).astype(np.float32) for divisors in (self.short, self.long))
        return jnp.where((length > self.length)[..., None], long, short)


@dataclass(frozen=True)
class YarnRopeScaling(Config):
    """Divides low frequencies, keeps high ones, and interpolates between, linearly by slot (YaRN, arXiv 2309.00071).

    factor: ratio of the extended length to `length`.
    length: pretraining length, in tokens.
    fast, slow: rotations within `length` above which a frequency is kept, and below which it is divided.
    mscale, mscale_all_dim: coefficients of log(`factor`) in the scale of cosines and sines, and of the scores of latent
      attention (DeepSeek). 0: not set.
    attention_factor: factor of cosines and sines. None: computed from `factor`, and from both mscales if set.
    truncate: whether the ends of the interpolation are rounded to whole slots.
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
        """Returns f32[H/2] radians per position."""
        slot = lambda rotations: head_dim * math.log(self.length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
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
    """Returns f64[H/2], the radians per position of every slot (RoPE, arXiv 2104.09864)."""
    return theta ** (-2 * np.arange(head_dim // 2) / head_dim)


def interleaved_axes(sections: tuple[int, ...]) -> np.ndarray:
    """Returns int[sum(sections)], the axis of each slot of Qwen3-VL's interleaved M-RoPE (arXiv 2511.21631).

    `sections`: number of slots of (t, h, w). Example: (4, 2, 2) -> t h w t h w t t, that is [0 1 2 0 1 2 0 0].
    """
    axes = np.zeros(sum(sections), np.int32)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def chunked_axes(sections: tuple[int, ...]) -> np.ndarray:
    """Returns int[sum(sections)], the axis of each slot of Qwen2-VL's M-RoPE (arXiv 2409.12191).

    Example: (4, 2, 2) -> [0 0 0 0 1 1 2 2].
    """
    return np.repeat(np.arange(len(sections)), sections)


LAYOUTS = {"interleaved": interleaved_axes, "chunked": chunked_axes}


def rope_table(position, axes: np.ndarray, frequencies):
    """Returns cosines and sines of every slot.

    Args:
      position: [... A] rotary positions on A axes.
      axes: int[H/2] axis that each slot reads.
      frequencies: f32[H/2] radians per position, or f32[... H/2] if they differ between positions.
    Returns:
      (cos, sin), each f32[... H/2].
    """
    angle = jnp.take(position, jnp.asarray(axes), axis=-1).astype(jnp.float32) * frequencies
    return jnp.cos(angle), jnp.sin(angle)


def longest(position, segment):
    """Returns i32[B T], the length in tokens of each token's conversation: its largest position plus one.

    Positions continue after a cache, so that the length of a new token's conversation includes the cached tokens.

    Args:
      position: i32[B T A]; segment: i32[B T].
    """
    end = jnp.max(position, axis=-1) + 1
    longest_of_row = lambda end, segment: jnp.zeros(len(end) + 1, jnp.int32).at[segment].max(end)[segment]
    return jax.vmap(longest_of_row)(end, segment)


def rotate(x, table):
    """Rotates the first h values of x [... T N H] by a table (cos, sin) of [... T h/2].

    The pairs are (i, i + h/2), as in GPT-NeoX.
    """
    cos, sin = (part[..., None, :] for part in table)
    half = cos.shape[-1]
    first, second, unrotated = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated + [unrotated] * (unrotated.shape[-1] > 0), axis=-1).astype(x.dtype)
