"""The batches of a run: made by the host, put on the devices, with what only the host knows of them."""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import jax

from mllm_jax.common.config import ConfigError
from mllm_jax.data.records.messages import TRIMMED
from mllm_jax.train.input.pipeline import Placer
from mllm_jax.train.monitor.board import Board
from mllm_jax.train.monitor.cost import BatchCost
from mllm_jax.types import Batch

POLL = 0.02  # seconds between two looks at whether the data of the other processes have ended
_ends = itertools.count()  # of the Ends of a process; all processes make theirs in the same order


class DeviceBatch(NamedTuple):
    """A batch on the devices."""

    batch: Batch
    position: dict[str, Any]  # in the data, after this batch
    about: dict[str, float]  # FLOPs that its step needs; conversations that were left out or trimmed so far
    explained: tuple[str, ...]  # of the first batch, what a step costs
    number: int  # of the batch among those that were fetched from one position on


class Ends:
    """Agrees with the other processes on the batch at which the data of all of them have ended.

    No device waits for that: each posts the batches that it has made, and only one whose data have ended reads.
    """

    def __init__(self):
        self._board, self._since = Board(f"ends-{next(_ends)}"), None

    def post(self, number: int, ended: bool) -> None:
        """Tells the others that this process has made batch `number`, and whether it is padding alone."""
        if ended and self._since is None:
            self._since = number
        self._board.post({"made": number, "since": self._since})

    def all_by(self, number: int) -> bool:
        """Returns the same for all processes; waits, if this one's data have ended, for the batch of all others."""
        if self._since is None or self._since > number:
            return False
        while True:
            notes = self._board.read().values()
            known = [note for note in notes if note["since"] is not None or note["made"] >= number]
            if len(known) == jax.process_count():
                return all(note["since"] is not None and note["since"] <= number for note in known)
            time.sleep(POLL)


class InputPipeline:
    """This process's share of the batches of a run, from the position of `set_state`.

    A thread makes the next batch, so that a process that waits for it can be asked to stop.

    Args:
      loader: loader of `open_data`. cost: FLOPs of its batches. None: batches do not determine them.
      ends_apart: whether the data end and processes read separate shares, so that they end at different batches.
    """

    def __init__(self, loader: Any, place: Placer, cost: BatchCost | None, ends_apart: bool):
        self._loader, self._place, self._cost, self._ends_apart = loader, place, cost, ends_apart
        self._explained = False
        self._count_anew()
        self._coming: Future | None = None

    def _count_anew(self) -> None:
        self._ends, self._made = Ends() if self._ends_apart else None, 0

    def begin(self) -> None:
        """Starts to make the next batch."""
        self._coming = Future()
        threading.Thread(target=_fulfill, args=(self._coming, self.next), name="feed", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Waits for the next batch, at most this many seconds; returns whether it is ready."""
        return bool(wait([self._coming], seconds).done)

    def take(self) -> DeviceBatch | None:
        """The batch that was begun, on its way to the devices; None at the end of the data."""
        return self._coming.result()

    def all_ended(self, fetched: DeviceBatch) -> bool:
        """Returns whether the data of all processes have ended; each of them calls it once it has this batch."""
        return self._ends is not None and self._ends.all_by(fetched.number)

    def next(self) -> DeviceBatch | None:
        """The next batch, on its way to the devices; None at the end of the data."""
        batch, info = next(self._loader, (None, None))
        if batch is None:
            return None
        left_out = {"dropped": info.dropped, "skipped": sum(info.skipped.values())}
        left_out |= {name: info.noted.get(note, 0) for note, name in TRIMMED.items()}
        about, explained = {name: number for name, number in left_out.items() if number}, ()
        if self._cost is not None:
            processes = self._place.rows / batch.rows  # extrapolated from this process's share
            about["flops"] = self._cost.flops(batch, processes)
            explained = () if self._explained else tuple(self._cost.explain(batch, processes))
        self._explained = True
        self._made += 1
        if self._ends is not None:
            self._ends.post(self._made, ended=not info.conversations)
        return DeviceBatch(self._place(batch), self._loader.get_state(), about, explained, self._made)

    def get_state(self) -> dict[str, Any]:
        """The position in the data, for `set_state`."""
        return self._loader.get_state()

    def set_state(self, position: dict[str, Any]) -> None:
        """The next batch is the one after `position`, of this process or of all. Raises ConfigError: of other data."""
        try:
            self._loader.set_state(position)
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error
        self._count_anew()

    def close(self) -> None:
        """Ends reading; what is still being read for a batch that nobody waits for does not hold it up."""
        if self._coming is None or self._coming.done():
            self._loader.close()
        else:
            threading.Thread(target=self._loader.close, daemon=True).start()


def _fulfill(future: Future, make: Callable[[], Any]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)
