"""A few static shapes for prompts of every size, so that few programs are compiled."""

import math

import numpy as np

from mllm_jax.types import Batch, TokenBlend, Vision

TOKENS = 64  # lengths are multiples of these
PATCHES = 128  # what splash attention asks for


def bucket(size: int, unit: int = 1) -> int:
    """The smallest of unit x (1, 2, 3, 4, 6, 8, 12, 16, ...) that holds `size`: at most half is added."""
    count = math.ceil(size / unit)
    power = 1 << max(count - 1, 0).bit_length()
    return unit * (power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power)


def pad_prompts(batch: Batch, merge: int, queries: int = 0) -> Batch:
    """The prompts of a batch in a bucketed shape: padding is added on the right, and fields of training are left out.

    Args:
      batch: rows of at most one conversation, padded on any side.
      merge: side of the square of patches that becomes one visual token.
      queries: visual tokens of an image. 0: they are made of squares of patches.
    """
    tokens, segment, position, index = (
        np.asarray(x) for x in (batch.tokens, batch.segment, batch.position, batch.vision_index)
    )
    length = bucket(tokens.shape[1], TOKENS)
    vision, mix = batch.vision, batch.mix
    if vision is not None:
        _, count, patches = vision.image.shape
        rows, longer = bucket(count), bucket(patches, math.lcm(PATCHES, merge**2))
        images = 0 if vision.slots is None else vision.slots.shape[-1]
        slots = images and bucket(images)
        old, new = (images * queries, slots * queries) if queries else (patches // merge**2, longer // merge**2)

        def moved(index):
            """The index in rows of `new` visual tokens in place of `old` ones."""
            row, place = np.divmod(np.asarray(index), old)
            moved = np.where(index >= 0, row * new + place, -1)
            # The connector's newline stays behind all visual tokens.
            return np.where(index == count * old, rows * new, moved)

        index, mix = moved(index), mix and mix._replace(index=moved(mix.index))
        vision = Vision(
            patches=_pad(vision.patches, rows, longer),
            image=_pad(vision.image, rows, longer),
            coords=_pad(vision.coords, rows, longer),
            grid=np.maximum(_pad(vision.grid, rows, longer), 1),
            slots=vision.slots if vision.slots is None else _pad(vision.slots, rows, slots),
        )
    return Batch(
        tokens=_pad(tokens, length),
        targets=None,
        weight=None,
        segment=_pad(segment, length),
        position=_pad(position, length),
        vision_index=np.where(_pad(segment, length) > 0, _pad(index, length), -1).astype(np.int32),
        vision=vision,
        prefix=None if batch.prefix is None else _pad(batch.prefix, length),
        mix=mix and TokenBlend(*(_pad(x, length) for x in mix)),
    )


def _pad(x, *sizes: int) -> np.ndarray:
    """Zeros behind axes 1, 2, ... up to `sizes`."""
    x = np.asarray(x)
    added = [size - have for size, have in zip(sizes, x.shape[1:])]
    return np.pad(x, [(0, 0), *((0, n) for n in added), *((0, 0),) * (x.ndim - 1 - len(sizes))])
