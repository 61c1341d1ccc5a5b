"""Accounts for the wall time of a run over all its restarts, and for the fraction that contributed to its model.

A process is in one part at a time. A checkpoint stores the account up to it, and the next start adds the time since:
steps done after the checkpoint are lost and will be repeated.
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
    "save": "saving, as far as steps wait for it",
    "evaluate": "evaluation",
    "start": "building the model, or restoring it",
    "lost": "steps that were lost, and done again",
    "down": "nothing ran",
}


class Clock:
    """The account of one process. Its parts are `PARTS`, in seconds; it begins in "start".

    Attributes:
      part: where the process is now. since: `time.monotonic()` of the last sign of life: a part that began or ended, a
      step that was finished.
    """

    def __init__(self):
        self.part, self.since = "start", time.monotonic()
        self._turned = time.perf_counter()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._waited = 0.0

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """The time of the block belongs to `part`; afterwards the process is where it was before."""
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context in which the process waits for devices or for other processes."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def enter(self, part: str) -> str:
        """Ends the part in which the process was, which is returned."""
        self._count()
        self.tick()
        before, self.part = self.part, part
        return before

    def tick(self) -> None:
        """A sign of life."""
        self.since = time.monotonic()

    def move(self, seconds: float, source: str, target: str) -> None:
        """Moves seconds from one part of the account to another."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def lose(self, since: Mapping[str, float]) -> None:
        """Counts the time of steps since an earlier account, `seconds()`, as lost."""
        now = self.seconds()
        self.move(now["steps"] - since["steps"], "steps", "lost")

    def seconds(self) -> dict[str, float]:
        """Seconds of every part up to now."""
        self._count()
        return dict(self._seconds)

    @property
    def own_seconds(self) -> float:
        """Spent in steps and input without waiting for devices or other processes: what is slow here slows all."""
        seconds = self.seconds()
        return seconds["steps"] + seconds["input"] - self._waited

    def account(self, ended: bool) -> dict[str, Any]:
        """The account that a checkpoint stores. ended: the run is complete; later time does not count as down."""
        return {"at": None if ended else time.time(), "seconds": self.seconds()}

    def resume(self, account: Mapping[str, Any], last_sign: float) -> None:
        """Takes over the account of a checkpoint, before anything but "start" was spent here.

        Args:
          last_sign: `time.time()` when the process that wrote it was last seen alive, perhaps after the checkpoint.
        """
        now, own = time.time(), self.seconds()
        began = now - sum(own.values())
        at = began if account["at"] is None else min(account["at"], began)
        alive = min(max(last_sign, at), began)
        since = {"lost": alive - at, "down": began - alive}
        self._seconds = {part: own[part] + account["seconds"].get(part, 0.0) + since.get(part, 0.0) for part in PARTS}

    def _count(self) -> None:
        now = time.perf_counter()
        self._seconds[self.part] += now - self._turned
        self._turned = now


def share(seconds: Mapping[str, float]) -> float:
    """Goodput: the share of an account that went into steps that count."""
    return seconds["steps"] / max(sum(seconds.values()), 1e-9)


def summary(seconds: Mapping[str, float]) -> str:
    """An account in a line."""
    total = max(sum(seconds.values()), 1e-9)
    parts = ", ".join(f"{name} {spent / total:.1%}" for name, spent in seconds.items() if spent / total >= 5e-4)
    return f"goodput {share(seconds):.1%} of {hours(total)}: {parts}"
