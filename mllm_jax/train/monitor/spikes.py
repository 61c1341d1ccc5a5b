"""Detects loss spikes, after which a run returns to a checkpoint and skips the data (PaLM, arXiv 2204.02311, 5.1).

The rule depends only on the losses in the order of steps, which all processes have. All of them therefore decide alike,
and so does a resumed run.
"""

import collections
import math
import statistics
from typing import Any

from mllm_jax.train.runs.config import SpikeConfig


class Spike(Exception):
    """A loss that is too high. `back`: step of the checkpoint to return to."""

    def __init__(self, step: int, loss: float, median: float, back: int, position: dict[str, Any]):
        super().__init__(f"step {step} has a loss of {loss:.4f}, {loss / median:.1f} times the median of {median:.4f}")
        self.step, self.back = step, back
        self.position = position  # position in the data after the batch of the spike


class SpikeRule:
    """Keeps the last `config.window` losses, and counts how often the run returned to a checkpoint (`rewinds`)."""

    def __init__(self, config: SpikeConfig):
        self.config, self.rewinds = config, 0
        self._losses: collections.deque[float] = collections.deque(maxlen=config.window)

    def median_if_spike(self, loss: float) -> float | None:
        """Adds the loss of the next step. Returns the median of the losses before it if it is a spike, else None."""
        config = self.config
        if not config.factor or not math.isfinite(loss):  # a step that is not finite changed no weight
            return None
        full = len(self._losses) == config.window
        median = statistics.median(self._losses) if full else None
        if median is not None and loss > config.factor * median:
            return median
        self._losses.append(loss)
        return None

    def get_state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "rewinds": self.rewinds}

    def set_state(self, state: dict[str, Any]) -> None:
        self._losses.clear()
        self._losses.extend(state["losses"])
        self.rewinds = state["rewinds"]
