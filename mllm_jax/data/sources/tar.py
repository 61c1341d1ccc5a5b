"""Reads WebDataset: tar files whose members `KEY.json`, `KEY.jpg` ... form one record.

Members of a key need not be adjacent; a repeated ending starts a new record of the same key. Endings are lowercased.
Folders, links, members without an ending and hidden ones (`._KEY.jpg` of macOS) are ignored.

`KEY.json` is a record in any layout of `mllm_jax.data.records.records`; without it, `KEY.txt` is a text about the
images. A record names files of its key as `KEY.0.jpg` or `0.jpg`. If it names none, it has all images and videos of its
key, in the order of the tar.
"""

import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from mllm_jax.data.media import embedded_file, source_name
from mllm_jax.data.records.fields import Bad
from mllm_jax.data.records.parts import Find
from mllm_jax.data.records.records import BadRecord
from mllm_jax.data.sources.shards import Shard, finding

log = logging.getLogger(__name__)
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "heic", "heif", "avif", "jp2")
VIDEOS = ("mp4", "m4v", "webm", "mkv", "mov", "avi", "mpg", "mpeg")
NAMING = {"image", "images", "video", "videos", "image_info"}  # fields that name the files of a record
INDEX = ".index.npy"
VERSION = 2  # version of the index file
DAMAGED = (tarfile.TarError, OSError, ValueError, IndexError, OverflowError)  # errors of tarfile for damaged headers
BLOCKS = 512 * tarfile.BLOCKSIZE  # bytes per read after the end of an archive


class Tar(Shard):
    """One uncompressed tar file. Reading a sample takes one read per run of adjacent members of its key.

    Offsets of samples are determined by one pass over the headers, and saved in `SHARD.tar.index.npy` next to the file,
    or kept in memory if the folder is read-only.

    Raises:
        ValueError: the file is compressed, damaged or cut off.
    """

    def __init__(self, path: Path, root: Path):
        super().__init__(path, root)
        self._extents = _index(path)
        # First extent of every sample, and the number of extents.
        self._firsts = np.flatnonzero(np.diff(self._extents[:, 0], prepend=-1, append=-1))

    def __len__(self) -> int:
        return max(0, len(self._firsts) - 1)

    def read(self, index: int) -> tuple[Any, Find]:
        data = io.BytesIO()
        with open(self.path, "rb") as file:
            for _, start, end in self._extents[slice(*self._firsts[index : index + 2])]:
                file.seek(start)
                data.write(file.read(end - start))
        data.seek(0)
        name, members = self.name(index), {}
        try:
            with tarfile.open(fileobj=data, mode="r:") as tar:
                for member, key, extension in _members(tar):
                    name = f"{self.path.name}:{key}"
                    if member.issparse():  # a small block may claim any number of zeros
                        raise tarfile.ReadError(f"{member.name} is a sparse file")
                    members[extension] = tar.extractfile(member).read()
                if tar.offset != data.getbuffer().nbytes:
                    raise tarfile.ReadError(f"the index does not match the file; delete {self.path.name}{INDEX}")
        except DAMAGED as error:
            raise BadRecord("not readable", name, str(error)) from error
        return _record(members, name), _Members(name.partition(":")[2], members)


class _Members:
    """Finds files by the name of a member, or by the part after its key; also decodes data URIs and base64."""

    def __init__(self, key: str, members: Mapping[str, bytes]):
        self.key, self.members = PurePosixPath(key).name, members

    def __call__(self, name: Any) -> bytes:
        with finding():
            if (data := embedded_file(name)) is not None:
                return data
        key, _, extension = PurePosixPath(name.replace("\\", "/")).name.partition(".")
        member = (extension if key == self.key else name).lower()
        if member not in self.members:
            raise Bad("missing file", f"{source_name(name)}; the sample has {', '.join(self.members)}")
        return self.members[member]


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
    of = lambda kinds: [extension for extension in members if extension.rpartition(".")[2] in kinds]
    return record | {"images": of(IMAGES), "videos": of(VIDEOS)}


def _names_files(record: dict[str, Any]) -> bool:
    turns = record.get("messages")
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(record.get(key) is not None for key in NAMING) or any(
        part.get(str(part.get("type")).removesuffix("_url")) or part.get(str(part.get("type")))
        for part in parts
        if part.get("type") != "text"
    )


def _members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yields (member, key, ending in lower case) of the files of an archive that have a key.

    A name is split at the first dot after its folders: "a/b.0.JPG" has the key "a/b" and the ending "0.jpg".
    """
    for member in tar:
        if tar.offset <= member.offset:
            raise tarfile.ReadError(f"the size of a member is negative at byte {member.offset}")
        folder, slash, last = member.name.removeprefix("./").rpartition("/")
        key, _, extension = last.partition(".")
        if key and extension and member.isfile():
            yield member, folder + slash + key, extension.lower()


def _index(path: Path) -> np.ndarray:
    """Loads or creates the index i64[extents 3]: sample number, start and end in the file of a run of its members.

    Sorted by sample. Example: the members of sample 0 at bytes 0..4096 and 8192..9216, those of sample 1 between them:

        [[0, 0, 4096], [0, 8192, 9216], [1, 4096, 8192]]
    """
    index_path, stat = path.with_name(path.name + INDEX), path.stat()
    stamp = np.array([VERSION, stat.st_size, stat.st_mtime_ns], np.int64)
    try:
        saved = np.load(index_path, mmap_mode="r")  # a damaged file may claim any size; mmap allocates nothing for it
        if saved.ndim == 1 and saved.dtype == np.int64 and len(saved) % 3 == 0 and (saved[:3] == stamp).all():
            extents = np.array(saved[3:]).reshape(-1, 3)
            if _is_valid(extents, stat.st_size):
                return extents
    except (OSError, ValueError, EOFError):  # missing or truncated
        pass
    extents = _scan(path)
    temporary = index_path.with_name(f".{index_path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, np.concatenate([stamp, extents.ravel()]))
        os.replace(temporary, index_path)
    except OSError as error:
        log.info("%s is not saved: %s", index_path, error)
    finally:
        temporary.unlink(missing_ok=True)
    return extents


def _is_valid(extents: np.ndarray, size: int) -> bool:
    numbers, starts, ends = extents.T
    counted = (numbers[:1] == 0).all() and np.isin(np.diff(numbers), (0, 1)).all()
    return bool(counted and ((0 <= starts) & (starts < ends) & (ends <= size)).all())


def _scan(path: Path) -> np.ndarray:
    """Creates the index from the headers of all members. Raises ValueError if the file is damaged."""
    extents, start, count = [], 0, 0
    with open(path, "rb") as file:
        while start is not None:  # a file may consist of several concatenated archives
            samples: dict[str, tuple[int, set[str]]] = {}  # key -> number, endings
            file.seek(start)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member, key, extension in _members(tar):
                        if key not in samples or extension in samples[key][1]:
                            samples[key], count = (count, set()), count + 1
                        number, extensions = samples[key]
                        extensions.add(extension)
                        if extents and extents[-1][0] == number and extents[-1][2] == member.offset:
                            extents[-1][2] = tar.offset
                        else:
                            extents.append([number, member.offset, tar.offset])
                    start = _behind(file, tar.offset)
            except DAMAGED as error:
                fault = f"not a readable tar ({error}). Use a complete, uncompressed file."
                raise ValueError(f"{path}: {fault}") from error
    return np.array(sorted(extents), np.int64).reshape(-1, 3)


def _behind(file: BinaryIO, end: int) -> int | None:
    """Returns the start of the next archive after the end mark (a block of zeros) at `end`; None if there is none."""
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"damaged or cut off at byte {end}, at which neither a member nor the end mark begins")
    while block := file.read(BLOCKS):
        if rest := block.lstrip(b"\0"):
            return (file.tell() - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return None
