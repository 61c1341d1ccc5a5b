"""Images and texts for a dual encoder as a `DualBatch`. No jax: data workers run this."""

from collections.abc import Sequence

import numpy as np

from mllm_jax.data.pipeline.hf_inputs import Arrays, text_ids, without_text
from mllm_jax.data.pipeline.packing import Budget, TooLarge, collate, place
from mllm_jax.types import DualBatch, Example, ImagePatches


def in_rows(rows: Sequence[Sequence[ImagePatches]], budget: Budget, count: int, values: int) -> DualBatch:
    """Lays out images in rows of the budget, at most `count` in each; embeddings come row by row.

    values: of a patch. Raises TooLarge where a row has more patches or images.
    """
    if (most := max(map(len, rows))) > count:
        raise TooLarge(f"a row has {most} images, there is room for {count}")
    batch = collate([[without_text(tuple(row))] for row in rows], budget._replace(tokens=0), merge=1, values=values)
    first = np.full((len(rows), count), -1, np.int32)
    for row, image in enumerate(batch.vision.image.reshape(len(rows), -1)):
        numbers, places = np.unique(image, return_index=True)
        first[row, numbers[numbers > 0] - 1] = places[numbers > 0]
    return DualBatch(vision=batch.vision, first=first)


def one_each(images: Sequence[ImagePatches], patches: int = 0) -> DualBatch:
    """An image per row, in rows of at least `patches` places; of no images, an empty batch."""
    if not images:
        return DualBatch()
    patches = max([patches, *(len(image.patches) for image in images)])
    return in_rows([[image] for image in images], Budget(0, 1, patches), 1, images[0].patches.shape[1])


def packed(images: Sequence[ImagePatches], budget: Budget, count: int) -> DualBatch:
    """Images of any sizes in few rows, `budget.patch_rows` of `budget.patches_per_row`, with at most `count` in each.

    Embeddings come in the order of the images. Raises TooLarge where they do not fit.
    """
    places = place([len(image.patches) for image in images], budget)
    if places is None:
        raise TooLarge(f"{len(images)} images do not fit {budget.patch_rows} rows of {budget.patches_per_row} patches")
    rows = [[i for i, where in enumerate(places) if where.row == row] for row in range(budget.patch_rows)]
    values = images[0].patches.shape[1]
    batch = in_rows([[images[i] for i in row] for row in rows], budget._replace(patch_rows=1), count, values)
    order = np.zeros(len(images), np.int32)
    for number, row in enumerate(rows):
        order[row] = number * count + np.arange(len(row))
    return batch._replace(order=order)


def pairs_in_rows(rows: Sequence[Sequence[Example]], budget: Budget, length: int, values: int) -> DualBatch:
    """Lays out images and their texts in the same order: image i belongs to text i; missing pairs are padding.

    Args:
      rows: B lists of pairs: an example has one image, and as tokens its text with `length` tokens, padding included;
        its weight marks the tokens that are read.
      budget: budget of a row, with room for budget.tokens // length pairs.
      values: number of values in a patch.
    """
    count = budget.tokens // length
    batch = in_rows([[image for pair in row for image in pair.images] for row in rows], budget, count, values)
    tokens, segment = np.zeros((2, len(rows), count, length), np.int32)
    for row, pairs in enumerate(rows):
        for number, pair in enumerate(pairs):
            tokens[row, number], segment[row, number] = pair.tokens, pair.weight
    return batch._replace(tokens=tokens.reshape(-1, length), segment=segment.reshape(-1, length))


def with_texts(batch: DualBatch, arrays: Arrays, vocab: int, positions: int, reads_padding: bool) -> DualBatch:
    """The batch with a text per row, as Hugging Face's arrays have them.

    Args:
      vocab, positions: tokens that the model knows, and how many a text may have, padding included.
      arrays: `input_ids` i[texts T] and optional `attention_mask`; without the first the batch stays as it is.
      reads_padding: the last token stands for a text, so that a mask must not end it.
    Raises:
      ValueError: neither images nor texts, a mask that does not fit, or see `text_ids`.
    """
    if "input_ids" not in arrays:
        if batch.vision is None:
            raise ValueError("a dual encoder needs pixel_values, input_ids or both")
        return batch
    ids = text_ids({"input_ids": arrays["input_ids"]}, vocab, positions)
    mask = arrays.get("attention_mask", np.ones_like(ids))
    if not ids.shape[1] or mask.shape != ids.shape:
        raise ValueError(f"input_ids and attention_mask must be [texts T], not {ids.shape} and {mask.shape}")
    if reads_padding and not mask[:, -1].all():
        raise ValueError(
            "attention_mask leaves out the last token of a text, which stands for it: this model was trained to read "
            "its padding. Pad texts to their full length and pass no attention_mask"
        )
    return batch._replace(tokens=ids, segment=mask.astype(np.int32))
