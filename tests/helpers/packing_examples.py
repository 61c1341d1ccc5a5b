"""Conversations of random tokens and patches, as packing takes them."""

import numpy as np

from mllm_jax.types import Example, ImagePatches

MERGE = 2
VALUES = 12


def conversation(text: int, grids=(), seed=0, dtype=np.uint8) -> Example:
    """A conversation of `text` text tokens, then the images of these grids."""
    rng = np.random.default_rng(seed)
    pixels = lambda h, w: rng.integers(1, 255, (h * w, VALUES)).astype(dtype)
    images = tuple(ImagePatches(pixels(h, w), (h, w), t) for t, (h, w) in enumerate(grids))
    n = text + sum(h * w for h, w in grids) // MERGE**2
    visual = np.arange(n) >= text
    return Example(
        tokens=rng.integers(1, 100, n).astype(np.int32),
        weight=rng.random(n).astype(np.float32) + 0.5,
        position=np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1),
        vision_index=np.where(visual, np.cumsum(visual) - 1, -1),
        images=images,
    )
