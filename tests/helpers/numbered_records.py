"""Records that are numbers, their processor, and a loader of them, which show what was read."""

import numpy as np

from mllm_jax.data.pipeline.loader import make_loader
from mllm_jax.data.pipeline.packing import Budget
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.records.records import BadRecord
from mllm_jax.types import Example, ImagePatches

BUDGET = Budget(64, 1, 64)


class Numbers:
    """Record i asks for i. `broken` maps numbers to the error that reading or processing raises."""

    def __init__(self, size: int, first: int = 0, broken: dict | None = None):
        self.size, self.first, self.broken = size, first, broken or {}

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        number = self.first + index
        if isinstance(self.broken.get(number), BadRecord):
            raise self.broken[number]
        return {
            "messages": (number, self.broken.get(number)),
            "kind": "even" if number % 2 == 0 else "odd",
            "id": f"n{number}",
        }


class Count(Processor):
    """A processor whose conversations are their number, several times, and sometimes an image of it."""

    spec = ProcessorSpec(patch=1)

    def __init__(self):
        pass

    def __call__(self, messages, budget=None, tools=None):
        number, error = messages
        if error is not None:
            raise error
        text, images = (
            4 + number % 13,
            (ImagePatches(np.full((16, 6), number % 256, np.uint8), (4, 4)),) * (number % 3),
        )
        n = text + 4 * len(images)
        tokens, index = np.full(n, number, np.int32), np.maximum(np.arange(n) - text, -1)
        return Example(tokens, np.ones(n, np.float32), np.zeros((n, 3), np.int32), index, images)


def numbers(size=60, broken=None, source=None, **options):
    """A loader of `Numbers`, or of another source of numbers."""
    options = {"batch_rows": 2, "workers": 2, **options}
    return make_loader(source or Numbers(size, broken=broken), Count(), BUDGET, **options)


def seen(items) -> list[int]:
    """Numbers of all conversations in these batches, in order."""
    found = []
    for batch, _ in items:
        for tokens, segment in zip(batch.tokens, batch.segment):
            starts = np.flatnonzero(np.diff(segment, prepend=0) * (segment > 0))
            found += tokens[starts].tolist()
    return found
