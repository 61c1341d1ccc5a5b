"""The input pipeline of a run: makes batches on the host, one ahead, and puts them on the devices."""

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

POLL = 0.02  # seconds between checks whether the data of the other processes have ended
_ends = itertools.count()  # numbers the `Ends` of a process, which all processes create in the same order


class DeviceBatch(NamedTuple):
    """A batch on the devices, with its position in the data."""

    batch: Batch
    position: dict[str, Any]  # position in the data after this batch
    about: dict[str, float]  # FLOPs of its step; conversations left out or trimmed so far
    explained: tuple[str, ...]  # lines on the cost of a step, with the first batch only
    number: int  # number of the batch since the last `set_state`, from 1


class Ends:
    """Agrees with the other processes on the batch at which the data of all of them have ended.

    Devices need not wait: each process posts the number of its newest batch, and only a process whose data have ended
    reads the posts of the others.
    """

    def __init__(self):
        self._board, self._ended_at = Board(f"ends-{next(_ends)}"), None

    def post(self, number: int, ended: bool) -> None:
        """Posts that this process has made batch `number`. ended: it contains only padding."""
        if ended and self._ended_at is None:
            self._ended_at = number
        self._board.post({"made": number, "since": self._ended_at})

    def all_by(self, number: int) -> bool:
        """Returns True on all processes if all data have ended by batch `number`. May wait until all have made it."""
        if self._ended_at is None or self._ended_at > number:
            return False
        while True:
            notes = self._board.read().values()
            arrived = [note for note in notes if note["since"] is not None or note["made"] >= number]
            if len(arrived) == jax.process_count():
                return all(note["since"] is not None and note["since"] <= number for note in arrived)
            time.sleep(POLL)


class InputPipeline:
    """Makes this process's share of the batches of a run, from the position of `set_state`.

    A thread makes the next batch, so that the main thread can react to a stop signal while it waits.

    Args:
      loader: loader of `open_data`. place: puts a batch on the devices.
      cost: counter of FLOPs per batch. None: they do not follow from the batch.
      ends_apart: True if the data end and processes read separate shares, which may end at different batches.
    """

    def __init__(self, loader: Any, place: Placer, cost: BatchCost | None, ends_apart: bool):
        self._loader, self._place, self._cost, self._ends_apart = loader, place, cost, ends_apart
        self._explained = False
        self._reset_count()
        self._next_batch: Future | None = None

    def _reset_count(self) -> None:
        self._ends, self._made = Ends() if self._ends_apart else None, 0

    def begin(self) -> None:
        """Starts to make the next batch."""
        self._next_batch = Future()
        threading.Thread(target=_set_result, args=(self._next_batch, self.next), name="feed", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Waits for the next batch, at most `seconds`. Returns whether it is ready."""
        return bool(wait([self._next_batch], seconds).done)

    def take(self) -> DeviceBatch | None:
        """Returns the batch that `begin` started, in transfer to the devices. None: the data have ended."""
        return self._next_batch.result()

    def all_ended(self, fetched: DeviceBatch) -> bool:
        """Returns whether the data of all processes have ended. Every process must call it with each batch."""
        return self._ends is not None and self._ends.all_by(fetched.number)

    def next(self) -> DeviceBatch | None:
        """Makes the next batch and starts its transfer to the devices. Returns None if the data have ended."""
        batch, info = next(self._loader, (None, None))
        if batch is None:
            return None
        counts = {"dropped": info.dropped, "skipped": sum(info.skipped.values())}
        counts |= {name: info.noted.get(key, 0) for key, name in TRIMMED.items()}
        statistics, cost_lines = {name: number for name, number in counts.items() if number}, ()
        if self._cost is not None:
            num_shares = self._place.rows / batch.rows  # to extrapolate from this process's share
            statistics["flops"] = self._cost.flops(batch, num_shares)
            cost_lines = () if self._explained else tuple(self._cost.explain(batch, num_shares))
        self._explained = True
        self._made += 1
        if self._ends is not None:
            self._ends.post(self._made, ended=not info.conversations)
        return DeviceBatch(self._place(batch), self._loader.get_state(), statistics, cost_lines, self._made)

    def get_state(self) -> dict[str, Any]:
        """Returns the position in the data, for `set_state`."""
        return self._loader.get_state()

    def set_state(self, position: dict[str, Any]) -> None:
        """Continues after `position`, of this process or of all. Raises ConfigError if it belongs to other data."""
        try:
            self._loader.set_state(position)
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error
        self._reset_count()

    def close(self) -> None:
        """Stops reading, without waiting for a batch that is being made."""
        if self._next_batch is None or self._next_batch.done():
            self._loader.close()
        else:
            threading.Thread(target=self._loader.close, daemon=True).start()


def _set_result(future: Future, make: Callable[[], Any]) -> None:
    try:
        future.set_result(make())
    except BaseException as error:
        future.set_exception(error)
