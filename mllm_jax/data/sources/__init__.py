"""Sources of conversations and documents: the format of a path is detected.

    conversations.jsonl, llava.json            JSON, with images and videos beside it on disk; also .ndjson, .jsonl.gz
    questions.csv, questions.tsv               a table, with images beside it or as base64; also .csv.gz, .tsv.gz
    records-00000-of-00010.array_record        ArrayRecord
    shard-00000.tar                            WebDataset
    train-00000-of-00010.parquet               Parquet
    FOLDER with features.json, tfds:NAME       a dataset that TFDS has prepared

A path may be a file, a pattern or a folder of files of one kind. Of a numbered set all files must exist, unless one
file is named, or a part of them by a pattern with brackets: `data/train-0000[0-3]-*.tar`. All sources have random
access, can be pickled, need no jax, and give the same items: see `mllm_jax.data.records.records`.
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

KINDS = {  # by the end of a file's name; what reads it is imported when it is needed
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
ABOUT = (".json", ".csv", ".tsv")  # in a folder of shards of another kind, these are metadata
TFDS = "tfds:"
NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)")  # how files of one set are called; TFDS puts it behind the ending
PART = "["  # in a pattern that names a part of a set
LARGE = 20  # names in an error


def open_source(path: str | Path, root: str | Path | None = None, where: Mapping[str, Any] | None = None):
    """The conversations and documents at a path, as `len(source)` and `source[i] -> {"messages", "kind", "id"}`.

    Args:
        path: see above.
        root: folder that the paths in records are relative to, and must not leave; their file's own by default.
        where: keeps the records whose fields have these values, as in {"split": "train", "task": ("vqa", "ocr")}. Of a
            dataset of TFDS, "split" names the split that is read.

    Raises:
        FileNotFoundError: nothing is there. ValueError: files of several kinds or sets, one that is missing in a
            numbered set or cannot be read, or no record.
    """
    if (folder := _tfds_folder(str(path))) is not None:
        tfds, where = _tfds(), dict(where or {})
        return Conversations([tfds.TfdsSplit(folder, where.pop("split", tfds.SPLIT))], where)
    paths = find_files(str(path))
    return Conversations(open_shards(_reader(paths[0]), paths, root), where)


def find_files(path: str) -> list[Path]:
    """The files that a path means, in order. Raises what `open_source` does."""
    if "://" in path:
        raise ValueError(f"{path} is not a local path; mount the bucket (gcsfuse BUCKET /mnt/data) and name it there")
    whole = Path(path)
    if whole.is_dir():
        found = [file for file in whole.iterdir() if kind_of(file) and not file.name.startswith(".")]
        found = [file for file in found if kind_of(file) not in ABOUT] or found
    else:
        found = [whole] if whole.is_file() else [Path(name) for name in glob.glob(path, recursive=True)]
    if not found:
        raise FileNotFoundError(f"{path}: there is no such file, and no file there that ends in {', '.join(KINDS)}")
    found.sort()
    if not whole.is_file():
        _check_set(path, found, whole.is_dir())
    elif kind_of(whole) is None:
        raise ValueError(f"{whole} is of no known kind: names of files end in {', '.join(KINDS)}")
    return found


def kind_of(file: Path) -> str | None:
    """The ending of a file's name, of KINDS, that selects its reader. None: no reader."""
    return next((ending for ending in KINDS if file.name.lower().endswith(ending)), None)


def _check_set(path: str, files: Sequence[Path], folder: bool) -> None:
    """Raises ValueError unless these are files of one kind, of one set where a folder is read, and none is missing."""
    if unknown := [file.name for file in files if kind_of(file) is None]:
        raise ValueError(f"{unknown[0]} is of no known kind: file names end in {', '.join(KINDS)}")
    if len(kinds := sorted({kind_of(file) for file in files})) > 1:
        raise ValueError(f"{path} has files of several kinds, {', '.join(kinds)}: name one, as in {path}/*{kinds[0]}")
    sets: dict[tuple[Path, str, str], set[int]] = {}
    for file in files:
        if match := NUMBERED.fullmatch(file.name[: -len(kind_of(file))]):
            sets.setdefault((file.parent, match[1], match[3]), set()).add(int(match[2]))
    if folder and len(sets) > 1:
        names = ", ".join(sorted({name for _, name, _ in sets}))
        raise ValueError(f"{path} has several sets ({names}): name one, as in {path}/{min(sets)[1]}-*{kinds[0]}")
    for (_, name, count), numbers in sets.items() if folder or PART not in path else ():
        if missing := sorted(set(range(int(count))) - numbers):
            listed = ", ".join(map(str, missing[:LARGE]))
            raise ValueError(f"{path}: of the {int(count)} files {name}-*-of-{count} these are missing: {listed}")


def _reader(file: Path) -> type[Shard]:
    module, name = KINDS[kind_of(file)]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def _tfds() -> ModuleType:
    return importlib.import_module(f"{__name__}.tfds")


def _tfds_folder(path: str) -> Path | None:
    if path.startswith(TFDS):
        return _tfds().prepared(path.removeprefix(TFDS))
    return Path(path) if (Path(path) / "features.json").is_file() else None
