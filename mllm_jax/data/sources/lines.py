"""Random access to text files of consecutive records by their offsets, also for files compressed by gzip."""

import abc
import contextlib
import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mllm_jax.data.records.parts import Find
from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources.shards import Shard

GZIP = ".gz"


class Lines(Shard):
    """One file of records of one or several lines each. Only their offsets are held in memory.

    gzip has no random access. So every process that reads a .gz file decompresses it once into an unnamed temporary
    file in $TMPDIR, which is deleted with the process.
    """

    def __init__(self, path: Path, root: Path):
        super().__init__(path, root)
        self._unpacked = _unpacked(path)
        with open(path, "rb") if self._unpacked is None else contextlib.nullcontext(self._unpacked) as file:
            file.seek(0)
            begins = list(self.begins(file))
            end = file.seek(0, os.SEEK_END)
        self._starts = np.array([start for start, _ in begins] + [end], np.int64)
        self._numbers = np.array([number for _, number in begins], np.int64)

    @abc.abstractmethod
    def begins(self, file: BinaryIO) -> Iterator[tuple[int, int]]:
        """Yields (offset in bytes, number of its first line, from 1) of every record. Raises ValueError."""

    @abc.abstractmethod
    def parse(self, data: bytes, name: str) -> Any:
        """Returns the record in these lines; `name` is for errors. Raises BadRecord."""

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        return f"{self.path.name}:{self._numbers[index]}"

    def read(self, index: int) -> tuple[Any, Find]:
        with self._descriptor() as file:
            return self._parsed(file, index), self.find

    def fields(self, names: Sequence[str]) -> Iterator[Any]:
        with self._descriptor() as file:
            for index in range(len(self)):
                try:
                    yield self._parsed(file, index)
                except BadRecord:
                    yield None

    def _parsed(self, file: int, index: int) -> Any:
        start, end = map(int, self._starts[index : index + 2])
        return self.parse(os.pread(file, end - start, start), self.name(index))

    @contextlib.contextmanager
    def _descriptor(self) -> Iterator[int]:
        """Opens the file for each read, so that sets of many files do not keep all of them open."""
        if self._unpacked is not None:
            yield self._unpacked.fileno()
        else:
            with open(self.path, "rb", buffering=0) as file:
                yield file.fileno()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_unpacked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_unpacked": _unpacked(state["path"])}


def _unpacked(path: Path) -> BinaryIO | None:
    """Decompresses a .gz file to a temporary file; returns None for other files."""
    if path.suffix.lower() != GZIP:
        return None
    unpacked = tempfile.TemporaryFile()
    try:
        with gzip.open(path) as file:
            shutil.copyfileobj(file, unpacked, 2**20)
        unpacked.flush()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a readable gzip file ({error}). Restore the file.") from error
    except OSError as error:
        raise ValueError(f"{path}: unpacking into {tempfile.gettempdir()} failed ({error}). Set $TMPDIR.") from error
    return unpacked
