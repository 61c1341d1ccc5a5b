"""What data workers do, and the threads or processes that do it ahead and in order, for several streams. No jax."""

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, NamedTuple

from mllm_jax.data.pack import Budget, TooLarge
from mllm_jax.data.processor import Processor
from mllm_jax.data.records import BadRecord
from mllm_jax.types import Example

OVER_BUDGET = "over the budget"
TOGETHER = 4  # elements that a process sends at once
Streams = Mapping[int, Sequence[Any]]


class Skipped(NamedTuple):
    """Stands in for a record that cannot be used."""

    reason: str
    message: str


class Guarded:
    """A source whose broken records come out as `Skipped`."""

    def __init__(self, source: Any, strict: bool):
        self.source, self.strict = source, strict

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        try:
            return self.source[index]
        except BadRecord as error:
            if self.strict:
                raise
            return Skipped(error.reason, str(error))


class Process:
    """Record -> Example or Skipped; what a worker does."""

    def __init__(self, processor: Processor, budget: Budget, strict: bool):
        self.processor, self.budget, self.strict = processor, budget, strict

    def __call__(self, record: dict[str, Any] | Skipped) -> Example | Skipped:
        if isinstance(record, Skipped):
            return record
        try:
            return self.processor(record["messages"], budget=self.budget)._replace(kind=record["kind"])
        except (ValueError, OSError) as error:
            if self.strict:
                error.add_note(f"in {record['id']}")
                raise
            reason = OVER_BUDGET if isinstance(error, TooLarge) else "not readable"
            return Skipped(reason, f"{record['id']}: {error}")


class Readers:
    """Elements of streams. Nothing starts before the first is asked for.

    Args:
        streams: random access to the elements of each stream, by its number.
        workers: threads; 0 reads what is asked for, when it is asked for.
        processes: processes instead, to which the streams are pickled.
    """

    def __init__(self, streams: Streams, workers: int, processes: int = 0):
        self._streams, self._in_processes = streams, processes > 0
        self._pool = _pool(streams, workers, processes)
        self._together = TOGETHER if processes else 1
        self._ahead = max(2, 2 * (processes or workers) // max(len(streams), 1)) if self._pool else 1  # of each stream
        self._coming: dict[int, collections.deque[Future]] = {number: collections.deque() for number in streams}
        self._read: dict[int, collections.deque[Any]] = {number: collections.deque() for number in streams}

    def next(self, stream: int, index: int) -> Any:
        """The element at `index`, which is one more than in the last call for this stream."""
        coming, read, length = self._coming[stream], self._read[stream], len(self._streams[stream])
        first = index + len(read) + self._together * len(coming)
        while len(coming) < self._ahead and first < length:
            coming.append(self._submit([(stream, i) for i in range(first, min(first + self._together, length))]))
            first += self._together
        if not read:
            read.extend(coming.popleft().result())
        return read.popleft()

    def read(self, wanted: Iterable[tuple[int, int]]) -> Iterator[Any]:
        """The elements at (stream, index)."""
        wanted = list(wanted)
        parts = [wanted[i : i + self._together] for i in range(0, len(wanted), self._together)]
        return itertools.chain.from_iterable(future.result() for future in [self._submit(part) for part in parts])

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, wanted: list[tuple[int, int]]) -> Future:
        if self._in_processes:
            return self._pool.submit(_read_here, wanted)
        if self._pool:
            return self._pool.submit(_read, self._streams, wanted)
        done = Future()
        done.set_result(_read(self._streams, wanted))
        return done


def _read(streams: Streams, wanted: list[tuple[int, int]]) -> list[Any]:
    return [streams[stream][index] for stream, index in wanted]


def _pool(streams: Streams, workers: int, processes: int) -> Executor | None:
    if processes:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of jax's threads
        return ProcessPoolExecutor(processes, context, initializer=_start, initargs=(streams,))
    return ThreadPoolExecutor(workers) if workers else None


_streams: Streams  # of a worker process


def _start(streams: Streams) -> None:
    global _streams
    _streams = streams
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which decides
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this process when its parent has ended: one that was killed cannot end its workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _read_here(wanted: list[tuple[int, int]]) -> list[Any]:
    return _read(_streams, wanted)
