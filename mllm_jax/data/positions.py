"""Rotary positions (t, y, x) of a conversation's tokens."""

from collections.abc import Sequence

import numpy as np


def mrope_positions(visual: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Multimodal rotary positions as in Qwen3-VL (arXiv 2511.21631): visual bool[n] to i32[n 3].

    A text token at counter p has position p on all three axes. A picture at counter p has t = p, y = p + row,
    x = p + column, and moves the counter on by its longer side. Every temporal patch of a clip is a picture.
    `grids`: (height, width) in visual tokens, of the pictures in the order in which they consume the visual tokens
    (pictures may follow one another without text between them). Raises ValueError if the counts disagree, or if text
    interrupts a picture.
    """
    grids = np.asarray(grids, np.int64).reshape(-1, 2)
    lengths = grids.prod(axis=1)
    slots = np.flatnonzero(visual)
    if lengths.sum() != len(slots):
        raise ValueError(f"{len(slots)} visual tokens in the text, but the pictures have {lengths.sum()}")
    ends = np.cumsum(lengths)
    starts = ends - lengths
    if len(grids) and np.any(slots[ends - 1] - slots[starts] != lengths - 1):
        raise ValueError("text stands between the visual tokens of one picture")
    image = np.repeat(np.arange(len(grids)), lengths)
    row, column = np.divmod(np.arange(len(slots)) - starts[image], grids[image, 1])

    # The counter advances by one after a text token, and by the longer side after the last token of a picture.
    advance = np.where(visual, 0, 1)
    advance[slots[ends - 1]] = grids.max(axis=1)
    counter = np.cumsum(advance) - advance
    position = np.repeat(counter[:, None], 3, axis=1)
    position[slots, 1] += row
    position[slots, 2] += column
    return position.astype(np.int32)
