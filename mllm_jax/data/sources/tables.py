"""Reads CSV and TSV tables, whose first line contains the names of columns. A row is a record of texts."""

import csv
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources.lines import GZIP, Lines

# A cell may contain an image as base64. The limit is process-wide; only this module reads CSV.
csv.field_size_limit(2**31 - 1)


class Table(Lines):
    """Table with a record per row: {column: text, or None for an empty cell}. Columns without a name are dropped.

    Cells with line breaks, quotes or separators must be quoted, with quotes inside doubled. Columns of a .tsv file are
    separated by tabs, those of a .csv file by commas, or by semicolons or tabs if its first line has no comma.
    """

    def begins(self, file: BinaryIO) -> Iterator[tuple[int, int]]:
        position = number = 0
        ended = False

        def lines() -> Iterator[str]:
            nonlocal position, number, ended
            for line in file:
                position += len(line)
                number += 1
                yield line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
            ended = True

        self._separator = self._chosen(file.readline().decode("utf-8", "replace"))
        file.seek(0)
        rows = csv.reader(lines(), delimiter=self._separator, strict=True)
        self.columns = None
        while not ended:
            start, first = position, number + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                if ended or number > first or self.columns is None:  # an open quote hides many rows
                    place = f"{self.path}: lines {first} to {number}"
                    raise ValueError(f"{place}: not a row of a table ({error}). Close or double the quote.") from error
                row = [str(error)]  # parse() raises the error for this row
            if not row:  # an empty line
                continue
            if self.columns is None:
                self.columns = self._named(row)
            else:
                yield start, first

    def parse(self, data: bytes, name: str) -> Any:
        try:
            row = next(csv.reader(io.StringIO(data.decode(), newline=""), delimiter=self._separator, strict=True))
        except (csv.Error, ValueError) as error:
            raise BadRecord("not a row of a table", name, str(error)) from error
        if len(row) != len(self.columns):
            raise BadRecord("not a row of a table", name, f"{len(row)} cells for {len(self.columns)} columns")
        return {column: cell or None for column, cell in zip(self.columns, row) if column}

    def _chosen(self, header: str) -> str:
        if self.path.name.lower().removesuffix(GZIP).endswith(".tsv"):
            return "\t"
        return next((separator for separator in ",;\t" if separator in header), ",")

    def _named(self, header: list[str]) -> list[str]:
        columns = [name.strip() for name in header]
        if repeated := sorted({name for name in columns if name and columns.count(name) > 1}):
            raise ValueError(f"{self.path}: several columns are called {', '.join(repeated)}. Rename all but one.")
        return columns
