"""WebDataset: tar files whose neighbouring members `KEY.json`, `KEY.jpg` ... are one record.

`KEY.json` is a record in any layout of `mllm_jax.data.records`; without it `KEY.txt` is a text with what it is about.
Files that the record names are members of the same key: `KEY.0.jpg`, or what follows the key, `0.jpg`. Where it names
none, all pictures and clips of its key belong to it, in the order in which they lie in the tar.
"""

import io
import json
import logging
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mllm_jax.data.records import Bad, BadRecord, Find
from mllm_jax.data.sources.shards import Shard

log = logging.getLogger(__name__)
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
CLIPS = ("mp4", "webm", "mkv", "mov", "avi")
NAMING = {"image", "images", "video", "videos", "image_info"}  # fields that say which files belong to a record
INDEX = ".index.npy"


class Tar(Shard):
    """One tar file, not compressed. A sample is one read.

    Where samples begin is found by one pass over the headers, and kept in `SHARD.tar.index.npy` beside the file, or in
    memory only where nothing can be written there.
    """

    def __init__(self, path: Path, root: Path):
        super().__init__(path, root)
        self._starts = _index(path)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, index: int) -> tuple[Any, Find]:
        start, end = map(int, self._starts[index : index + 2])
        with open(self.path, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        name, members = self.name(index), {}
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for member in tar:
                    if member.isfile():
                        key, extension = _key(member.name)
                        name, members[extension] = f"{self.path.name}:{key}", tar.extractfile(member).read()
        except (tarfile.TarError, OSError) as error:
            raise BadRecord("not readable", name, str(error)) from error
        return _record(members, name), _Members(name.partition(":")[2], members)


class _Members:
    """Finds files by the name of a member, or by what follows its key."""

    def __init__(self, key: str, members: Mapping[str, bytes]):
        self.key, self.members = PurePosixPath(key).name, members

    def __call__(self, name: Any) -> bytes:
        if not isinstance(name, str):
            raise Bad("not a path", repr(name)[:80])
        key, extension = _key(PurePosixPath(name).name)
        found = extension if key == self.key else name
        if found not in self.members:
            raise Bad("missing file", f"{name}; the sample has {', '.join(self.members)}")
        return self.members[found]


def _record(members: Mapping[str, bytes], name: str) -> Any:
    try:
        if "json" in members:
            record = json.loads(members["json"])
        elif "txt" in members:
            record = {"text": members["txt"].decode()}
        else:
            raise BadRecord("no text", name, f"a sample needs .json or .txt, it has {', '.join(members)}")
    except ValueError as error:
        raise error if isinstance(error, BadRecord) else BadRecord("not valid JSON", name, str(error)) from error
    if not isinstance(record, dict):
        return record
    if record.get("id") is None:
        record["id"] = name.partition(":")[2]
    if _names_files(record):
        return record
    of = lambda kinds: [extension for extension in members if extension.rpartition(".")[2].lower() in kinds]
    return record | {"images": of(PICTURES), "videos": of(CLIPS)}


def _names_files(record: dict[str, Any]) -> bool:
    contents = [turn.get("content") for turn in record.get("messages") or [] if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(record.get(key) is not None for key in NAMING) or any(
        part.get(str(part.get("type")).removesuffix("_url")) or part.get(str(part.get("type")))
        for part in parts
        if part.get("type") != "text"
    )


def _key(member: str) -> tuple[str, str]:
    """A member's key, and what follows it: the name is cut at the first dot after its folders."""
    folder, slash, last = member.rpartition("/")
    key, _, extension = last.partition(".")
    return folder + slash + key, extension


def _index(path: Path) -> np.ndarray:
    """i64[samples + 1]: where in the file every sample begins, and where the last one ends."""
    kept, about = path.with_name(path.name + INDEX), path.stat()
    stamp = [about.st_size, about.st_mtime_ns]
    try:
        found = np.load(kept)
        if found[:2].tolist() == stamp:
            return found[2:]
    except (OSError, ValueError, EOFError):  # there is none, or it was cut off
        pass
    starts = np.array(_scan(path), np.int64)
    temporary = kept.with_name(f".{kept.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, np.concatenate([np.array(stamp, np.int64), starts]))
        os.replace(temporary, kept)
    except OSError as error:
        log.info("%s is not kept: %s", kept, error)
    return starts


def _scan(path: Path) -> list[int]:
    starts, before, end = [], None, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key = _key(member.name)[0]
                if key != before:
                    starts.append(member.offset)
                before, end = key, member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path}: not a readable tar ({error}); it must be whole and not compressed") from error
    return [*starts, end]
