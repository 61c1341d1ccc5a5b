"""Order of visual tokens in the text, and resampled grids, in which each token is a mean of four. numpy only.

An order is i32[m] of indices of visual tokens, or NEWLINE; its optional TokenBlend has the tokens that each is blended
with.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mllm_jax.types import NEWLINE, TokenBlend


class Tokens(NamedTuple):
    """Numbers of visual tokens, four in each place, and the shares that they have there."""

    index: np.ndarray  # i32[... 4]
    weight: np.ndarray  # f32[... 4]

    @property
    def order(self) -> np.ndarray:
        """i32[...] the first of each place."""
        return self.index[..., 0]

    @property
    def mix(self) -> TokenBlend:
        return TokenBlend(self.index[..., 1:], self.weight)


def alone(index: np.ndarray) -> Tokens:
    """The blend of every token with weight 1: index i32[...]."""
    index = np.asarray(index, np.int32)
    share = np.zeros((*index.shape, 4), np.float32)
    share[..., 0] = 1
    return Tokens(np.repeat(index[..., None], 4, axis=-1), share)


def resampled(grid: np.ndarray, size: tuple[int, int]) -> Tokens:
    """A grid of tokens i32[h w] at another (height, width), bilinear.

    Pixels are squares, as in torch's `interpolate` (align_corners=False), and what shrinks is not blurred before.
    """
    (rows, y), (columns, x) = (_taps(old, new) for old, new in zip(grid.shape, size))
    index = grid[rows[:, None, :, None], columns[None, :, None, :]]
    share = y[:, None, :, None] * x[None, :, None, :]
    return Tokens(*(values.reshape(*size, 4) for values in (index, share)))


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `new` places on an axis of `old`: the two entries that are blended, i32[new 2], and their weights."""
    at = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    first = at.astype(np.int32)
    share = (at - first).astype(np.float32)
    return np.stack([first, np.minimum(first + 1, old - 1)], axis=-1), np.stack([1 - share, share], axis=-1)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """One after the other, in a line."""
    return Tokens(*(np.concatenate([values.reshape(-1, 4) for values in field]) for field in zip(*parts)))


def end_rows(tokens: Tokens) -> Tokens:
    """A grid [h w] with a NEWLINE after every row."""
    ends = alone(np.full((len(tokens.index), 1), NEWLINE))
    return Tokens(*(np.concatenate(both, axis=1) for both in zip(tokens, ends)))


def shifted(index: np.ndarray, first: int) -> np.ndarray:
    """Numbers of tokens that are counted from the one of number `first`."""
    return np.where(index < 0, index, index + first)


def spread(
    visual: np.ndarray, runs: Sequence[tuple[np.ndarray, TokenBlend | None]], firsts: Sequence[int]
) -> tuple[np.ndarray, TokenBlend | None]:
    """`vision_index` and `mix` of all tokens of a conversation.

    Args:
      visual: bool[n] where visual tokens stand.
      runs: the order and the mix of each run of them.
      firsts: the number of the token from which each run counts.
    """
    index = np.full(len(visual), -1, np.int32)
    index[visual] = np.concatenate([np.zeros(0, int), *(shifted(run[0], first) for run, first in zip(runs, firsts))])
    if all(mix is None for _, mix in runs):
        return index, None
    mixes = [alone(order).mix if mix is None else mix for order, mix in runs]
    every = alone(index).mix
    every.index[visual] = np.concatenate([shifted(mix.index, first) for mix, first in zip(mixes, firsts)])
    every.weight[visual] = np.concatenate([mix.weight for mix in mixes])
    return index, every
