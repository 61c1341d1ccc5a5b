"""Computes the FLOPs of a run's training step, and describes them in text."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from mllm_jax.common.format import with_prefix
from mllm_jax.train.monitor.flops import Counts, Flops, Rows, count_flops, padded, useful
from mllm_jax.train.runs.config import Run
from mllm_jax.types import Batch, DualBatch


class BatchCost:
    """Computes FLOPs of a run's batches. `rows`: as in `count_flops`."""

    def __init__(self, run: Run, rows: Rows):
        self.run, self.rows = run, rows

    def flops(self, batch: Batch | DualBatch, processes: float = 1) -> float:
        """Returns the FLOPs that a step needs, without padding.

        Args:
          batch: one process's share of a batch. processes: number of such shares in a batch.
        """
        counts = useful(batch, self.run.model.decoder.window)
        return sum(processes * float(costs @ counts) for costs in self._of_counts.values())

    def explain(self, batch: Batch | DualBatch, processes: float = 1) -> Iterator[str]:
        """Yields lines of text about the FLOPs of a step. Arguments as in `flops`."""
        run, window = self.run, self.run.model.decoder.window
        needed, room = (self._count(counts(batch, window)) for counts in (useful, padded))
        total, room = (processes * sum(part.total for part in flops.values()) for flops in (needed, room))
        parts = ", ".join(f"{part} {processes * flops.total / total:.0%}" for part, flops in needed.items())
        yield f"a step needs {with_prefix(total)}FLOP ({parts}); with padding it computes up to {with_prefix(room)}FLOP"
        if run.model.decoder.moe is not None and run.train.balance.counts_first(run.train.grad_accum_steps):
            first = processes * sum(flops.forward for part, flops in needed.items() if part != "head")
            yield (
                f"train.balance.exact: an additional forward pass counts the expert choices of the batch first "
                f"(+{with_prefix(first)}FLOP, {first / total:.0%}); without it, each accumulated part counts only the "
                "choices so far"
            )

    @cached_property
    def _of_counts(self) -> dict[str, np.ndarray]:
        """FLOPs of a step per unit of each field of `Counts`, by part of the model: FLOPs are linear in the counts."""
        units = [self._count(Counts(*unit)) for unit in np.eye(len(Counts._fields))]
        return {part: np.array([flops[part].total for flops in units]) for part in units[0]}

    def _count(self, counts: Counts) -> dict[str, Flops]:
        return count_flops(self.run.model, counts, self.run.optim.freeze, self.rows)
