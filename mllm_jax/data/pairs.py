"""Pictures and texts for a dual encoder as a `DualBatch`. No jax: data workers run this."""

from collections.abc import Sequence

import numpy as np

from mllm_jax.data.hf_inputs import Arrays, without_text
from mllm_jax.data.pack import Budget, TooLarge, collate, place
from mllm_jax.types import DualBatch, Picture


def in_rows(rows: Sequence[Sequence[Picture]], patches: int, count: int = 1) -> DualBatch:
    """Pictures in rows of `patches` places, at most `count` in each; embeddings come row by row.

    Raises TooLarge where a row has more patches or pictures.
    """
    if (most := max(map(len, rows))) > count:
        raise TooLarge(f"a row has {most} pictures, there is room for {count}")
    values = next(picture.patches.shape[1] for row in rows for picture in row)
    batch = collate([[without_text(tuple(row))] for row in rows], Budget(0, 1, patches), merge=1, values=values)
    first = np.full((len(rows), count), -1, np.int32)
    for row, image in enumerate(batch.vision.image[:, 0]):
        numbers, places = np.unique(image, return_index=True)
        first[row, numbers[numbers > 0] - 1] = places[numbers > 0]
    return DualBatch(vision=batch.vision, first=first)


def one_each(pictures: Sequence[Picture], patches: int = 0) -> DualBatch:
    """A picture per row, in rows of at least `patches` places; of no pictures, an empty batch."""
    if not pictures:
        return DualBatch()
    return in_rows([[picture] for picture in pictures], max([patches, *(len(picture.patches) for picture in pictures)]))


def packed(pictures: Sequence[Picture], budget: Budget, count: int) -> DualBatch:
    """Pictures of any sizes in few rows, `budget.rows` of `budget.patches`, with at most `count` in each.

    Embeddings come in the order of the pictures. Raises TooLarge where they do not fit.
    """
    places = place([len(picture.patches) for picture in pictures], budget)
    if places is None:
        raise TooLarge(f"{len(pictures)} pictures do not fit {budget.rows} rows of {budget.patches} patches")
    rows = [[i for i, (row, _) in enumerate(places) if row == own] for own in range(budget.rows)]
    batch = in_rows([[pictures[i] for i in row] for row in rows], budget.patches, count)
    order = np.zeros(len(pictures), np.int32)
    for number, row in enumerate(rows):
        order[row] = number * count + np.arange(len(row))
    return batch._replace(order=order)


def with_texts(batch: DualBatch, arrays: Arrays, reads_padding: bool) -> DualBatch:
    """The batch with a text per row, as Hugging Face's arrays have them.

    Args:
      arrays: `input_ids` i[texts T] and optional `attention_mask`; without the first the batch stays as it is.
      reads_padding: the last token stands for a text, so that a mask must not end it.
    Raises:
      ValueError: neither pictures nor texts, or a mask that does not fit.
    """
    if (ids := arrays.get("input_ids")) is None:
        if batch.vision is None:
            raise ValueError("a dual encoder needs pixel_values, input_ids or both")
        return batch
    mask = arrays.get("attention_mask", np.ones_like(ids))
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise ValueError(f"input_ids and attention_mask must be [texts T], not {ids.shape} and {mask.shape}")
    if reads_padding and not mask[:, -1].all():
        raise ValueError(
            "attention_mask leaves out the last token of a text, which stands for it: this model was trained to read "
            "its padding. Pad texts to their full length and pass no attention_mask"
        )
    return batch._replace(tokens=ids.astype(np.int32), segment=mask.astype(np.int32))
