"""From sources to packed batches with Grain: shuffle, process in workers, pack, batch, prefetch, and resume exactly.

Everything before packing is a pure function of an index (a `grain.MapDataset`). So the position in the data is one
number, the conversations that wait to be packed are a few, and restoring a state reads those few again.
"""

import collections
import logging
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from mllm_jax.data.pack import Budget, Packer, collate, fill
from mllm_jax.data.processor import Processor, TooLarge
from mllm_jax.data.sources import BadRecord
from mllm_jax.types import Batch, Example

log = logging.getLogger(__name__)
ENOUGH = 100  # records read before a share of bad ones says anything
OVER_BUDGET = "over the budget"


class Info(NamedTuple):
    """What a batch holds, and what was left out since the beginning of the data."""

    conversations: int
    tokens: int  # that are not padding
    patches: int  # that are not padding
    fill: dict[str, float]  # tokens and patches as shares of the batch
    kinds: list[list[str]]  # of each row's conversations, in the order of their segments
    dropped: int  # conversations over the budget
    skipped: dict[str, int]  # broken records by reason


class BadData(RuntimeError):
    """Too many records are broken, or none can be used."""


class Skipped(NamedTuple):
    """Stands in for a record that cannot be used."""

    reason: str
    message: str


def make_loader(
    sources: Any,
    processor: Processor,
    budget: Budget,
    batch_rows: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    weights: Sequence[float] | None = None,
    window: float = 4.0,
    workers: int = 1,
    processes: int = 0,
    prefetch: int = 2,
    process_index: int = 0,
    process_count: int = 1,
    strict: bool = False,
    max_bad: float = 0.05,
) -> grain.DatasetIterator:
    """An iterator of (Batch, Info) with `get_state()`, `set_state(state)` and `close()`; the state is JSON.

    Batches depend on the sources and on the options down to `window` and on the process, but never on the workers.

    Args:
        sources: one source or several: `len(source)` and `source[i] -> {"messages", "kind", "id"}`.
        processor: makes an `Example` of a conversation, and knows the size of a patch.
        budget: the shape of a batch row.
        batch_rows: B of this process.
        epochs: None repeats forever. A number reads everything so often, and fills the last batch with rows of padding.
        weights: how often to draw from each source, forever; by default all sources are one set.
        window: rows' worth of conversations that wait to be packed (see `Packer`).
        workers: threads that read and process; 0 does it in the thread that packs.
        processes: processes that do so instead, each with `workers` threads, where Python code takes the time. Sources
            must then be picklable, and the program's main module importable.
        prefetch: batches made ahead in the background; 0 makes them when asked.
        process_index, process_count: which share of every source this process reads.
        strict: a broken or too large conversation is an error, instead of being skipped and counted.
        max_bad: share of broken records, after the first 100, at which to stop.

    Raises:
        ValueError: options contradict each other, or a source has fewer records than there are processes.
        BadData: while iterating, where more than `max_bad` of the records are broken or none is usable.
    """
    sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    if weights is not None and (epochs is not None or len(weights) != len(sources)):
        raise ValueError("weights need one number for each source, and no epochs: weighted sources have no common end")

    def share(records: grain.MapDataset) -> grain.MapDataset:
        if not 0 <= process_index < process_count <= len(records):
            raise ValueError(f"process {process_index} of {process_count} has no share of {len(records)} records")
        records = records.seed(seed).shuffle() if shuffle else records
        return records[process_index::process_count].repeat(epochs)

    parts = [grain.MapDataset.source(_Guarded(source, strict)) for source in sources]
    if weights is None:
        records = share(grain.MapDataset.concatenate(parts))
    else:
        records = grain.MapDataset.mix([share(part) for part in parts], list(weights))
    identity = {  # a state belongs to these, and is refused by others
        "seed": seed,
        "shuffle": shuffle,
        "epochs": epochs,
        "weights": None if weights is None else list(weights),
        "records": [len(source) for source in sources],
        "process": [process_index, process_count],
    }
    spec = processor.spec
    values = 3 * spec.temporal_patch * spec.patch**2
    settings = _Settings(budget, batch_rows, window, workers, processes, spec.merge, values, max_bad)
    examples = records.map_with_index(_Process(processor, budget, strict))
    return iter(ThreadPrefetchIterDataset(_Packed(examples, settings, identity), prefetch_buffer_size=prefetch))


class _Guarded:
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


class _Process:
    """(index, record) -> (index, Example or Skipped); what a worker does."""

    def __init__(self, processor: Processor, budget: Budget, strict: bool):
        self.processor, self.budget, self.strict = processor, budget, strict

    def __call__(self, index: int, record: dict[str, Any] | Skipped) -> tuple[int, Example | Skipped]:
        if isinstance(record, Skipped):
            return index, record
        try:
            return index, self.processor(record["messages"], budget=self.budget)._replace(kind=record["kind"])
        except (ValueError, OSError) as error:
            if self.strict:
                error.add_note(f"in {record['id']}")
                raise
            reason = OVER_BUDGET if isinstance(error, TooLarge) else "not readable"
            return index, Skipped(reason, f"{record['id']}: {error}")


class _Settings(NamedTuple):
    budget: Budget
    batch_rows: int
    window: float
    workers: int
    processes: int
    merge: int
    values: int
    max_bad: float


class _Packed(grain.IterDataset):
    def __init__(self, examples: grain.MapDataset, settings: _Settings, identity: dict[str, Any]):
        super().__init__()
        self.examples, self.settings, self.identity = examples, settings, identity

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(self.examples, self.settings, self.identity)


class _PackedIterator(grain.DatasetIterator):
    """Batches of packed rows. State: the next index, the indices that wait, and the counts of what was left out."""

    def __init__(self, examples: grain.MapDataset, settings: _Settings, identity: dict[str, Any]):
        super().__init__()
        self._examples, self._settings, self._identity = examples, settings, identity
        self._restart(0, [], 0, {})

    def _restart(self, next_index: int, waiting: list[int], used: int, left_out: dict[str, int]) -> None:
        self._elements = None  # opened at the first use: only then do threads and processes start
        self._next, self._used, self._left_out = next_index, used, collections.Counter(left_out)
        self._packer = Packer(self._settings.budget, self._settings.window)
        with ThreadPoolExecutor(max(1, self._settings.workers)) as pool:
            for index, example in pool.map(self._examples.__getitem__, waiting):
                if isinstance(example, Skipped):
                    raise BadData(f"a conversation that waited to be packed can no longer be read: {example.message}")
                self._packer.add(index, example)

    def get_state(self) -> dict[str, Any]:
        counts = {"used": self._used, "left_out": dict(self._left_out)}
        return {"next": self._next, "waiting": self._packer.waiting, **counts, "data": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["data"] != self._identity:
            changed = {k: (v, self._identity.get(k)) for k, v in state["data"].items() if v != self._identity.get(k)}
            raise ValueError(f"cannot resume on other data: (before, now) differ in {changed}")
        self._close_elements()
        self._restart(state["next"], state["waiting"], state["used"], state["left_out"])

    def __next__(self) -> tuple[Batch, Info]:
        rows = []
        while len(rows) < self._settings.batch_rows and (row := self._next_row()):
            rows.append(row)
        if not rows:
            raise StopIteration
        return self._batch(rows)

    def close(self) -> None:
        self._close_elements()
        super().close()

    def _next_row(self) -> list[Example]:
        if self._elements is None:
            self._elements = _elements(self._examples, self._next, self._settings)
        while not self._packer.ready:
            index, example = next(self._elements, (None, None))
            if example is None:
                if not self._used:
                    raise BadData(f"none of {self._next} records can be used: {dict(self._left_out)}")
                break
            self._next += 1
            self._admit(index, example)
        return [example for _, example in self._packer.take()]

    def _admit(self, index: int, example: Example | Skipped) -> None:
        if not isinstance(example, Skipped):
            self._used += 1
            self._packer.add(index, example)
            return
        log.warning("left out: %s", example.message)
        self._left_out[example.reason] += 1
        read, bad = self._used + self._left_out.total(), self._left_out.total() - self._left_out[OVER_BUDGET]
        if read >= ENOUGH and (bad > self._settings.max_bad * read or not self._used):
            raise BadData(f"of {read} records only {self._used} can be used: {dict(self._left_out)}")

    def _batch(self, rows: list[list[Example]]) -> tuple[Batch, Info]:
        settings = self._settings
        rows += [[]] * (settings.batch_rows - len(rows))
        batch = collate(rows, settings.budget, merge=settings.merge, values=settings.values)
        skipped = dict(self._left_out)
        info = Info(
            conversations=sum(map(len, rows)),
            tokens=int(np.count_nonzero(batch.segment)),
            patches=0 if batch.vision is None else int(np.count_nonzero(batch.vision.image)),
            fill=fill(batch),
            kinds=[[example.kind for example in row] for row in rows],
            dropped=skipped.pop(OVER_BUDGET, 0),
            skipped=skipped,
        )
        return batch, info

    def _close_elements(self) -> None:
        if getattr(self, "_elements", None) is not None:
            self._elements.close()
            self._elements = None


def _elements(examples: grain.MapDataset, start: int, settings: _Settings) -> grain.DatasetIterator:
    """(index, Example or Skipped) from `start` on, in order whatever the number of workers."""
    ahead = 2 * settings.workers
    rest = examples[start:].to_iter_dataset(grain.ReadOptions(settings.workers, ahead))
    if settings.processes:
        if not flags.FLAGS.is_parsed():  # Grain hands absl's flags to its processes, and not every program uses them
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(settings.processes, per_worker_buffer_size=16)
        rest = rest.map(pickle.dumps).mp_prefetch(options).map(pickle.loads)  # arrays would fill a container's /dev/shm
    return iter(rest)
