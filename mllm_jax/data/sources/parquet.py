"""Reads Parquet with embedded images, as in public instruction sets, one row group at a time."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from mllm_jax.data.records.parts import Find
from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources.shards import Shard

ROW_GROUPS = 4  # limit of cached row groups per process; each may have hundreds of megabytes of images


class Parquet(Shard):
    """One file. Sequential access reads each row group once; random access reads one for nearly every record."""

    def __init__(self, path: Path, root: Path):
        super().__init__(path, root)
        try:
            metadata = parquet.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file ({error}). Restore the file.") from error
        stat = path.stat()
        self._version = (stat.st_mtime_ns, stat.st_size)  # part of the cache key: the file may be replaced
        self._ends = np.cumsum([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, index: int) -> tuple[Any, Find]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        try:
            rows = _row_group(str(self.path), self._version, group)
        except (pa.ArrowException, OSError) as error:
            raise BadRecord("not readable", self.name(index), f"row group {group}: {error}") from error
        return rows.slice(index - (int(self._ends[group - 1]) if group else 0), 1).to_pylist()[0], self.find

    def fields(self, names: Sequence[str]) -> Iterator[Any]:
        with parquet.ParquetFile(self.path) as file:
            columns = [name for name in names if name in file.schema_arrow.names]
            for rows in file.iter_batches(columns=columns):
                yield from rows.to_pylist() if columns else [{}] * len(rows)


@lru_cache(maxsize=ROW_GROUPS)
def _row_group(path: str, version: tuple[int, int], group: int) -> pa.Table:
    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, use_threads=False)
