"""The arrays of a Hugging Face processor as a `Batch`: a conversation per row, tokens and padding where they were."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mllm_jax.data.pack import collate, tightest
from mllm_jax.data.positions import mrope_positions
from mllm_jax.types import Batch, Example, Picture

TEXT = ["input_ids", "attention_mask", "labels"]
VISION = ["pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "mm_token_type_ids"]


def from_hf_inputs(config, inputs: Mapping[str, Any]) -> Batch:
    """Hugging Face's arrays -> Batch with B, T of `input_ids`, so that logits come out in its order.

    Args:
      config: a ModelConfig; its special tokens, patch and merge sizes are read. Without an encoder only `input_ids`,
        `attention_mask` and `labels` are understood.
      inputs: numpy arrays (or what `numpy.asarray` takes) named as Hugging Face's processors name them: `input_ids`
        i[B T]; optional `attention_mask` [B T] (padding left or right), `pixel_values` f[sum(patches) C] with
        `image_grid_thw` i[images 3], `pixel_values_videos` with `video_grid_thw`; `mm_token_type_ids` is redundant and
        only checked for shape; `labels` [B T] are `input_ids`, or -100 where there is no loss (absent: no loss).
    Raises:
      ValueError: an unknown name, or placeholders in `input_ids` that do not match the grids.
    """
    inputs = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
    names = TEXT if config.tokens is None else TEXT + VISION
    if unknown := sorted(set(inputs) - set(names)):
        raise ValueError(f"unknown inputs {unknown}; understood are {', '.join(names)}")
    ids = inputs["input_ids"].astype(np.int32)
    if ids.ndim != 2:
        raise ValueError(f"input_ids must be [B T], not {ids.shape}")
    for name in ("attention_mask", "mm_token_type_ids", "labels"):
        if name in inputs and inputs[name].shape != ids.shape:
            raise ValueError(f"{name} has shape {inputs[name].shape}, input_ids {ids.shape}")
    mask = inputs.get("attention_mask", np.ones_like(ids)).astype(bool)
    labels = inputs.get("labels", np.full_like(ids, -100))
    supply = {}
    if config.tokens is not None:
        supply = {
            config.tokens.image: _pictures(inputs, "pixel_values", "image_grid_thw"),
            config.tokens.video: _pictures(inputs, "pixel_values_videos", "video_grid_thw"),
        }
    examples = [_example(row, keep, label, supply, config.merge) for row, keep, label in zip(ids, mask, labels)]
    for name, left in zip(("image", "video"), supply.values()):
        if left:
            raise ValueError(f"{len(left)} pictures of the {name} grids have no placeholders in input_ids")
    budget = tightest(examples, tokens=ids.shape[1])
    batch = collate([[example] for example in examples], budget, merge=config.merge, values=config.patch_values)
    return _move_to(batch, mask)


def _pictures(inputs, pixels: str, grids: str) -> list[Picture]:
    """Every still picture and every temporal patch of a clip, in order."""
    if (pixels in inputs) != (grids in inputs):
        raise ValueError(f"{pixels} and {grids} belong together; only one was given")
    pictures, start = [], 0
    for t, h, w in inputs.get(grids, np.zeros((0, 3), int)).tolist():
        for time in range(t):
            pictures.append(Picture(inputs[pixels][start : start + h * w].astype(np.float32), (h, w), time))
            start += h * w
    if pixels in inputs and start != len(inputs[pixels]):
        raise ValueError(f"{grids} counts {start} patches, {pixels} has {len(inputs[pixels])}")
    return pictures


def _example(row, keep, label, supply: dict[int, list[Picture]], merge: int) -> Example:
    """A row without its padding; takes the pictures of its placeholders off the supply."""
    tokens, label = row[keep], label[keep]
    visual = np.isin(tokens, list(supply))
    slots = np.flatnonzero(visual)
    pictures, filled = [], 0
    while filled < len(slots):
        waiting = supply[int(tokens[slots[filled]])]
        if not waiting:
            raise ValueError(f"input_ids have {len(slots) - filled} visual placeholders more than the grids")
        pictures.append(waiting.pop(0))
        filled += len(pictures[-1].patches) // merge**2
    grids = [(h // merge, w // merge) for h, w in (picture.grid for picture in pictures)]
    return Example(
        tokens=tokens,
        weight=(label >= 0).astype(np.float32),
        position=mrope_positions(visual, grids),
        visual=visual,
        pictures=tuple(pictures),
    )


def _move_to(batch: Batch, mask: np.ndarray) -> Batch:
    """Packed rows start at slot 0; put token i of a row where its mask has the i-th one."""
    if all(row[: row.sum()].all() for row in mask):
        return batch
    order = np.argsort(np.argsort(~mask, axis=1, kind="stable"), axis=1)

    def move(x):
        return np.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

    return Batch(**{name: value if name == "vision" else move(value) for name, value in batch._asdict().items()})
