"""FLOPs of a run's step, as numbers and as printed lines."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from mllm_jax.common.format import with_prefix
from mllm_jax.train.monitor.flops import Counts, Flops, Rows, count_flops, padded, useful
from mllm_jax.train.runs.config import Run
from mllm_jax.types import Batch, DualBatch


class BatchCost:
    """The FLOPs of a run's batches; `rows` as in `count_flops`."""

    def __init__(self, run: Run, rows: Rows):
        self.run, self.rows = run, rows

    def flops(self, batch: Batch | DualBatch, processes: float = 1) -> float:
        """FLOPs that a step needs.

        Args:
          batch: one process's share of a batch; `processes`: how many such shares a batch has.
        """
        counts = useful(batch, self.run.model.decoder.window)
        return sum(processes * float(costs @ counts) for costs in self._of_counts.values())

    def explain(self, batch: Batch | DualBatch, processes: float = 1) -> Iterator[str]:
        """Returns lines that explain the cost of a step; arguments as in `flops`."""
        run, window = self.run, self.run.model.decoder.window
        needed, room = (self._count(counts(batch, window)) for counts in (useful, padded))
        total, room = (processes * sum(part.total for part in flops.values()) for flops in (needed, room))
        parts = ", ".join(f"{part} {processes * flops.total / total:.0%}" for part, flops in needed.items())
        yield f"a step needs {with_prefix(total)}FLOP ({parts}); with padding it has up to {with_prefix(room)}FLOP"
        if run.model.decoder.moe is not None and run.train.balance.counts_first(run.train.grad_accum_steps):
            first = processes * sum(flops.forward for part, flops in needed.items() if part != "head")
            yield (
                f"train.balance.exact: a forward pass counts the choices of a batch first, {with_prefix(first)}FLOP or "
                f"{first / total:.0%} besides; without it they are counted up to each accumulated part"
            )

    @cached_property
    def _of_counts(self) -> dict[str, np.ndarray]:
        """FLOPs of a step in every part of the model for each of `Counts`, in which they are linear."""
        units = [self._count(Counts(*unit)) for unit in np.eye(len(Counts._fields))]
        return {part: np.array([flops[part].total for flops in units]) for part in units[0]}

    def _count(self, counts: Counts) -> dict[str, Flops]:
        return count_flops(self.run.model, counts, self.run.optim.freeze, self.rows)
