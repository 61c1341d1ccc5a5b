"""JSON Lines, and files that are one JSON array, with pictures and clips beside them on disk."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.data.records import BadRecord, Find
from mllm_jax.data.sources.shards import Shard


class JsonLines(Shard):
    """One record a line. Only the lines' offsets are held in memory."""

    def __init__(self, path: Path, root: Path):
        super().__init__(path, root)
        offsets, lines, position = [], [], 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    offsets.append(position)
                    lines.append(number)
                position += len(line)
        self._offsets, self._lines = np.array(offsets, np.int64), np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def name(self, index: int) -> str:
        return f"{self.path.name}:{self._lines[index]}"

    def read(self, index: int) -> tuple[Any, Find]:
        with open(self.path, "rb") as file:  # opened each time: readers in several threads and processes do not meet
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            return json.loads(line), self.find
        except ValueError as error:
            raise BadRecord("not valid JSON", self.name(index), str(error)) from error

    def fields(self, names: Sequence[str]) -> Iterator[Any]:
        with open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError:
                        yield None


class JsonArray(Shard):
    """One file that is a list of records, as LLaVA's are published. It is held in memory, by every process."""

    def __init__(self, path: Path, root: Path):
        super().__init__(path, root)
        self._records = self._load()

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> tuple[Any, Find]:
        return self._records[index], self.find

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._records = self._load()

    def _load(self) -> list:
        try:
            records = json.loads(self.path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{self.path}: not valid JSON ({error}); one record a line is a .jsonl file") from error
        if not isinstance(records, list):
            raise ValueError(f"{self.path}: needs a list of records, not a {type(records).__name__}")
        return records
