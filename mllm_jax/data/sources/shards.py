"""Random access to the records of files: the interface of a file format, and sets of many files."""

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
    """Raises BadName, for a name that resolves to no file, as Bad, the error of a record."""
    try:
        yield
    except BadName as error:
        raise Bad(*error.args) from error.__cause__


class Shard(abc.ABC):
    """Records of one file. Shards can be pickled, and are safe for reads from several threads.

    Args:
        path: path of the file.
        root: folder of relative paths in records, which must stay below it.
    """

    def __init__(self, path: Path, root: Path):
        self.path, self.root = path, root

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, index: int) -> tuple[Any, Find]:
        """Returns a record as stored, and a function that finds the files that it names. Raises BadRecord."""

    def name(self, index: int) -> str:
        """Returns the name of a record without an id."""
        return f"{self.path.name}:{index}"

    def fields(self, names: Sequence[str]) -> Iterator[Any]:
        """Yields at least the named fields of every record, in order; None for an unreadable record."""
        for index in range(len(self)):
            try:
                yield self.read(index)[0]
            except BadRecord:
                yield None

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read_item(index)[1]

    def read_item(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Returns a record as stored and as an item. Raises BadRecord for any fault of the record."""
        try:
            record, find = self.read(index)
            return record, read_record(record, self.name(index), find)
        except BadRecord:
            raise
        except Exception as error:  # a malformed record may raise anything, and must not end a run
            detail = f"{type(error).__name__}: {error!s:.200}"
            raise BadRecord("not readable", self.name(index), detail) from error

    def find(self, value: Any) -> str | bytes:
        """Returns the path of a file below the root, or the bytes of a data URI or of base64."""
        with finding():
            return locate(self.root, value)


class Conversations:
    """Concatenated conversations and documents of several shards.

    An item is {"messages", "kind", "id"}; see `read_record` of data/records/records.py for its fields and errors.

    Args:
        shards: shards, in order.
        where: field values of the records to keep, as in {"split": "train", "task": ("vqa", "ocr")}. Finding these
            records takes one pass over all records.

    Raises:
        ValueError: no record is left.
    """

    def __init__(self, shards: Sequence[Shard], where: Mapping[str, Any] | None = None):
        self.shards = list(shards)
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        self._kept = None if not where else np.array(list(_matching(self.shards, where)), np.int64)
        if not len(self):
            names = ", ".join(str(shard.path) for shard in self.shards[:3])
            raise ValueError(f"{names}: no records" + (f" where {dict(where)}. Change `where`." if where else "."))

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, place = self._place(index)
        return shard[place]

    def labeled(self, index: int) -> dict[str, Any]:
        """Returns an item together with the fields of its record that `where` may select by."""
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
    """Opens the files at these paths. `root` None: the root of each file is its folder."""
    opened = partial(_opened, kind, root)
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        return list(pool.map(opened, paths))


def _opened(kind: type[Shard], root: Path | None, path: Path) -> Shard:
    return kind(path, Path(path.parent if root is None else root).resolve())


def _matching(shards: Sequence[Shard], where: Mapping[str, Any]) -> Iterator[int]:
    """Yields the numbers of records with the wanted fields, and of broken records, which are counted when read."""
    listed = lambda value: tuple(value) if isinstance(value, tuple | list | set) else (value,)
    wanted = {key: listed(value) for key, value in where.items()}
    records = itertools.chain.from_iterable(shard.fields(list(wanted)) for shard in shards)
    for number, record in enumerate(records):
        if not isinstance(record, Mapping) or all(record.get(key) in values for key, values in wanted.items()):
            yield number
