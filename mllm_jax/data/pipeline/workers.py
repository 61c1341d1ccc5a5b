"""Work of data workers, and the threads or processes that do it ahead and in order, for several streams. No jax."""

import collections
import itertools
import multiprocessing
import multiprocessing.context
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from mllm_jax.common.interrupts import held_back
from mllm_jax.data.pipeline.dual_processor import DualProcessor
from mllm_jax.data.pipeline.packing import Budget, TooLarge
from mllm_jax.data.pipeline.preference import Pairs
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.reward import PpoPrompts, RewardPairs
from mllm_jax.data.records.records import BadRecord
from mllm_jax.types import Example

OVER_BUDGET = "over the budget"
LOOK = 2.0  # seconds between two looks at whether the workers live, while one of them is waited for
TOGETHER = 4  # elements that a process sends at once
Streams = Mapping[int, Sequence[Any]]
Reading = Pairs | RewardPairs | PpoPrompts


class Skipped(NamedTuple):
    """Stands in for a record that cannot be used."""

    reason: str
    message: str


class WorkerLost(RuntimeError):
    """A worker process has ended from outside."""

    exit_code = 75  # of a run that the same command resumes, see `mllm_jax.train.monitor.processes.AGAIN`


class SkipBadRecords:
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
    """Record -> Example or Skipped; what a worker does.

    reading: how records are read; None = as conversations to learn from, with the chosen answer of a pair.
    """

    def __init__(
        self, processor: Processor | DualProcessor, budget: Budget, strict: bool, reading: Reading | None = None
    ):
        self.processor, self.budget, self.strict, self.reading = processor, budget, strict, reading

    def __call__(self, record: dict[str, Any] | Skipped) -> Example | Skipped:
        if isinstance(record, Skipped):
            return record
        try:
            example = self._example(record)
            return example._replace(notes=(*example.notes, *record.get("notes", ())))
        except BadRecord as error:
            if self.strict:
                raise
            return Skipped(error.reason, str(error))
        except (ValueError, OSError, OverflowError, RecursionError) as error:
            if self.strict:
                error.add_note(f"in {record['id']}")
                raise
            reason = OVER_BUDGET if isinstance(error, TooLarge) else "not readable"
            return Skipped(reason, str(BadRecord(reason, record["id"], str(error))))

    def _example(self, record: dict[str, Any]) -> Example:
        if self.reading is None:
            return self.processor.example(record, self.budget)._replace(kind=record["kind"])
        return self.reading(self.processor, record, self.budget)


class Interleaved:
    """Elements of several sets as one, by place x number of sets + set. It can be sent to another process."""

    def __init__(self, sets: Sequence[Sequence[Any]]):
        self.sets = sets

    def __getitem__(self, key: int) -> Any:
        place, number = divmod(key, len(self.sets))
        return self.sets[number][place]


class Readers:
    """Elements of streams. Nothing starts before the first is asked for.

    Args:
        streams: random access to the elements of each stream, by its number.
        workers: threads; 0 reads what is asked for, when it is asked for.
        processes: processes instead, to which the streams are pickled.
    """

    def __init__(self, streams: Streams, workers: int, processes: int = 0):
        self._streams, self._in_processes = streams, processes > 0
        self._workers = Workers()
        self._pool = _pool(streams, workers, processes, self._workers)
        self._together = TOGETHER if processes else 1
        parts = max(2, 2 * (processes or workers) // max(len(streams), 1)) if self._pool else 1
        self.ahead = parts * self._together  # elements of each stream that are worth knowing before they are needed
        # Of each stream: (key, future of its part, index in that).
        self._coming: dict[int, collections.deque[tuple[int, Future, int]]] = {n: collections.deque() for n in streams}

    def next(self, stream: int, keys: Sequence[int]) -> Any:
        """The element at the first of the keys that come next. Those after it are read ahead.

        What was read ahead for other keys is forgotten.
        """
        coming = self._coming[stream]
        known = sum(1 for _ in itertools.takewhile(lambda pair: pair[0][0] == pair[1], zip(coming, keys)))
        while len(coming) > known:
            coming.pop()
        keys = keys[known : self.ahead]
        while len(keys) >= self._together or (keys and not coming):
            part, keys = keys[: self._together], keys[self._together :]
            future = self._submit([(stream, key) for key in part])
            coming.extend((key, future, place) for place, key in enumerate(part))
        _, future, place = coming.popleft()
        return self._result(future)[place]

    def read(self, wanted: Iterable[tuple[int, int]]) -> Iterator[Any]:
        """The elements at (stream, key)."""
        wanted = list(wanted)
        parts = [wanted[i : i + self._together] for i in range(0, len(wanted), self._together)]
        return itertools.chain.from_iterable(self._result(future) for future in [self._submit(part) for part in parts])

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _result(self, future: Future) -> list[Any]:
        """Returns what a worker has read. Raises WorkerLost where one was killed.

        The pool itself does not notice a worker that is killed while it sends a result.
        """
        while not wait([future], LOOK).done:
            if self._in_processes and self._workers.lost() and not wait([future], LOOK).done:
                raise _lost()
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise _lost() from error

    def _submit(self, wanted: list[tuple[int, int]]) -> Future:
        if self._in_processes:
            try:
                return self._pool.submit(_read_here, wanted)
            except BrokenProcessPool as error:
                raise _lost() from error
        if self._pool:
            return self._pool.submit(_read, self._streams, wanted)
        done = Future()
        done.set_result(_read(self._streams, wanted))
        return done


class DeafProcess(multiprocessing.context.SpawnProcess):
    """A process that does not hear Ctrl-C, from its first import on: its parent hears it, too, and decides."""

    def start(self) -> None:
        multiprocessing.resource_tracker.ensure_running()  # which unblocks what is blocked next
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with held_back():
                super().start()  # and inherits what is blocked
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Workers(multiprocessing.context.SpawnContext):
    """Starts processes and keeps them; a fork would copy the locks of jax's threads."""

    def __init__(self):
        super().__init__()
        self._made: list[DeafProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> DeafProcess:
        self._made.append(DeafProcess(*args, **kwargs))
        return self._made[-1]

    def lost(self) -> bool:
        return any(process.exitcode is not None for process in self._made)

    def kill(self) -> None:
        """Ends the processes that were started, before what they read from is gone."""
        for process in self._made:
            if process.pid is not None:
                process.kill()


def _lost() -> WorkerLost:
    return WorkerLost(
        "a data worker was killed, perhaps because the memory of this machine is full. The same command resumes "
        "from the last checkpoint; fewer config.data.processes need less memory"
    )


def _read(streams: Streams, wanted: list[tuple[int, int]]) -> list[Any]:
    return [streams[stream][key] for stream, key in wanted]


def _pool(streams: Streams, workers: int, processes: int, context: Workers) -> Executor | None:
    if processes:
        return ProcessPoolExecutor(processes, context, initializer=_start, initargs=(streams,))
    return ThreadPoolExecutor(workers) if workers else None


_streams: Streams  # of a worker process


def _start(streams: Streams) -> None:
    global _streams
    _streams = streams
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this process when its parent has ended: one that was killed cannot end its workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _read_here(wanted: list[tuple[int, int]]) -> list[Any]:
    return _read(_streams, wanted)
