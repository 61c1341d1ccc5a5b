"""Loader from sources to packed batches with Grain: shuffle, process in workers, pack, batch, prefetch, resume exactly.

The rows of a batch come from a fixed number of *streams*. Stream s of S reads every S-th record from s on and packs its
own rows; a process runs the streams of its own rows. So a batch depends only on the seed and on its number, not on the
number of processes or workers.

Everything before packing is a pure function of an index (a `grain.MapDataset`). So the position of a stream is one
number per source and the few conversations that wait to be packed; restoring a state reads only those again.
"""

import collections
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from mllm_jax.data.pipeline.dual_processor import DualProcessor
from mllm_jax.data.pipeline.packing import Budget, Packer, fill
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.workers import OVER_BUDGET, Interleaved, Process, Readers, Reading, SkipBadRecords, Skipped
from mllm_jax.data.records.records import BadData
from mllm_jax.data.sources.mixture import Mixture, start_of
from mllm_jax.types import Batch, DualBatch, Example

log = logging.getLogger(__name__)
ENOUGH = 100  # records to read before the fraction of bad ones is checked
NOTES = 64  # largest number of different notes that a stream counts
OTHER = "more fields are not read"


class Info(NamedTuple):
    """Counts of a batch, and of the records skipped since the beginning of the data."""

    conversations: int
    tokens: int  # without padding
    patches: int  # without padding
    fill: dict[str, float]  # fraction of tokens, patches and image slots that are not padding
    kinds: list[list[str]]  # kinds of the conversations in each row, by segment
    dropped: int  # conversations over the budget
    skipped: dict[str, int]  # broken records by reason
    noted: dict[str, int] = {}  # records that were used in part, by the part that was left out
    waiting: float = 0.0  # conversations that wait to be packed, as a number of rows, mean over the streams


def make_loader(
    source: Any,
    processor: Processor | DualProcessor,
    budget: Budget,
    batch_rows: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    window: float = 4.0,
    streams: int = 1,
    workers: int = 1,
    processes: int = 0,
    prefetch: int = 2,
    process_index: int = 0,
    process_count: int = 1,
    fail_on_bad_record: bool = False,
    max_bad_fraction: float = 0.05,
    reading: Reading | None = None,
) -> grain.DatasetIterator:
    """Returns an iterator of (Batch or DualBatch, Info) with `get_state()`, `set_state(state)` and `close()`.

    The state is JSON. Batches depend on the source and on the options down to `streams`, not on processes or workers.
    The states of all processes, joined by `join_states`, are a state for any number of processes. At the end of the
    data the `value` of StopIteration is the last state, which also counts the records after those of the last batch.

    Args:
        source: `len(source)` and `source[i] -> {"messages", "kind", "id"}`; a list of them, read as one set; or a
            `Mixture`, which draws by weight.
        processor: makes an `Example` of a record, and a batch of rows of them; its kind is that of the model.
        budget: the shape of a batch row.
        batch_rows: B, over all processes.
        epochs: number of passes over the data, the last batches filled with padding rows. None: repeat forever.
        window: number of rows whose conversations wait to be packed in every stream (see `Packer`).
        streams: S, which divides B; stream s feeds rows s B/S to (s + 1) B/S.
        workers: number of threads that read and process. 0: the thread that packs.
        processes: number of processes that do so instead, for slow Python code. Sources must then be picklable, and the
            program's main module importable.
        prefetch: number of batches made ahead in the background. 0: on demand.
        process_index, process_count: the share of the rows, and so of the streams, that this process makes. One of
          several
            processes continues with rows of padding after the end of its data, since that of others may come later.
        fail_on_bad_record: whether a broken or too large conversation is an error, instead of being skipped and
          counted.
        max_bad_fraction: fraction of broken records, after the first 100, above which the loader stops.
        reading: how records are read: `preference.Pairs`, `RewardPairs` or `PpoPrompts`. None: as conversations.

    Raises:
        ValueError: options contradict each other.
        BadData: while iterating, if more than `max_bad_fraction` of the records are broken or none is usable.
    """
    mixed = isinstance(source, Mixture)
    sources = source.sources if mixed else list(source) if isinstance(source, (list, tuple)) else [source]
    if mixed and epochs is not None:
        raise ValueError(f"epochs={epochs}: the sources of a mixture have no common end. Leave it out.")
    if batch_rows % streams or streams % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"streams={streams}: must divide batch_rows={batch_rows} and be a multiple of "
            f"process_count={process_count}, and process_index={process_index} must be below that."
        )

    parts = [grain.MapDataset.source(SkipBadRecords(source, fail_on_bad_record)) for source in sources]
    parts = parts if mixed else [grain.MapDataset.concatenate(parts)]
    orders = [(part.seed(seed).shuffle() if shuffle else part).repeat(epochs) for part in parts]
    process = Process(processor, budget, fail_on_bad_record, reading)

    mixture, share = source if mixed else Mixture(orders, [1.0]), streams // process_count
    shares = {
        # Every stream draws from the full mixture, so that its speed does not change the weights.
        stream: _Share([order[stream::streams].map(process) for order in orders], mixture, start_of(seed, stream))
        for stream in range(process_index * share, (process_index + 1) * share)
    }
    identity = {  # a loader refuses a state with another identity
        "seed": seed,
        "shuffle": shuffle,
        "weights": {str(batch): list(weights) for batch, weights in mixture.weights.items()},
        "records": [len(source) for source in sources],
        "budget": list(budget),
        "window": window,
        "streams": streams,
        "rows": batch_rows,
    }
    collate = processor.collate
    if reading and reading.references is not None:
        collate = partial(collate, references=True)
    one_example_per_row = bool(reading and reading.one_example_per_row)
    settings = _Settings(
        budget,
        batch_rows // streams,
        window,
        one_example_per_row,
        workers,
        processes,
        collate,
        max_bad_fraction,
        endless=process_count > 1,
    )
    return iter(ThreadPrefetchIterDataset(_Packed(shares, settings, identity), prefetch_buffer_size=prefetch))


def join_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins the states of all processes' loaders to the state of all streams."""
    states = list(states)
    streams = {name: stream for state in states for name, stream in state["streams"].items()}
    return {"streams": {name: streams[name] for name in sorted(streams, key=int)}, "data": states[0]["data"]}


class _Settings(NamedTuple):
    budget: Budget
    rows: int  # of a stream in a batch
    window: float
    one_example_per_row: bool  # a row holds one example
    workers: int
    processes: int
    collate: Callable[[list[list[Example]], Budget], Batch | DualBatch]
    max_bad_fraction: float
    endless: bool  # batches of padding after the end of the data


class _Share(NamedTuple):
    """The records that a stream reads."""

    examples: list[grain.MapDataset]  # of each source
    mixture: Mixture
    start: int  # of the points that choose the sources


class _Packed(grain.IterDataset):
    def __init__(self, streams: Mapping[int, _Share], settings: _Settings, identity: dict[str, Any]):
        super().__init__()
        self.streams, self.settings, self.identity = streams, settings, identity

    def __iter__(self) -> "_PackedIterator":
        return _PackedIterator(self.streams, self.settings, self.identity)


class _Stream:
    """One stream.

    Its state: the number of records drawn from each source, the number of batches, the keys (see `Interleaved`) of the
    conversations that wait to be packed, and the counts of skipped records.
    """

    def __init__(self, number: int, share: _Share, settings: _Settings):
        self.number, self._share = number, share
        self._length = sys.maxsize if len(share.examples) > 1 else len(share.examples[0])
        self.drawn, self.batches = [0] * len(share.examples), 0
        self.used, self.left_out, self.noted = 0, collections.Counter(), collections.Counter()
        self.packer = Packer(settings.budget, settings.window, settings.one_example_per_row)

    @property
    def needs_data(self) -> bool:
        return not self.packer.ready and sum(self.drawn) < self._length

    def get_state(self) -> dict[str, Any]:
        counts = {"used": self.used, "left_out": dict(self.left_out), "noted": dict(self.noted)}
        return {"drawn": list(self.drawn), "batches": self.batches, "waiting": self.packer.waiting, **counts}

    def set_state(self, state: Mapping[str, Any], waiting: Iterable[Example | Skipped]) -> None:
        self.drawn, self.batches = list(state["drawn"]), state["batches"]
        self.used, self.left_out = state["used"], collections.Counter(state["left_out"])
        self.noted = collections.Counter(state["noted"])
        for key, example in zip(state["waiting"], waiting):
            if isinstance(example, Skipped):
                raise BadData(f"a conversation that waited to be packed can no longer be read: {example.message}")
            self.packer.add(key, example)

    def keys(self, count: int) -> list[int]:
        """Returns the keys of the next records under the current weights; fewer at the end of the data."""
        drawn, first, keys = list(self.drawn), sum(self.drawn), []
        for number in range(first, min(first + count, self._length)):
            source = self._share.mixture.source(self._share.start, number, self.batches)
            keys.append(drawn[source] * len(drawn) + source)
            drawn[source] += 1
        return keys

    def add(self, key: int, example: Example | Skipped) -> None:
        """Adds the example of the next key, or counts it as skipped."""
        if isinstance(example, Skipped):
            log.warning("left out: %s", example.message, extra={"reason": example.reason})
            self.left_out[example.reason] += 1
        else:
            self.used += 1
            for note in example.notes:
                self.noted[note if note in self.noted or len(self.noted) < NOTES else OTHER] += 1
            self.packer.add(key, example)
        self.drawn[key % len(self.drawn)] += 1


class _PackedIterator(grain.DatasetIterator):
    """Batches of packed rows."""

    def __init__(self, streams: Mapping[int, _Share], settings: _Settings, identity: dict[str, Any]):
        super().__init__()
        self._shares, self._settings, self._identity = streams, settings, identity
        self._logged: collections.Counter[str] = collections.Counter()
        self._open()

    def _open(self) -> None:
        self._streams = [_Stream(number, share, self._settings) for number, share in self._shares.items()]
        examples = {number: Interleaved(share.examples) for number, share in self._shares.items()}
        self._readers = Readers(examples, self._settings.workers, self._settings.processes)

    def get_state(self) -> dict[str, Any]:
        return {"streams": {str(stream.number): stream.get_state() for stream in self._streams}, "data": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["data"] != self._identity:
            changed = {k: (v, self._identity.get(k)) for k, v in state["data"].items() if v != self._identity.get(k)}
            raise ValueError(
                f"the state belongs to other data: (saved, current) values differ in {changed}. Restore the saved ones."
            )
        self._readers.close()
        self._open()
        states = {stream: state["streams"][str(stream.number)] for stream in self._streams}
        wanted = [(stream.number, key) for stream, part in states.items() for key in part["waiting"]]
        waiting = self._readers.read(wanted)
        for stream, part in states.items():
            stream.set_state(part, itertools.islice(waiting, len(part["waiting"])))

    def __next__(self) -> tuple[Batch | DualBatch, Info]:
        rows = {stream: [] for stream in self._streams}
        for _ in range(self._settings.rows):
            self._read()
            for stream in self._streams:
                rows[stream].append([example for _, example in stream.packer.take()])
        for stream in self._streams:
            stream.batches += 1
        rows = [row for of_stream in rows.values() for row in of_stream]
        if not any(rows) and not self._settings.endless:
            raise StopIteration(self.get_state())  # the last records may be broken ones, which no batch counts
        return self._batch(rows)

    def close(self) -> None:
        self._readers.close()
        super().close()

    def _read(self) -> None:
        """Reads until every stream can fill a row, or is at the end of its data."""
        while needs_data := [stream for stream in self._streams if stream.needs_data]:
            for stream in needs_data:  # in turn, so that the workers have something to do for all of them
                keys = stream.keys(self._readers.ahead)
                stream.add(keys[0], self._readers.next(stream.number, keys))
            self._check_bad_records()

    def _check_bad_records(self) -> None:
        """Raises BadData where too many records are broken, or none is usable."""
        used, left_out = self._counts()
        read, bad = used + left_out.total(), left_out.total() - left_out[OVER_BUDGET]
        ended = not any(stream.needs_data for stream in self._streams)
        if (read >= ENOUGH and bad > self._settings.max_bad_fraction * read) or (
            not used and (read >= ENOUGH or ended)
        ):
            raise BadData(f"of {read} records only {used} can be used: {dict(left_out)}")

    def _noted(self) -> dict[str, int]:
        """Returns the number of records that were used in part, by the part that was left out, and logs its growth."""
        noted = sum((stream.noted for stream in self._streams), collections.Counter())
        for note, count in noted.items():
            self._log_growth(note, count)
        return dict(noted)

    def _log_growth(self, what: str, count: int) -> None:
        """Logs a count of records when it reaches ten times the last logged one."""
        if count >= 10 * self._logged[what]:
            self._logged[what] = 10 ** (len(str(count)) - 1)
            log.warning("%s (records so far: %s)", what, f"{count:,}")

    def _counts(self) -> tuple[int, collections.Counter]:
        """Returns the number of conversations that were used, and of skipped ones by reason."""
        left_out = sum((stream.left_out for stream in self._streams), collections.Counter())
        return sum(stream.used for stream in self._streams), left_out

    def _batch(self, rows: list[list[Example]]) -> tuple[Batch | DualBatch, Info]:
        settings = self._settings
        batch = settings.collate(rows, settings.budget)
        skipped = dict(self._counts()[1])
        for reason, count in skipped.items():
            if count >= 10:  # each of them has been logged
                self._log_growth(f"left out as {reason}", count)
        kinds = [[example.kind for example in row for _ in example.lengths or (0,)] for row in rows]
        info = Info(
            conversations=sum(map(len, kinds)),
            tokens=int(np.count_nonzero(batch.segment)),
            patches=0 if batch.vision is None else int(np.count_nonzero(batch.vision.image)),
            fill=fill(batch),
            kinds=kinds,
            dropped=skipped.pop(OVER_BUDGET, 0),
            skipped=skipped,
            noted=self._noted(),
            waiting=float(np.mean([stream.packer.load for stream in self._streams])),
        )
        return batch, info
