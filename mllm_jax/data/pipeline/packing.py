"""Packs several conversations into rows of a static shape: T tokens and R x P patches.

`Packer` chooses which conversations share a row, `collate` lays rows out as a `Batch`. No jax: data workers run this.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from einops import rearrange

from mllm_jax.data.vision.token_blend import alone
from mllm_jax.types import NEWLINE, Batch, DualBatch, Example, ImagePatches, Vision


class Budget(NamedTuple):
    """The static shape of a batch row. `rows == 0` means a batch without images."""

    tokens: int  # T
    patch_rows: int = 0  # R patch rows
    patches_per_row: int = 0  # P patches in a patch row: no image is larger
    images_per_row: int = 0  # I images in a patch row, for connectors with queries. 0: any number
    instruction_tokens: int = 0  # W tokens of an image's instruction, for connectors that read one. 0: any number


class Place(NamedTuple):
    """The place of an image in a batch row."""

    row: int  # patch row
    offset: int  # of its first patch in that row
    slot: int  # number of images before it in that row


# Cost of a pair of patches relative to a pair of tokens: width x layers of the encoder over that of the decoder, times
# two because text is causal. 0.38 in LLaVA-1.5-7B, 0.42 in Qwen3-VL-8B, 0.86 in Qwen3-VL-2B.
PAIR_OF_PATCHES = 0.5
BALANCE = 10.0  # weight of a row's cost relative to its fill. More does not balance costs better, less does it worse


class TooLarge(ValueError):
    """Raised for a conversation that does not fit an empty batch row."""


def check_instructions(images: Sequence[ImagePatches], budget: Budget) -> None:
    """Raises TooLarge for an instruction that is longer than the budget."""
    longest = max((image.instruction_length for image in images), default=0)
    if 0 < budget.instruction_tokens < longest:
        raise TooLarge(f"an instruction has {longest} tokens, the budget is {budget.instruction_tokens}")


def place(sizes: Sequence[int], budget: Budget) -> list[Place] | None:
    """Finds a place for every image, first-fit decreasing.

    Args:
        sizes: patches of each image.
        budget: R rows of P patches and at most I images.

    Returns:
        Places in the order of `sizes`; None where they do not fit. Images are never cut.
    """
    rows, slots = range(budget.patch_rows), budget.images_per_row or len(sizes)
    patches, images = [0] * budget.patch_rows, [0] * budget.patch_rows
    places = [Place(0, 0, 0)] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = (r for r in rows if patches[r] + sizes[i] <= budget.patches_per_row and images[r] < slots)
        row = next(fits, None)
        if row is None:
            return None
        places[i] = Place(row, patches[row], images[row])
        patches[row] += sizes[i]
        images[row] += 1
    return places


def attention_cost(example: Example) -> float:
    """Attention cost of a conversation, in pairs of text tokens.

    The rest of a row's work depends only on its shape; attention kernels skip masked blocks.
    """
    seen = sum(size**2 for size in example.lengths or (len(example.tokens),))
    return seen + PAIR_OF_PATCHES * sum(len(image.patches) ** 2 for image in example.images)


def smallest_budget(examples: Sequence[Example], tokens: int | None = None) -> Budget:
    """The smallest budget that gives each conversation its own row; patch rows are as long as the largest image.

    Args:
        tokens: T, where it is given.
    """
    sizes = [[len(image.patches) for image in example.images] for example in examples]
    tokens = max((len(example.tokens) for example in examples), default=0) if tokens is None else tokens
    budget = Budget(tokens, patches_per_row=max((size for row in sizes for size in row), default=0))
    while any(place(row, budget) is None for row in sizes):
        budget = budget._replace(patch_rows=budget.patch_rows + 1)
    return budget


@lru_cache(maxsize=4096)
def patch_coords(grid: tuple[int, int], merge: int) -> np.ndarray:
    """i32[h*w 2]: (y, x) of each patch of an image in merge-block-major order."""
    yx = np.stack(np.mgrid[: grid[0], : grid[1]], axis=-1).astype(np.int32)
    coords = rearrange(yx, "(y m) (x n) c -> (y x m n) c", m=merge, n=merge)
    coords.flags.writeable = False  # shared by all callers
    return coords


def collate(
    rows: Sequence[Sequence[Example]],
    budget: Budget,
    *,
    merge: int,
    values: int,
    prefix: bool = False,
    mixes: bool = False,
    references: bool = False,
    queries: int = 0,
    instructions: bool = False,
) -> Batch:
    """Lays out conversations as one batch.

    Args:
        rows: B lists of conversations; an empty list makes a row of padding. Those of one Example are adjacent.
        budget: the shape of a row. Its P is a multiple of merge^2.
        merge: side of the square of patches that becomes one visual token.
        values: C, number of values in a patch, needed if no conversation has an image.
        prefix: whether the model has tokens that all tokens of their conversation attend to.
        mixes: whether the model resamples grids of visual tokens.
        references: whether examples have log-probabilities of a reference model.
        queries: Q, visual tokens of every image. 0: one of every merge x merge patches. With queries, the batch has
            `budget.images_per_row` slots per patch row; where that is 0, as many as its fullest patch row needs.
        instructions: whether the connector reads the images' instructions, of `budget.instruction_tokens` tokens; where
            that is 0, as many as the longest has.

    Returns:
        A Batch of numpy arrays: tokens [B T]; patches [B R P C] in the dtype of the images, uint8 without images;
        `vision is None` if `budget.patch_rows == 0`.

    Raises:
        TooLarge: a row is over the budget.
        ValueError: visual tokens and images of a conversation disagree, or uint8 and float images are mixed.
    """
    if budget.patches_per_row % merge**2:
        raise ValueError(f"budget.patches_per_row={budget.patches_per_row} must be a multiple of merge^2={merge**2}")
    text = (len(rows), budget.tokens)
    batch = Batch(
        tokens=np.zeros(text, np.int32),
        targets=np.zeros(text, np.int32),
        weight=np.zeros(text, np.float32),
        segment=np.zeros(text, np.int32),
        position=np.zeros((*text, 3), np.int32),
        vision_index=np.full(text, -1, np.int32),
        vision=_empty_vision(rows, budget, values, queries, instructions) if budget.patch_rows else None,
        prefix=np.zeros(text, bool) if prefix else None,
        mix=alone(np.full(text, -1)).mix if mixes else None,
        reference=np.zeros(text, np.float32) if references else None,
    )
    for b, examples in enumerate(rows):
        _fill_text(batch, b, examples)
        _fill_images(batch, b, examples, budget, merge, queries)
    return batch


def fill(batch: Batch | DualBatch) -> dict[str, float]:
    """Returns the shares of a batch that are not padding, 0..1: "tokens", "patches" (1.0 without patch rows) and, where
    patch rows have slots for images, "images"."""
    patches = 1.0 if batch.vision is None else float((batch.vision.image > 0).mean())
    slots = None if batch.vision is None else batch.vision.slots
    images = {} if slots is None else {"images": float((slots > 0).mean())}
    return {"tokens": float((batch.segment > 0).mean()), "patches": patches, **images}


def _empty_vision(
    rows: Sequence[Sequence[Example]], budget: Budget, values: int, queries: int, instructions: bool
) -> Vision:
    dtypes = {np.asarray(p.patches).dtype for examples in rows for e in examples for p in e.images}
    if len(dtypes) > 1:
        raise ValueError(f"images of one batch must share a dtype (raw uint8 or normalized float32), got {dtypes}")
    shape = (len(rows), budget.patch_rows, budget.patches_per_row)
    slots = (*shape[:2], budget.images_per_row or _fullest_row(rows, budget))
    length = budget.instruction_tokens or _longest_instruction(rows)
    return Vision(
        patches=np.zeros((*shape, values), dtypes.pop() if dtypes else np.uint8),
        image=np.zeros(shape, np.int32),
        coords=np.zeros((*shape, 3), np.int32),
        grid=np.ones((*shape, 2), np.int32),
        slots=np.zeros(slots, np.int32) if queries else None,
        instruction=np.full((*slots, length), -1, np.int32) if instructions else None,
    )


def _fullest_row(rows: Sequence[Sequence[Example]], budget: Budget) -> int:
    """Returns the number of images in the patch row that has the most, at least 1."""
    placed = (place([len(image.patches) for example in row for image in example.images], budget) for row in rows)
    return max((one.slot + 1 for places in placed for one in places or ()), default=1)


def _longest_instruction(rows: Sequence[Sequence[Example]]) -> int:
    """Returns the number of tokens of the longest instruction of an image, at least 1."""
    return max((image.instruction_length for row in rows for example in row for image in example.images), default=1)


def _fill_text(batch: Batch, b: int, examples: Sequence[Example]) -> None:
    total, room = sum(len(e.tokens) for e in examples), batch.tokens.shape[1]
    if total > room:
        raise TooLarge(f"row {b} has {total} tokens, the budget is {room}")
    start, number = 0, 0
    for example in examples:
        sizes = example.lengths or (len(example.tokens),)
        if batch.reference is not None:
            batch.reference[b, number : number + len(sizes)] = example.reference
        for end, size in zip(np.cumsum(sizes), sizes):
            here, own = slice(start, start + size), slice(end - size, end)
            number += 1
            batch.tokens[b, here] = example.tokens[own]
            batch.targets[b, here][:-1] = example.tokens[own][1:]
            batch.weight[b, here][:-1] = example.weight[own][1:]
            batch.segment[b, here] = number
            batch.position[b, here] = example.position[own]
            if batch.prefix is not None:
                batch.prefix[b, start : start + example.prefix] = True
            start = here.stop


def _fill_images(batch: Batch, b: int, examples: Sequence[Example], budget: Budget, merge: int, queries: int) -> None:
    images = [p for e in examples for p in e.images]
    check_instructions(images, budget)
    places = place([len(p.patches) for p in images], budget)
    if places is None:
        sizes = [len(p.patches) for p in images]
        raise TooLarge(
            f"row {b}: images of {sizes} patches do not fit {budget.patch_rows} rows of {budget.patches_per_row}"
            f"{_with_slots(budget)}"
        )
    firsts = []  # visual tokens of every image
    for number, (image, (row, offset, slot)) in enumerate(zip(images, places), 1):
        lead, here = image.num_prefix_tokens, (b, row, slice(offset, offset + len(image.patches)))
        batch.vision.patches[here] = image.patches
        batch.vision.image[here] = number
        batch.vision.coords[here][:, 0] = image.time
        batch.vision.coords[here][:lead, 0] = -1 - np.arange(lead)
        batch.vision.coords[here][lead:, 1:] = patch_coords(tuple(image.grid), merge)
        batch.vision.grid[here] = image.grid
        if queries:
            batch.vision.slots[b, row, slot] = number
            firsts.append((row * batch.vision.slots.shape[-1] + slot) * queries)
            if batch.vision.instruction is not None and image.instruction is not None:
                batch.vision.instruction[b, row, slot, : len(image.instruction)] = image.instruction
        else:
            firsts.append((row * budget.patches_per_row + offset + image.hidden) // merge**2)
    counts = [image.num_tokens(merge, queries) for image in images]
    tokens, start = _visual_tokens(firsts, counts), 0
    newline = budget.patch_rows * budget.patches_per_row // merge**2
    for number, example in enumerate(examples, 1):
        index = np.asarray(example.vision_index)
        count = sum(image.num_tokens(merge, queries) for image in example.images)
        if index.max(initial=-1) >= count:
            raise ValueError(f"row {b}, segment {number}: visual token {index.max()}, but the images have {count}")
        own, tokens = tokens[:count], tokens[count:]
        here = (b, slice(start, start + len(index)))
        batch.vision_index[here] = _places(index, own, newline)
        if example.mix is not None:
            batch.mix.index[here] = _places(example.mix.index, own, newline)
            batch.mix.weight[here] = example.mix.weight
        start += len(index)


def _places(index: np.ndarray, own: np.ndarray, newline: int) -> np.ndarray:
    """Returns the indices in a row of visual tokens, from the indices in a conversation.

    own: index in the row of every visual token of the conversation.
    """
    return np.append(own, (newline, -1))[np.where(index >= 0, index, len(own) + (index != NEWLINE))]


def _with_slots(budget: Budget) -> str:
    """Returns the part of an error that states the number of images of a patch row."""
    return f" and {budget.images_per_row} images" if budget.images_per_row else ""


def _visual_tokens(firsts: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """Returns the index in a row of every visual token of its images, joined in order."""
    tokens = [np.arange(first, first + count, dtype=np.int32) for first, count in zip(firsts, counts)]
    return np.concatenate([np.zeros(0, np.int32), *tokens])


class Packer:
    """Fills rows from a look-ahead window of conversations, under both budgets at once.

    Conversations wait in the order in which they were added. A row takes the one that waited longest (so that none
    starves), then repeatedly the one that leaves the smallest remainder, with both budgets as fractions: the L2 greedy
    of vector bin packing (Panigrahy et al., "Heuristics for Vector Bin Packing", 2011). The remainder of the mean cost
    of a row (see `cost`) counts as a third one, with less weight the fuller the row is: rows then cost about the same,
    so that no device waits for the one with the large images, and are as full as without it. The choice depends only on
    the waiting conversations and their order, so the keys in `waiting` are the complete state.

    For example, with a budget of 10 tokens and the waiting conversations of 6, 5, 4 and 3 tokens, the first row takes 6
    (it waited longest) and then 4, which leaves no remainder.

    Args:
        budget: the shape of a row.
        window: number of rows whose conversations wait before a row is filled; more fills rows better.
        one_example_per_row: whether every row holds one example.
    """

    def __init__(self, budget: Budget, window: float = 4.0, one_example_per_row: bool = False):
        self.budget, self.window, self.one_example_per_row = budget, window, one_example_per_row
        self._room = np.array([budget.tokens, max(budget.patch_rows * budget.patches_per_row, 1)])
        self._waiting: list[tuple[int, Example]] = []
        self._sizes: list[tuple[int, int]] = []  # (tokens, patches) of each that waits
        self._costs: list[float] = []
        self._total = np.zeros(2, np.int64)  # of all that wait

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> list[int]:
        """Keys of the conversations that wait, in order: adding them again in this order restores the packer."""
        return [key for key, _ in self._waiting]

    @property
    def load(self) -> float:
        """Number of rows that the waiting conversations fill, by tokens or by patches, whichever is larger."""
        return float((self._total / self._room).max())

    @property
    def ready(self) -> bool:
        """True if the window is full."""
        return self.load >= self.window

    def add(self, key: int, example: Example) -> None:
        """Adds a conversation to those that wait. Raises TooLarge if it fits no row."""
        sizes = [len(p.patches) for p in example.images]
        check_instructions(example.images, self.budget)
        if len(example.tokens) > self.budget.tokens or place(sizes, self.budget) is None:
            raise TooLarge(f"{len(example.tokens)} tokens and images of {sizes} patches do not fit {self.budget}")
        self._waiting.append((key, example))
        self._sizes.append((len(example.tokens), sum(sizes)))
        self._costs.append(attention_cost(example))
        self._total += self._sizes[-1]

    def take(self) -> list[tuple[int, Example]]:
        """Removes and returns the (key, conversation) pairs of one row. An empty list if none waits."""
        if not self._waiting:
            return []
        share, costs = np.array(self._sizes) / self._room, np.array(self._costs)
        costs = costs * max(1, (self._total / self._room).max()) / max(1, costs.sum())  # as shares of a row's mean
        room, left = np.ones(2), 1.0
        candidate = np.ones(len(share), bool)
        chosen, sizes, best = [], [], 0
        while True:
            candidate[best] = False
            candidate_sizes = sizes + [len(p.patches) for p in self._waiting[best][1].images]
            if place(candidate_sizes, self.budget) is not None:
                chosen.append(best)
                sizes, room, left = candidate_sizes, room - share[best], left - costs[best]
            candidate &= (share <= room + 1e-9).all(1)
            if self.one_example_per_row or not candidate.any():
                break
            remainder = ((room - share) ** 2).sum(1) + BALANCE * (room**2).sum() * (left - costs) ** 2
            best = int(np.where(candidate, remainder, np.inf).argmin())
        row = [self._waiting[i] for i in chosen]
        for i in sorted(chosen, reverse=True):
            self._total -= self._sizes[i]
            del self._waiting[i], self._sizes[i], self._costs[i]
        return row
