"""Draws records from several sources by weight, and computes weights from their sizes. No jax."""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm_jax.data.sources.shards import Conversations

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio, odd


class Mixture:
    """Endless mixture of sources that are drawn by weight; each source is repeated in its own order.

    The source of record n of a stream is a pure function of the seed, the stream, n and the weights. Each source has an
    interval of [0, 1) of the length of its share; the record is from the source whose interval contains the fractional
    part of start + n / golden ratio, with a different start for each stream. This sequence is spread as evenly as
    possible: in any N consecutive records, the number of each source is its share of N to within a few.
    Example with start 0 and shares 1/2, 1/4, 1/4: points 0, .62, .24, .85, .47, .09 give sources 0, 1, 0, 2, 0, 0.

    Weights may change at a batch b (0 is the first): records that a stream reads after b batches are drawn by the new
    weights. Records that were read before and wait to be packed (at most `window` rows) are not drawn again.

    Indexing accesses the concatenation of all sources, whatever the weights.

    Args:
        sources: sources, as for `make_loader`.
        weights: weight of each source, in any unit; 0: never drawn. Or {b: weights from batch b on}, with b = 0.

    Raises:
        ValueError: the weights are not one finite, non-negative number per source, or all are 0.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float] | Mapping[int, Sequence[float]]):
        self.sources = list(sources)
        phases = dict(weights) if isinstance(weights, Mapping) else {0: weights}
        if min(phases, default=-1) != 0:
            raise ValueError(f"weights must begin at batch 0, not {sorted(phases)}. Add weights for batch 0.")
        self.weights = {batch: tuple(map(float, phases[batch])) for batch in sorted(phases)}
        for batch, phase in self.weights.items():
            valid = all(0 <= weight < math.inf for weight in phase)
            if not valid or len(phase) != len(self.sources) or not any(phase):
                need = f"must be {len(self.sources)} numbers of 0 or more, not all 0"
                raise ValueError(f"weights from batch {batch} on {need}: {phase}")
        self._begins = list(self.weights)
        self._edges = [_edges(phase) for phase in self.weights.values()]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Any:
        return Conversations(self.sources)[index]

    def source(self, start: int, number: int, batch: int) -> int:
        """Returns the index of the source of record `number` of a stream after `batch` batches; `start`: `start_of`."""
        point = ((start + number * GOLDEN) % 2**64 >> 11) / 2**53
        return bisect.bisect_right(self._edges[bisect.bisect_right(self._begins, batch) - 1], point)


def start_of(seed: int, stream: int) -> int:
    """Returns the start of a stream's sequence of points, in units of 2^-64."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0])


def tempered(weights: Sequence[float], sizes: Sequence[int], temperature: float | None) -> list[float]:
    """Returns weights * sizes^(1 / temperature), as in mT5 (arXiv 2010.11934, section 3.1, alpha = 1 / temperature).

    Temperature 1 draws in proportion to size, 2 to its square root, and higher values more evenly; None ignores sizes.
    """
    if temperature is None:
        return list(weights)
    return [weight * size ** (1 / temperature) for weight, size in zip(weights, sizes, strict=True)]


def _edges(weights: Sequence[float]) -> list[float]:
    """Returns the ends of the sources' intervals in [0, 1), without the last. Example: (2, 1, 1) gives [0.5, 0.75]."""
    ends = list(itertools.accumulate(weights))
    return [end / ends[-1] for end in ends[:-1]]
