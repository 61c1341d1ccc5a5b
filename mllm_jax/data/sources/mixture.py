"""Several sources drawn from by weight, and how the weights follow from sizes. No jax."""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm_jax.data.sources.shards import Conversations

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio, odd


class Mixture:
    """Sources that are drawn from by weight, forever; each is read in its own order, again and again.

    Which source record n of a stream comes from is a pure function of the seed, the stream, n and the weights: the one
    whose share of [0, 1) holds the fractional part of start + n / golden ratio, with a start of each stream's own. No
    sequence of points is spread more evenly: of any run of N records a source gets its share of N to within a few, and
    the sources take turns.

    Weights may change at a batch b (0 is the first): what a stream reads once b batches were made is drawn by the new
    ones. What it had read before and waits to be packed, at most `window` rows of it, is not drawn again.

    As a set it has the records of all its sources, one after the other, whatever the weights.

    Args:
        sources: as `make_loader` takes them.
        weights: of each source, in any unit; 0 = not drawn. Or {b: weights from batch b on}, where 0 must be given.

    Raises:
        ValueError: weights that are not one finite, not negative number for each source, or all of them 0.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float] | Mapping[int, Sequence[float]]):
        self.sources = list(sources)
        phases = dict(weights) if isinstance(weights, Mapping) else {0: weights}
        if min(phases, default=-1) != 0:
            raise ValueError(f"weights must begin at batch 0, not {sorted(phases)}")
        self.weights = {batch: tuple(map(float, phases[batch])) for batch in sorted(phases)}
        for batch, given in self.weights.items():
            good = all(0 <= weight < math.inf for weight in given)
            if not good or len(given) != len(self.sources) or not any(given):
                need = f"must be {len(self.sources)} numbers of 0 or more, not all 0"
                raise ValueError(f"weights from batch {batch} on {need}: {given}")
        self._begins = list(self.weights)
        self._edges = [_edges(given) for given in self.weights.values()]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Any:
        return Conversations(self.sources)[index]

    def source(self, start: int, number: int, batch: int) -> int:
        """Index of the source from which record `number` of a stream is drawn, after `batch` batches; `start` as
        `start_of`."""
        point = ((start + number * GOLDEN) % 2**64 >> 11) / 2**53
        return bisect.bisect_right(self._edges[bisect.bisect_right(self._begins, batch) - 1], point)


def start_of(seed: int, stream: int) -> int:
    """First point of a stream, in units of 2^-64."""
    return int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0])


def tempered(weights: Sequence[float], sizes: Sequence[int], temperature: float | None) -> list[float]:
    """Weights times sizes^(1 / temperature), as in mT5 (arXiv 2010.11934, section 3.1, with alpha = 1 / temperature).

    1 draws in proportion to size, 2 to its square root, more ever more evenly; None leaves sizes out.
    """
    if temperature is None:
        return list(weights)
    return [weight * size ** (1 / temperature) for weight, size in zip(weights, sizes, strict=True)]


def _edges(weights: Sequence[float]) -> list[float]:
    """Ends of the sources' shares in [0, 1), without the last."""
    ends = list(itertools.accumulate(weights))
    return [end / ends[-1] for end in ends[:-1]]
