"""Random access to the records of files, whatever their format: what a format must offer, and many files as one set."""

import abc
import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.data.media import BadName, locate
from mllm_jax.data.records.fields import Bad
from mllm_jax.data.records.parts import Find
from mllm_jax.data.records.records import BadRecord, labels, read_record

OPENED_AT_ONCE = 16


@contextlib.contextmanager
def finding() -> Iterator[None]:
    """A record is bad that names a file by a name which leads to none."""
    try:
        yield
    except BadName as error:
        raise Bad(*error.args) from error.__cause__


class Shard(abc.ABC):
    """The records of one file. It can be sent to another process, and several threads may read it.

    Args:
        path: the file.
        root: folder that the paths in records are relative to, and must not leave.
    """

    def __init__(self, path: Path, root: Path):
        self.path, self.root = path, root

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, index: int) -> tuple[Any, Find]:
        """A record as it is written, and what finds the files that it names. Raises BadRecord."""

    def name(self, index: int) -> str:
        """Name of a record without an id."""
        return f"{self.path.name}:{index}"

    def fields(self, names: Sequence[str]) -> Iterator[Any]:
        """At least the named fields of every record, in order; None of one that cannot be read."""
        for index in range(len(self)):
            try:
                yield self.read(index)[0]
            except BadRecord:
                yield None

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read_item(index)[1]

    def read_item(self, index: int) -> tuple[Any, dict[str, Any]]:
        """A record as it is written, and as an item. Raises BadRecord, whatever is wrong with it."""
        try:
            record, find = self.read(index)
            return record, read_record(record, self.name(index), find)
        except BadRecord:
            raise
        except Exception as error:  # what strangers wrote may raise anything, and must not end a run
            detail = f"{type(error).__name__}: {error!s:.200}"
            raise BadRecord("not readable", self.name(index), detail) from error

    def find(self, value: Any) -> str | bytes:
        """The path of a file below the root, or the bytes that a data URI holds."""
        with finding():
            return locate(self.root, value)


class Conversations:
    """Conversations and documents of several shards, one after the other.

    An item is {"messages", "kind", "id"}; see `read_record` of data/records/records.py, also for its errors.

    Args:
        where: keeps the records whose fields have these values, as in {"split": "train", "task": ("vqa", "ocr")}.
          Finding
            them takes one pass over all records.

    Raises:
        ValueError: no record is left.
    """

    def __init__(self, shards: Sequence[Shard], where: Mapping[str, Any] | None = None):
        self.shards = list(shards)
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        self._kept = None if not where else np.array(list(_matching(self.shards, where)), np.int64)
        if not len(self):
            names = ", ".join(str(shard.path) for shard in self.shards[:3])
            raise ValueError(f"{names} has no record" + (f" where {dict(where)}" if where else ""))

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, place = self._place(index)
        return shard[place]

    def labeled(self, index: int) -> dict[str, Any]:
        """An item, and its fields that `where` may select by."""
        shard, place = self._place(index)
        record, item = shard.read_item(place)
        return labels(record) | item

    def _place(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = index if self._kept is None else int(self._kept[index])
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return self.shards[shard], number - (int(self._ends[shard - 1]) if shard else 0)


def open_shards(kind: type[Shard], paths: Sequence[Path], root: Path | None) -> list[Shard]:
    """The files at these paths; their folders are the roots unless one is given."""
    opened = partial(_opened, kind, root)
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        return list(pool.map(opened, paths))


def _opened(kind: type[Shard], root: Path | None, path: Path) -> Shard:
    return kind(path, Path(path.parent if root is None else root).resolve())


def _matching(shards: Sequence[Shard], where: Mapping[str, Any]) -> Iterator[int]:
    """Numbers of the records that have the wanted fields. A broken one does: it shall be counted when it is read."""
    listed = lambda value: tuple(value) if isinstance(value, tuple | list | set) else (value,)
    wanted = {key: listed(value) for key, value in where.items()}
    records = itertools.chain.from_iterable(shard.fields(list(wanted)) for shard in shards)
    for number, record in enumerate(records):
        if not isinstance(record, Mapping) or all(record.get(key) in values for key, values in wanted.items()):
            yield number
