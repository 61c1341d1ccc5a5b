"""Bucketed shapes: prompts are padded to a few static sizes, so that few programs are compiled."""

import math

import numpy as np

from mllm_jax.types import Batch, TokenBlend, Vision

TOKENS = 64  # lengths of prompts are multiples of it
PATCHES = 128  # lengths of patch rows are multiples of it, as splash attention requires
INSTRUCTION = 32  # and of instructions, in tokens


def bucket(size: int, unit: int = 1) -> int:
    """Returns the smallest of unit x (1, 2, 3, 4, 6, 8, 12, 16, ...) that is at least `size`: it adds at most half."""
    count = math.ceil(size / unit)
    power = 1 << max(count - 1, 0).bit_length()
    return unit * (power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power)


def pad_prompts(batch: Batch, merge: int, queries: int = 0) -> Batch:
    """Pads a batch of prompts on the right to bucketed shapes, and drops the fields that only training reads.

    Example: 70 tokens in a row become 128; two patch rows of 300 patches become two of 384, and `vision_index` is
    renumbered accordingly.

    Args:
      batch: rows of at most one conversation each, padded on any side.
      merge: side in patches of the square that becomes one visual token.
      queries: visual tokens of every image. 0: they are made of squares of patches.
    """
    tokens, segment, position, index = (
        np.asarray(x) for x in (batch.tokens, batch.segment, batch.position, batch.vision_index)
    )
    length = bucket(tokens.shape[1], TOKENS)
    vision, mix = batch.vision, batch.mix
    if vision is not None:
        _, count, patches = vision.image.shape
        rows, padded = bucket(count), bucket(patches, math.lcm(PATCHES, merge**2))
        images = 0 if vision.slots is None else vision.slots.shape[-1]
        slots = images and bucket(images)
        # Visual tokens of a patch row, before and after.
        old, new = (images * queries, slots * queries) if queries else (patches // merge**2, padded // merge**2)

        def renumber(index):
            row, column = np.divmod(np.asarray(index), old)
            renumbered = np.where(index >= 0, row * new + column, -1)
            return np.where(index == count * old, rows * new, renumbered)  # the newline's index is the number of them

        index, mix = renumber(index), mix and mix._replace(index=renumber(mix.index))
        vision = Vision(
            patches=_pad(vision.patches, rows, padded),
            image=_pad(vision.image, rows, padded),
            coords=_pad(vision.coords, rows, padded),
            grid=np.maximum(_pad(vision.grid, rows, padded), 1),
            slots=None if vision.slots is None else _pad(vision.slots, rows, slots),
            instruction=_pad_instruction(vision.instruction, rows, slots),
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


def _pad_instruction(instruction, rows: int, slots: int) -> np.ndarray | None:
    """Pads instructions i32[B R I W] to bucketed shapes with -1."""
    if instruction is None:
        return None
    return _pad(instruction + 1, rows, slots, bucket(instruction.shape[-1], INSTRUCTION)) - 1


def _pad(x, *sizes: int) -> np.ndarray:
    """Pads axes 1, 2, ... with zeros at the end to `sizes`."""
    x = np.asarray(x)
    padding = [size - old_size for size, old_size in zip(sizes, x.shape[1:])]
    return np.pad(x, [(0, 0), *((0, n) for n in padding), *((0, 0),) * (x.ndim - 1 - len(sizes))])
