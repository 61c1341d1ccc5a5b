"""Reads the metrics of finished steps, reports them, and ends a diverging run or detects loss spikes."""

import collections
from typing import Any, NamedTuple, Protocol

import jax

from mllm_jax.train.monitor.goodput import Clock
from mllm_jax.train.monitor.metrics import Reporter
from mllm_jax.train.monitor.spikes import Spike, SpikeRule
from mllm_jax.train.runs.config import TrainConfig


class SavedSteps(Protocol):
    """Interface of the checkpoints that this module needs."""

    def latest(self) -> int | None: ...

    def steps(self) -> list[int]: ...


class Diverged(RuntimeError):
    """Too many consecutive steps were not finite."""


class Started(NamedTuple):
    """A started step, running or finished, whose metrics were not read yet."""

    step: int
    metrics: dict[str, jax.Array]
    about: dict[str, float]  # further metrics of its batch, computed on the host
    position: dict[str, Any]  # position in the data after its batch


class Results:
    """Queue of the steps that were started and not read yet.

    Attributes:
      bad: number of consecutive non-finite steps, up to the last one read.
    """

    def __init__(self, settings: TrainConfig, report: Reporter, checkpoints: SavedSteps, clock: Clock, bad: int):
        self._settings, self._report, self._checkpoints, self._clock = settings, report, checkpoints, clock
        self._started: collections.deque[Started] = collections.deque()
        self.spikes, self.bad = SpikeRule(settings.spikes), bad

    def add(self, started: Started) -> None:
        self._started.append(started)

    def forget(self, bad: int) -> None:
        """Drops all steps in the queue, which the run will repeat. `bad`: new count of non-finite steps."""
        self._started.clear()
        self.bad = bad

    def running(self) -> bool:
        """Returns whether the devices are still computing the last step."""
        return not self._started[-1].metrics["loss"].is_ready()

    def wait(self) -> None:
        """Waits until at most one step is unfinished."""
        if len(self._started) > 1:
            with self._clock.waiting():
                jax.block_until_ready(self._started[-2].metrics)
            self._clock.tick()

    def last_is_finite(self) -> bool:
        """Waits for the last step, and returns whether it was finite."""
        with self._clock.waiting():
            return bool(jax.device_get(self._started[-1].metrics["finite"]))

    def read(self, upto: int) -> None:
        """Reads and reports the steps up to `upto`. Raises Diverged or Spike."""
        done = [self._started.popleft() for _ in range(len(self._started)) if self._started[0].step <= upto]
        with self._clock.waiting():
            fetched = jax.device_get([started.metrics for started in done])
        for (step, _, about, position), metrics in zip(done, fetched):
            values = {name: float(value) for name, value in metrics.items()}
            self._report.step({"step": step} | values | about)
            self._look_for_spike(step, values["loss"], position)
            self.bad = 0 if values["finite"] else self.bad + 1
            if self.bad >= self._settings.patience:
                self._report.flush()
                raise Diverged(
                    f"the loss or the gradient was not finite in {self.bad} steps in a row, up to step {step}. They "
                    f"changed no weight; the checkpoint of step {self._checkpoints.latest()} is kept. Try a lower "
                    "optim.learning_rate or optim.max_grad_norm, or another data.seed; --debug_nans names the layer."
                )

    def _look_for_spike(self, step: int, loss: float, position: dict[str, Any]) -> None:
        """Raises Spike if the loss of a step is a spike and there is a checkpoint to return to. Otherwise reports it.

        Only checkpoints at multiples of `save_every` count, so that an interrupted run returns to the same step.
        """
        median = self.spikes.median_if_spike(loss)
        if median is None:
            return
        every = self._settings.save_every
        saved = [saved for saved in self._checkpoints.steps() if saved < step and every and saved % every == 0]
        if saved and self.spikes.rewinds < self.spikes.config.rewinds:
            raise Spike(step, loss, median, max(saved), position)
        why = f"all train.spikes.rewinds={self.spikes.rewinds} are used up" if saved else "no earlier checkpoint exists"
        self._report.line(f"{Spike(step, loss, median, step, position)}; {why}")
