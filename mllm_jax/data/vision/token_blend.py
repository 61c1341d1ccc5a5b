"""Orders of visual tokens in the text, and resampled grids of them, in which each token is a mean of four. numpy only.

An order is i32[m] of indices of visual tokens, or NEWLINE. The TokenBlend of an order, if any, contains the three
further tokens of each mean and the four weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mllm_jax.types import NEWLINE, TokenBlend


class Tokens(NamedTuple):
    """Indices of the four visual tokens that are averaged in each place, and their weights."""

    index: np.ndarray  # i32[... 4]
    weight: np.ndarray  # f32[... 4]

    @property
    def order(self) -> np.ndarray:
        """i32[...] first token of each place."""
        return self.index[..., 0]

    @property
    def mix(self) -> TokenBlend:
        return TokenBlend(self.index[..., 1:], self.weight)


def alone(index: np.ndarray) -> Tokens:
    """Returns tokens without blending: index i32[...], with weight 1 for the token itself."""
    index = np.asarray(index, np.int32)
    weight = np.zeros((*index.shape, 4), np.float32)
    weight[..., 0] = 1
    return Tokens(np.repeat(index[..., None], 4, axis=-1), weight)


def resampled(grid: np.ndarray, size: tuple[int, int]) -> Tokens:
    """Resamples a grid of tokens i32[h w] to another (height, width), bilinear.

    Follows torch's `interpolate` (align_corners=False, antialias=False).
    """
    (rows, y), (columns, x) = (_taps(old, new) for old, new in zip(grid.shape, size))
    index = grid[rows[:, None, :, None], columns[None, :, None, :]]
    weight = y[:, None, :, None] * x[None, :, None, :]
    return Tokens(*(values.reshape(*size, 4) for values in (index, weight)))


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices i32[new 2] and weights f32[new 2] that resample an axis of length `old` to `new` linearly.

    Example: from 4 to 2, indices [[0, 1], [2, 3]] with all weights 0.5.
    """
    at = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    first = at.astype(np.int32)
    fraction = (at - first).astype(np.float32)
    return np.stack([first, np.minimum(first + 1, old - 1)], axis=-1), np.stack([1 - fraction, fraction], axis=-1)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Flattens all parts and concatenates them."""
    return Tokens(*(np.concatenate([values.reshape(-1, 4) for values in field]) for field in zip(*parts)))


def end_rows(tokens: Tokens) -> Tokens:
    """Appends a NEWLINE to every row of a grid [h w]."""
    ends = alone(np.full((len(tokens.index), 1), NEWLINE))
    return Tokens(*(np.concatenate(both, axis=1) for both in zip(tokens, ends)))


def shifted(index: np.ndarray, first: int) -> np.ndarray:
    """Adds `first` to the indices of tokens; negative values (text, NEWLINE) are unchanged."""
    return np.where(index < 0, index, index + first)


def spread(
    visual: np.ndarray, runs: Sequence[tuple[np.ndarray, TokenBlend | None]], firsts: Sequence[int]
) -> tuple[np.ndarray, TokenBlend | None]:
    """Returns `vision_index` and `mix` of all tokens of a conversation.

    Args:
      visual: bool[n] positions of visual tokens.
      runs: order and mix of each run of visual tokens.
      firsts: offset that is added to the indices of each run.
    """
    index = np.full(len(visual), -1, np.int32)
    index[visual] = np.concatenate([np.zeros(0, int), *(shifted(run[0], first) for run, first in zip(runs, firsts))])
    if all(mix is None for _, mix in runs):
        return index, None
    mixes = [alone(order).mix if mix is None else mix for order, mix in runs]
    blend = alone(index).mix
    blend.index[visual] = np.concatenate([shifted(mix.index, first) for mix, first in zip(mixes, firsts)])
    blend.weight[visual] = np.concatenate([mix.weight for mix in mixes])
    return index, blend
