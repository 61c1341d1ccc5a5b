"""Reads, reports and checks the results of several finished steps at once."""

import collections
from typing import Any, NamedTuple, Protocol

import jax

from mllm_jax.train.monitor.goodput import Clock
from mllm_jax.train.monitor.metrics import Reporter
from mllm_jax.train.monitor.spikes import Spike, SpikeRule
from mllm_jax.train.runs.config import TrainConfig


class SavedSteps(Protocol):
    """Checkpoints, as far as they matter here."""

    def latest(self) -> int | None: ...

    def steps(self) -> list[int]: ...


class Diverged(RuntimeError):
    """Too many steps in a row were not finite."""


class Started(NamedTuple):
    """A step that the devices work at, or have done, and whose metrics nobody has read."""

    step: int
    metrics: dict[str, jax.Array]
    about: dict[str, float]  # host-side metrics of its batch
    position: dict[str, Any]  # in the data, after its batch


class Results:
    """The steps that were started and not yet read, in order.

    Attributes:
      bad: steps in a row that were not finite, up to the last one that was read.
    """

    def __init__(self, settings: TrainConfig, report: Reporter, checkpoints: SavedSteps, clock: Clock, bad: int):
        self._settings, self._report, self._checkpoints, self._clock = settings, report, checkpoints, clock
        self._started: collections.deque[Started] = collections.deque()
        self.spikes, self.bad = SpikeRule(settings.spikes), bad

    def add(self, started: Started) -> None:
        self._started.append(started)

    def forget(self, bad: int) -> None:
        """Drops the results of steps that were started and will be repeated."""
        self._started.clear()
        self.bad = bad

    def running(self) -> bool:
        """True while the devices run the last step."""
        return not self._started[-1].metrics["loss"].is_ready()

    def wait(self) -> None:
        """Returns when at most one step is not done."""
        if len(self._started) > 1:
            with self._clock.waiting():
                jax.block_until_ready(self._started[-2].metrics)
            self._clock.tick()

    def last_is_finite(self) -> bool:
        """Waits for the last step."""
        with self._clock.waiting():
            return bool(jax.device_get(self._started[-1].metrics["finite"]))

    def read(self, upto: int) -> None:
        """Reports the steps up to `upto`. Raises Diverged, or Spike."""
        done = [self._started.popleft() for _ in range(len(self._started)) if self._started[0].step <= upto]
        with self._clock.waiting():
            found = jax.device_get([started.metrics for started in done])
        for (step, _, about, position), metrics in zip(done, found):
            values = {name: float(value) for name, value in metrics.items()}
            self._report.step({"step": step} | values | about)
            self._look_for_spike(step, values["loss"], position)
            self.bad = 0 if values["finite"] else self.bad + 1
            if self.bad >= self._settings.patience:
                self._report.flush()
                raise Diverged(
                    f"the loss or the gradient was not finite in {self.bad} steps in a row, up to step {step}. They "
                    f"changed nothing; the checkpoint of step {self._checkpoints.latest()} is kept. A lower "
                    "optim.learning_rate, optim.max_grad_norm or another data.seed may help; --debug_nans names the "
                    "layer"
                )

    def _look_for_spike(self, step: int, loss: float, position: dict[str, Any]) -> None:
        """Raises Spike where the loss of a step is one and there is a checkpoint to go back to.

        Only steps at which every run saves count, so that one that was stopped in between goes back as far.
        """
        median = self.spikes.median_if_spike(loss)
        if median is None:
            return
        every = self._settings.save_every
        saved = [saved for saved in self._checkpoints.steps() if saved < step and every and saved % every == 0]
        if saved and self.spikes.rewinds < self.spikes.config.rewinds:
            raise Spike(step, loss, median, max(saved), position)
        why = f"train.spikes.rewinds={self.spikes.rewinds} are done" if saved else "there is no checkpoint before it"
        self._report.line(f"{Spike(step, loss, median, step, position)}; {why}")
