"""Converts the arrays of a Hugging Face processor to a `Batch`: a conversation per row, tokens and padding in place."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mllm_jax.data.pipeline.packing import collate, smallest_budget
from mllm_jax.data.vision.positions import rotary_positions
from mllm_jax.data.vision.token_blend import spread
from mllm_jax.types import Batch, Example, ImagePatches, TokenBlend, VisionSpan

TEXT = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")
Arrays = dict[str, np.ndarray]
Supply = dict[int, list[VisionSpan]]  # images and videos by the id of their placeholder


def as_arrays(inputs: Mapping[str, Any], vision: tuple[str, ...]) -> Arrays:
    """Returns the inputs as numpy arrays. Raises ValueError for a name that is neither in TEXT nor in `vision`."""
    inputs = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
    names = TEXT + vision
    if unknown := sorted(set(inputs) - set(names)):
        raise ValueError(f"unknown inputs {unknown}; understood are {', '.join(names)}")
    return inputs


def text_ids(
    inputs: Arrays, vocab: int, positions: int = 0, placeholders: Iterable[int] = (), prefix: str = ""
) -> np.ndarray:
    """Returns `input_ids` as i32[B T].

    Args:
      inputs: `input_ids` i[B T]; what `attention_mask` [B T] leaves out may be anything.
      vocab: size of the vocabulary.
      positions: number of learned positions, the largest number of tokens of a text. 0: unlimited.
      placeholders: ids that need not be in the vocabulary.
      prefix: prefix of both names, such as "qformer_".
    Raises:
      ValueError: no integers, an id that is no token, or a longer text. A model would give NaN, or read another token.
    """
    name = f"{prefix}input_ids"
    if (ids := inputs.get(name)) is None:
        raise ValueError(f"{name} are missing. Give the tokens of the texts.")
    if ids.ndim != 2 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be integers [B T], not {ids.dtype} {list(ids.shape)}")
    mask = inputs.get(f"{prefix}attention_mask", np.ones(ids.shape))
    if mask.shape != ids.shape:
        raise ValueError(f"{prefix}attention_mask has shape {mask.shape}, {name} {ids.shape}")
    read = mask.astype(bool)
    odd = ids[read & ((ids < 0) | (ids >= vocab)) & ~np.isin(ids, list(placeholders))]
    if odd.size:
        raise ValueError(f"{name} hold {odd[0]}, which is not a token: the model's vocabulary has {vocab}")
    longest = int(read.sum(1).max(initial=0))
    if 0 < positions < longest:
        raise ValueError(f"{name} have a text of {longest} tokens; the model has learned {positions} positions")
    return ids.astype(np.int32)


def assemble(config: Any, inputs: Arrays, supply: Supply) -> Batch:
    """Builds a batch of tokens and of the images of their placeholders.

    Args:
      config: a ModelConfig.
      inputs: `input_ids` i[B T]; optional `attention_mask` [B T] (padding left or right); `labels` [B T] are
        `input_ids`, or -100 where there is no loss (absent: no loss); `token_type_ids` [B T] are 0 in what all tokens
        see, in models that have that (absent: nowhere); `mm_token_type_ids` is redundant and only checked for shape.
      supply: every image and video of all rows, in order, by its placeholder.
    Raises:
      ValueError: placeholders that do not match the images, or see `text_ids`.
    """
    ids = text_ids(inputs, config.decoder.vocab, config.decoder.positions, supply)
    for name in TEXT[1:]:
        if name in inputs and inputs[name].shape != ids.shape:
            raise ValueError(f"{name} has shape {inputs[name].shape}, input_ids {ids.shape}")
    mask = inputs.get("attention_mask", np.ones_like(ids)).astype(bool)
    labels = inputs.get("labels", np.full_like(ids, -100))
    suffix = inputs.get("token_type_ids", np.ones_like(ids))
    supply = {token: list(visuals) for token, visuals in supply.items()}
    rows = zip(ids, mask, labels, suffix, strict=True)
    examples = [_example(row[keep], label[keep], after[keep], supply, config) for row, keep, label, after in rows]
    for token, left in supply.items():
        if left:
            raise ValueError(f"{len(left)} images or videos have no placeholders (token {token}) in input_ids")
    budget = smallest_budget(examples, tokens=ids.shape[1])
    batch = collate([[example] for example in examples], budget, **config.layout)
    return _move_to(batch, mask)


def alone(config: Any, supply: Supply) -> Batch:
    """Returns a batch of images without text, one per row, for a tower alone."""
    examples = [without_text(visual.images) for visuals in supply.values() for visual in visuals]
    return collate([[e] for e in examples], smallest_budget(examples), **config.layout)


def without_text(images: tuple[ImagePatches, ...]) -> Example:
    none = np.zeros(0, np.int32)
    return Example(none, none, np.zeros((0, 3), np.int32), none, images)


def _example(tokens, label, suffix, supply: Supply, config: Any) -> Example:
    """Returns the Example of a row without padding, and removes the images of its placeholders from `supply`."""
    visual = np.isin(tokens, list(supply))
    slots = np.flatnonzero(visual)
    items, firsts, filled, first = [], [], 0, 0
    while filled < len(slots):
        waiting = supply[int(tokens[slots[filled]])]
        if not waiting:
            raise ValueError(f"input_ids have {len(slots) - filled} visual placeholders more than the images")
        item = waiting.pop(0)
        items.append(item)
        firsts.append(first)
        first += sum(image.num_tokens(config.merge, config.queries) for image in item.images)
        filled += len(item.order)
    position = rotary_positions(visual, [(item.position, item.advance) for item in items])
    index, mix = spread(visual, [(item.order, item.mix) for item in items], firsts)
    return Example(
        tokens=tokens,
        weight=(label >= 0).astype(np.float32),
        position=position,
        vision_index=index,
        images=tuple(image for item in items for image in item.images),
        prefix=int(np.sum(suffix == 0)),
        mix=mix,
    )


def _move_to(batch: Batch, mask: np.ndarray) -> Batch:
    """Moves the tokens of packed rows, which start at column 0, to the columns where `mask` is true."""
    if all(row[: row.sum()].all() for row in mask):
        return batch
    order = np.argsort(np.argsort(~mask, axis=1, kind="stable"), axis=1)

    def move(x):
        return np.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

    moved = {name: move(x) for name, x in batch._asdict().items() if isinstance(x, np.ndarray)}
    return batch._replace(**moved, mix=batch.mix and TokenBlend(*map(move, batch.mix)))
