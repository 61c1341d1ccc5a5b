"""What a step of a run costs, in numbers and in lines for people."""

from collections.abc import Iterator

import numpy as np

from mllm_jax.common.format import with_prefix
from mllm_jax.train.monitor.flops import Counts, count_flops, padded, useful
from mllm_jax.train.runs.config import Run
from mllm_jax.types import Batch


def explain(run: Run, batch: Batch, processes: float = 1) -> Iterator[str]:
    """What a step costs, in lines for people.

    Args:
      batch: one process's share of the first batch; `processes`: how many such shares a batch has.
    """
    window = run.model.decoder.window
    needed, room = (count_flops(run.model, counts(batch, window), run.optim.freeze) for counts in (useful, padded))
    total, room = (processes * sum(part.total for part in flops.values()) for flops in (needed, room))
    parts = ", ".join(f"{part} {processes * flops.total / total:.0%}" for part, flops in needed.items())
    yield f"a step needs {with_prefix(total)}FLOP ({parts}); with padding it has up to {with_prefix(room)}FLOP"
    if run.model.decoder.moe is not None and run.train.balance.counts_first(run.train.accumulate):
        first = processes * sum(flops.forward for part, flops in needed.items() if part != "head")
        yield (
            f"train.balance.exact: a forward pass counts the choices of a batch first, {with_prefix(first)}FLOP or "
            f"{first / total:.0%} besides; without it they are counted up to each accumulated part"
        )


def flops_of_counts(run: Run) -> dict[str, np.ndarray]:
    """FLOPs of a step in every part of the model for each of `Counts`, in which they are linear."""
    units = [count_flops(run.model, Counts(*unit), run.optim.freeze) for unit in np.eye(len(Counts._fields))]
    return {part: np.array([flops[part].total for flops in units]) for part in units[0]}
