"""Rotary positions (t, y, x) of a conversation's tokens."""

from collections.abc import Sequence

import numpy as np

Block = tuple[np.ndarray, int]  # positions i32[m 3] of a run of visual tokens relative to its start, and its advance


def rotary_positions(visual: np.ndarray, blocks: Sequence[Block]) -> np.ndarray:
    """Returns the positions i32[n 3] of text and visual tokens, which `visual` bool[n] marks.

    A text token at counter p has position p on all three axes and increments the counter. A block of visual tokens at
    counter p has p added to its positions and adds its advance to the counter. Blocks fill the visual tokens in order,
    with or without text between them. Example: text, `on_a_grid(1, 2)`, text:

        (0, 0, 0)   (1, 1, 1) (1, 1, 2)   (3, 3, 3)

    Raises ValueError if the counts disagree, or if text interrupts a block.
    """
    lengths = np.array([len(position) for position, _ in blocks], np.int64)
    slots = np.flatnonzero(visual)
    if lengths.sum() != len(slots):
        raise ValueError(f"the text has {len(slots)} visual tokens, but the images have {lengths.sum()}")
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
    """Returns a block of `count` visual tokens with the positions of text."""
    return np.repeat(np.arange(count)[:, None], 3, axis=1), count


def on_a_grid(height: int, width: int, times: Sequence[int] = (0,)) -> Block:
    """Returns the block of an image, or of a video with temporal patches at `times` (arXiv 2409.12191, section 2.1).

    Its advance is the largest position on any axis plus one.
    """
    t, y, x = (axis.ravel() for axis in np.meshgrid(times, np.arange(height), np.arange(width), indexing="ij"))
    return np.stack([t, y, x], axis=1), max(height, width, int(max(times)) + 1)


def patch_positions(count: int, rate: float, seconds: float) -> list[int]:
    """Returns t of `count` temporal patches, `seconds` apart, at `rate` positions per second; rate 0: 0, 1, 2 ..."""
    return [int(index * rate * seconds) if rate else index for index in range(count)]
