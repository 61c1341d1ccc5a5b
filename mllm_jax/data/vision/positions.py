"""Rotary positions (t, y, x) of a conversation's tokens."""

from collections.abc import Sequence

import numpy as np

Block = tuple[np.ndarray, int]  # positions i32[m 3] of a run of visual tokens, and of what follows, from its first


def rotary_positions(visual: np.ndarray, blocks: Sequence[Block]) -> np.ndarray:
    """Positions of text and of what stands in it: visual bool[n] to i32[n 3].

    A text token at counter p has position p on all three axes and moves the counter on by one. A block of visual tokens
    at counter p has p added to its positions, and moves the counter on by its second part.
    `blocks`: in the order in which they take the visual tokens; they may follow one another without text between them.
    Raises ValueError if the counts disagree, or if text interrupts a block.
    """
    lengths = np.array([len(position) for position, _ in blocks], np.int64)
    slots = np.flatnonzero(visual)
    if lengths.sum() != len(slots):
        raise ValueError(f"{len(slots)} visual tokens in the text, but the images have {lengths.sum()}")
    ends = np.cumsum(lengths)
    if len(blocks) and np.any(slots[ends - 1] - slots[ends - lengths] != lengths - 1):
        raise ValueError("text is between the visual tokens of one image")
    advance = np.where(visual, 0, 1)
    advance[slots[ends - 1]] = [advance for _, advance in blocks]
    counter = np.cumsum(advance) - advance
    position = np.repeat(counter[:, None], 3, axis=1)
    if len(blocks):
        position[slots] += np.concatenate([position for position, _ in blocks])
    return position.astype(np.int32)


def in_a_line(count: int) -> Block:
    """Visual tokens that are counted like text."""
    return np.repeat(np.arange(count)[:, None], 3, axis=1), count


def on_a_grid(height: int, width: int, times: Sequence[int] = (0,)) -> Block:
    """Rows and columns of an image, or of a video whose temporal patches stand at `times` (arXiv 2409.12191, 2.1).

    What follows comes after the largest position on any axis.
    """
    t, y, x = (axis.ravel() for axis in np.meshgrid(times, np.arange(height), np.arange(width), indexing="ij"))
    return np.stack([t, y, x], axis=1), max(height, width, int(max(times)) + 1)


def patch_positions(count: int, rate: float, seconds: float) -> list[int]:
    """Rotary positions of a video's temporal patches, `seconds` apart, at `rate` per second. rate 0: one per patch."""
    return [int(index * rate * seconds) if rate else index for index in range(count)]
