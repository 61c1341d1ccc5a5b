"""Accounts for the wall time of a run over all its restarts, and computes its goodput.

A process is in one part of `PARTS` at a time. A checkpoint stores the account up to it, and the next start adds the
time since then: steps after the checkpoint are lost and repeated.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mllm_jax.common.format import hours

PARTS = {
    "steps": "steps that count",
    "compile": "compilation, with the first step",
    "input": "devices without a batch",
    "save": "saving, while steps wait for it",
    "evaluate": "evaluation",
    "start": "building or restoring the model",
    "lost": "steps that were lost and repeated",
    "down": "nothing ran",
}


class Clock:
    """Measures the seconds that one process spends in each of `PARTS`, beginning in "start".

    Attributes:
      part: the current part.
      since: `time.monotonic()` of the last sign of life: a part began or ended, or a step was finished.
    """

    def __init__(self):
        self.part, self.since = "start", time.monotonic()
        self._turned = time.perf_counter()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._waited = 0.0

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Counts the time of the block as `part`, and then returns to the previous part."""
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for devices or other processes."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def enter(self, part: str) -> str:
        """Begins a part. Returns the previous one."""
        self._count()
        self.tick()
        before, self.part = self.part, part
        return before

    def tick(self) -> None:
        """Records a sign of life."""
        self.since = time.monotonic()

    def move(self, seconds: float, source: str, target: str) -> None:
        """Moves seconds from one part to another, to which they turned out to belong."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def lose(self, since: Mapping[str, float]) -> None:
        """Counts the time of all steps after an earlier account (a result of `seconds()`) as lost."""
        now = self.seconds()
        self.move(now["steps"] - since["steps"], "steps", "lost")

    def seconds(self) -> dict[str, float]:
        """Returns the seconds spent in each part until now."""
        self._count()
        return dict(self._seconds)

    @property
    def own_seconds(self) -> float:
        """Seconds of this host's own work in steps and input, without waiting: a slow host slows all processes."""
        seconds = self.seconds()
        return seconds["steps"] + seconds["input"] - self._waited

    def account(self, ended: bool) -> dict[str, Any]:
        """Returns the account to store in a checkpoint.

        Args:
          ended: True if the run is complete, so that the time after it does not count as down.
        """
        return {"at": None if ended else time.time(), "seconds": self.seconds()}

    def resume(self, account: Mapping[str, Any], last_sign: float) -> None:
        """Adds the account of a checkpoint, before this process has left the part "start".

        The time from the checkpoint to `last_sign` counts as lost, and from then to the start of this process as down.

        Args:
          last_sign: `time.time()` of the last sign of life of the process that wrote the account.
        """
        now, own = time.time(), self.seconds()
        began = now - sum(own.values())
        saved = began if account["at"] is None else min(account["at"], began)
        alive = min(max(last_sign, saved), began)
        between = {"lost": alive - saved, "down": began - alive}
        self._seconds = {part: own[part] + account["seconds"].get(part, 0.0) + between.get(part, 0.0) for part in PARTS}

    def _count(self) -> None:
        now = time.perf_counter()
        self._seconds[self.part] += now - self._turned
        self._turned = now


def share(seconds: Mapping[str, float]) -> float:
    """Returns the goodput: the share of an account's time spent on steps that count."""
    return seconds["steps"] / max(sum(seconds.values()), 1e-9)


def summary(seconds: Mapping[str, float]) -> str:
    """Returns an account as one line of text."""
    total = max(sum(seconds.values()), 1e-9)
    parts = ", ".join(f"{name} {spent / total:.1%}" for name, spent in seconds.items() if spent / total >= 5e-4)
    return f"goodput {share(seconds):.1%} of {hours(total)}: {parts}"
