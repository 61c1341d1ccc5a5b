"""Reads JSON Lines and JSON arrays, whose images and videos are files on disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mllm_jax.data.records.parts import Find
from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources.lines import Lines
from mllm_jax.data.sources.shards import Shard


class JsonLines(Lines):
    """File with one record per line."""

    def begins(self, file: BinaryIO) -> Iterator[tuple[int, int]]:
        position = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                yield position, number
            position += len(line)

    def parse(self, data: bytes, name: str) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise BadRecord("not valid JSON", name, str(error)) from error


class JsonArray(Shard):
    """File that contains one list of records, as LLaVA's. Every process holds it in memory."""

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
            raise ValueError(
                f"{self.path}: not valid JSON ({error}). Correct it, or name it .jsonl if it has one record per line."
            ) from error
        if not isinstance(records, list):
            raise ValueError(f"{self.path}: is a {type(records).__name__}. Make it a list of records.")
        return records
