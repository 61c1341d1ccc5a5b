"""Reads ArrayRecord, the format for random access at scale. A record is MessagePack with its images, or JSON."""

import json
from pathlib import Path
from typing import Any

import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource  # Grain's would import jax

from mllm_jax.data.records.parts import Find
from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources.shards import Shard


class ArrayRecords(Shard):
    """One file. Offsets of records are read from it and not held in memory."""

    def __init__(self, path: Path, root: Path):
        super().__init__(path, root)
        try:
            self._source = ArrayRecordDataSource(str(path))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: not a readable ArrayRecord ({_first_line(error)}). Restore the file.") from error

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> tuple[Any, Find]:
        try:
            data = self._source[index]
        except (RuntimeError, ValueError) as error:
            raise BadRecord("not readable", self.name(index), _first_line(error)) from error
        try:
            return unpack(data), self.find
        except ValueError as error:
            detail = f"{error}; open a dataset of TFDS by its folder, path=FOLDER"
            raise BadRecord("neither MessagePack nor JSON", self.name(index), detail) from error


def unpack(data: bytes) -> Any:
    """Decodes a record. Raises ValueError."""
    if data[:1] == b"{":
        return json.loads(data)
    try:
        return msgpack.unpackb(data)
    except Exception as error:  # msgpack raises five classes of errors
        raise ValueError(f"{type(error).__name__}: {error}") from error


def pack(record: dict[str, Any]) -> bytes:
    """Encodes a record as MessagePack."""
    return msgpack.packb(record)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or "damaged or cut off"
