"""Opens sources of conversations and documents; the files at a path determine their format.

    conversations.jsonl, llava.json            JSON, with images and videos as files on disk; also .ndjson, .jsonl.gz
    questions.csv, questions.tsv               a table, with images as files or as base64; also .csv.gz, .tsv.gz
    records-00000-of-00010.array_record        ArrayRecord
    shard-00000.tar                            WebDataset
    train-00000-of-00010.parquet               Parquet
    FOLDER with features.json, tfds:NAME       a dataset that TFDS has prepared

A path may be a file, a pattern or a folder of files of one kind. A numbered set must be complete, unless the path is a
single file or a pattern with brackets: `data/train-0000[0-3]-*.tar`. All sources have random access, can be pickled,
do not import jax, and return the same items: see `mllm_jax.data.records.records`.
"""

import glob
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources.shards import Conversations, Shard, open_shards

__all__ = ["BadRecord", "Conversations", "open_source"]

KINDS = {  # ending of a file's name -> module and class of its reader, imported on demand
    ".jsonl": ("json_files", "JsonLines"),
    ".ndjson": ("json_files", "JsonLines"),
    ".json": ("json_files", "JsonArray"),
    ".csv": ("tables", "Table"),
    ".tsv": ("tables", "Table"),
    ".array_record": ("array_record", "ArrayRecords"),
    ".arrayrecord": ("array_record", "ArrayRecords"),
    ".tar": ("tar", "Tar"),
    ".parquet": ("parquet", "Parquet"),
}
KINDS |= {ending + ".gz": KINDS[ending] for ending in (".jsonl", ".ndjson", ".csv", ".tsv")}
ABOUT = (".json", ".csv", ".tsv")  # metadata if a folder also has shards of another kind
TFDS = "tfds:"
NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)")  # names of the files of one set; TFDS puts the numbers after the ending
PART = "["  # marks a pattern that selects a part of a set
LARGE = 20  # limit of names in an error


def open_source(path: str | Path, root: str | Path | None = None, where: Mapping[str, Any] | None = None):
    """Opens the conversations and documents at a path: `len(source)`, `source[i] -> {"messages", "kind", "id"}`.

    Args:
        path: file, pattern, folder or "tfds:NAME", see above.
        root: folder of relative paths in records, which must stay below it. Default: the folder of their file.
        where: field values of the records to keep, as in {"split": "train", "task": ("vqa", "ocr")}. For a dataset of
            TFDS, "split" selects the split.

    Raises:
        FileNotFoundError: the path matches no file.
        ValueError: the files are of several kinds or sets, a numbered set is incomplete, a file is unreadable, or no
            record is left.
    """
    if (folder := _tfds_folder(str(path))) is not None:
        tfds, where = _tfds(), dict(where or {})
        return Conversations([tfds.TfdsSplit(folder, where.pop("split", tfds.SPLIT))], where)
    paths = find_files(str(path))
    return Conversations(open_shards(_reader(paths[0]), paths, root), where)


def find_files(path: str) -> list[Path]:
    """Returns the files at a path, sorted. Raises the errors of `open_source`."""
    if "://" in path:
        raise ValueError(f"{path}: not a local path. Mount the bucket (gcsfuse BUCKET /mnt/data) and use that path.")
    location = Path(path)
    if location.is_dir():
        files = [file for file in location.iterdir() if kind_of(file) and not file.name.startswith(".")]
        files = [file for file in files if kind_of(file) not in ABOUT] or files
    else:
        files = [location] if location.is_file() else [Path(name) for name in glob.glob(path, recursive=True)]
    if not files:
        raise FileNotFoundError(
            f"{path}: no such file, and no file in it that ends in {', '.join(KINDS)}. Correct the path."
        )
    files.sort()
    if not location.is_file():
        _check_set(path, files, location.is_dir())
    elif kind_of(location) is None:
        raise ValueError(f"{location}: unknown kind of file. Use a file whose name ends in {', '.join(KINDS)}.")
    return files


def kind_of(file: Path) -> str | None:
    """Returns the ending of a file's name that is in KINDS; None for an unsupported file."""
    return next((ending for ending in KINDS if file.name.lower().endswith(ending)), None)


def _check_set(path: str, files: Sequence[Path], folder: bool) -> None:
    """Raises ValueError unless the files are of one kind, of one set if a folder is read, and complete."""
    if unknown := [file.name for file in files if kind_of(file) is None]:
        raise ValueError(f"{unknown[0]}: unknown kind of file. Use files whose names end in {', '.join(KINDS)}.")
    if len(kinds := sorted({kind_of(file) for file in files})) > 1:
        raise ValueError(f"{path}: files of several kinds, {', '.join(kinds)}. Select one, as in {path}/*{kinds[0]}")
    sets: dict[tuple[Path, str, str], set[int]] = {}
    for file in files:
        if match := NUMBERED.fullmatch(file.name[: -len(kind_of(file))]):
            sets.setdefault((file.parent, match[1], match[3]), set()).add(int(match[2]))
    if folder and len(sets) > 1:
        names = ", ".join(sorted({name for _, name, _ in sets}))
        raise ValueError(f"{path}: several sets ({names}). Select one, as in {path}/{min(sets)[1]}-*{kinds[0]}")
    for (_, name, count), numbers in sets.items() if folder or PART not in path else ():
        if missing := sorted(set(range(int(count))) - numbers):
            listed = ", ".join(map(str, missing[:LARGE]))
            raise ValueError(
                f"{path}: of the {int(count)} files {name}-*-of-{count} these are missing: {listed}. Restore them."
            )


def _reader(file: Path) -> type[Shard]:
    module, name = KINDS[kind_of(file)]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def _tfds() -> ModuleType:
    return importlib.import_module(f"{__name__}.tfds")


def _tfds_folder(path: str) -> Path | None:
    if path.startswith(TFDS):
        return _tfds().prepared(path.removeprefix(TFDS))
    return Path(path) if (Path(path) / "features.json").is_file() else None
