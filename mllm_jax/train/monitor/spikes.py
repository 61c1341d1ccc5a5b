"""Handles a loss spike: resume from the last checkpoint with the data after it (PaLM, arXiv 2204.02311, 5.1).

The rule reads losses, which all processes have, in the order of steps. So all processes decide alike, and an
interrupted run decides like an uninterrupted one.
"""

import collections
import statistics
from typing import Any

from mllm_jax.train.runs.config import SpikeConfig


class Spike(Exception):
    """A loss that is too high, at a step before which there is a checkpoint to go back to."""

    def __init__(self, step: int, loss: float, median: float, back: int, position: dict[str, Any]):
        super().__init__(f"step {step} has a loss of {loss:.4f}, {loss / median:.1f} times the median of {median:.4f}")
        self.step, self.back = step, back  # the step of the checkpoint
        self.position = position  # in the data, after the batch of the spike


class SpikeRule:
    """The losses so far, as far as they matter, and how often the run went back."""

    def __init__(self, config: SpikeConfig):
        self.config, self.rewinds = config, 0
        self._losses: collections.deque[float] = collections.deque(maxlen=config.window)

    def median_if_spike(self, loss: float) -> float | None:
        """Takes the loss of the next step. The median before it, if that makes it a spike, else None."""
        config = self.config
        full = config.factor and len(self._losses) == config.window
        median = statistics.median(self._losses) if full else None
        if median is not None and loss > config.factor * median:
            return median
        if config.factor and loss == loss:  # ignore non-finite steps, which changed nothing
            self._losses.append(loss)
        return None

    def get_state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "rewinds": self.rewinds}

    def set_state(self, state: dict[str, Any]) -> None:
        self._losses.clear()
        self._losses.extend(state["losses"])
        self.rewinds = state["rewinds"]
