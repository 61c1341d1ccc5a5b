"""The safetensors format: 8 bytes of header length (little endian), a JSON header, and the tensors' bytes in sequence.

Files are mapped, so that reading a slice of a tensor reads only its pages. Pickle files are refused, because opening
one runs its code. Format: https://huggingface.co/docs/safetensors/index#format.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
READABLE = FLOATS | {"F64": np.dtype(np.float64)}
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}  # dtypes whose names do not end in their bits
Layout = Mapping[str, tuple[np.dtype, tuple[int, ...]]]  # dtype and shape of tensors by name
_SHARD = r"model-\d{5}-of-\d{5,6}\.safetensors"
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the format
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


class BrokenCheckpoint(ValueError):
    """The weights of a folder cannot be read: there are no safetensors, or a file is truncated, damaged or missing."""


class Tensor(NamedTuple):
    """Location of one tensor on disk."""

    file: Path
    dtype: str  # name in the format: F32, F16, BF16, I64 ...
    shape: tuple[int, ...]
    offset: int  # offset of the first byte in the file
    nbytes: int

    def map(self) -> np.ndarray:
        """Returns the tensor as a read-only view of the file. The mapping is closed with its last view."""
        if not self.nbytes:
            return np.empty(self.shape, READABLE[self.dtype])
        return np.asarray(np.memmap(self.file, READABLE[self.dtype], "r", self.offset, self.shape))


def all_finite(array: np.ndarray) -> bool:
    """Returns whether all floats are finite. The bits of inf and NaN, without the sign, are at least those of inf.

    For bf16 and fp16 this is five times as fast as `numpy.isfinite`.
    """
    bits = np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
    infinity = np.full((), np.inf, array.dtype).view(bits.dtype)
    sign = bits.dtype.type(1 << (8 * array.itemsize - 1))
    return not array.size or bool((bits & ~sign).max() < infinity)


def open_checkpoint(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Returns every tensor of a folder by its name on disk. Reads only headers, and checks them against file lengths.

    The folder has `model.safetensors`, or shards and `model.safetensors.index.json`, or any `*.safetensors`.

    Raises:
      BrokenCheckpoint: the weights cannot be read. The message lists all faults.
    """
    folder = Path(folder)
    weight_map = _weight_map(folder)
    tensors, faults = {}, []
    for file in sorted(set(weight_map.values())) if weight_map else _files(folder):
        try:
            header = read_header(folder / file)
        except (OSError, ValueError) as fault:
            faults.append(str(fault) if isinstance(fault, BrokenCheckpoint) else f"{file}: {fault}")
            continue
        if weight_map:
            faults += [f"{file}: no tensor {n}, which the index lists" for n, f in weight_map.items()
                       if f == file and n not in header]  # fmt: skip
            header = {name: tensor for name, tensor in header.items() if weight_map.get(name, file) == file}
        faults += [f"{file}: {name} is in {tensors[name].file.name}, too" for name in header.keys() & tensors.keys()]
        tensors |= header
    if faults:
        raise BrokenCheckpoint(f"the weights in {folder} cannot be read:\n  " + "\n  ".join(faults))
    return tensors


def read_header(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file. Raises BrokenCheckpoint if its header is damaged or contradicts its length."""
    if not path.is_file():  # opening a pipe would block
        raise BrokenCheckpoint(f"{path.name}: not a regular file")
    length = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if length < 8 or start > min(length, _LONGEST_HEADER):
            raise BrokenCheckpoint(f"{path.name}: no safetensors header: the file is truncated or of another format")
        try:
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            tensors = {name: _tensor(path, fields, start) for name, fields in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
            raise BrokenCheckpoint(f"{path.name}: the safetensors header is damaged ({fault!r})") from None
    end = max((t.offset + t.nbytes for t in tensors.values()), default=start)
    if end != length:
        raise BrokenCheckpoint(
            f"{path.name}: {length:,} bytes long, but its header describes {end:,}. Download it again."
        )
    end = start
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        bits = _bits(t.dtype)
        if bits and 8 * t.nbytes != bits * math.prod(t.shape):
            raise BrokenCheckpoint(f"{path.name}: {name} {t.dtype}{list(t.shape)} does not take {t.nbytes:,} bytes")
        if t.offset != end:
            raise BrokenCheckpoint(f"{path.name}: {name} does not begin where the tensor before it ends")
        end += t.nbytes
    return tensors


def _tensor(path: Path, fields: Mapping[str, Any], start: int) -> Tensor:
    """Reads one tensor of a header; the data begin at byte `start`. Raises ValueError for values of other types."""
    dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise ValueError(f"dtype={dtype!r}, shape={shape!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or end < begin:
        raise ValueError(f"shape={shape!r}, data_offsets={[begin, end]!r}")
    return Tensor(path, dtype, tuple(shape), start + begin, end - begin)


def _bits(dtype: str) -> int:
    """Returns the bits per value of a dtype in the format, such as 8 for "F8_E4M3"; 0 for an unknown dtype."""
    match = re.fullmatch(r"(?:F|BF|I|U)(8|16|32|64)(?:_.*)?", dtype)
    return int(match[1]) if match else _BITS.get(dtype, 0)


def write_checkpoint(folder: Path, layout: Layout, arrays: Iterable[np.ndarray], max_shard_bytes: int) -> None:
    """Writes one file, or shards and an index, tensor by tensor. Replaces earlier weights of the folder.

    Files are written under temporary names and renamed when all are complete, so that no partial file can be loaded.

    Args:
      folder: folder to write, created if it does not exist.
      layout: {name: (dtype, shape)}, in the order of `arrays`.
      arrays: the tensors.
      max_shard_bytes: largest size of a file; a larger tensor has a file of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards, arrays = _shards(layout, max_shard_bytes), iter(arrays)
    try:
        for file, names in shards.items():
            write_file(_partial(folder / file), {name: layout[name] for name in names}, arrays)
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(map(_nbytes, layout.values()))}, "weight_map": weight_map}
            _partial(folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for old in weight_files(folder):  # so that the folder never mixes two checkpoints
            (folder / old).unlink(missing_ok=True)
        for file in [*shards, INDEX] if len(shards) > 1 else shards:
            _partial(folder / file).rename(folder / file)
    finally:
        for file in [*shards, INDEX]:
            _partial(folder / file).unlink(missing_ok=True)


def write_file(path: Path, layout: Layout, arrays: Iterator[np.ndarray]) -> None:
    """Writes the tensors of `layout`, the next ones of `arrays`, to a file."""
    names = {dtype: name for name, dtype in FLOATS.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + _nbytes((dtype, shape))
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data, so that readers can map it
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in layout.items():
            array = next(arrays)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"{name}: the layout has {dtype}{shape}, the array is {array.dtype}{array.shape}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # frees it before the next one is gathered
        file.flush()
        os.fsync(file.fileno())


def _shards(layout: Layout, limit: int) -> dict[str, list[str]]:
    """Returns {file: names of its tensors}. Tensors fill files of at most `limit` bytes in order."""
    groups, room = [[]], limit
    for name, kind in layout.items():
        if _nbytes(kind) > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= _nbytes(kind)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _nbytes(kind: tuple[np.dtype, tuple[int, ...]]) -> int:
    return kind[0].itemsize * math.prod(kind[1])


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")  # readers ignore this suffix


def _weight_map(folder: Path) -> dict[str, str]:
    """Returns {tensor: file} of the folder's index, files relative to the folder; {} if there is no index in use."""
    if (folder / SINGLE).exists() or not (folder / INDEX).is_file():
        return {}
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        weight_map = {name: _inside(file) for name, file in weight_map.items()}
        if not weight_map:
            raise ValueError("it names no files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise BrokenCheckpoint(f"{folder / INDEX} is damaged: {fault!r}") from None
    if absent := sorted({file for file in weight_map.values() if not (folder / file).exists()}):
        raise BrokenCheckpoint(f"{folder / INDEX} names missing files: {', '.join(absent)}. Download them.")
    return weight_map


def weight_files(folder: Path) -> set[str]:
    """Returns the names of all files of a folder's checkpoint: a single file, or an index and its shards."""
    try:
        indexed = _weight_map(folder).values()
    except BrokenCheckpoint:
        indexed = ()
    shards = [path.name for path in folder.glob("model-*.safetensors") if re.fullmatch(_SHARD, path.name)]
    return {SINGLE, INDEX, *shards, *indexed}


def _inside(file: str) -> str:
    """Returns a file of an index as a path relative to its folder. Raises ValueError for a path outside the folder."""
    path = PurePosixPath(file)  # without "." and doubled slashes
    if path.is_absolute() or ".." in path.parts or "\\" in file or not path.name:
        raise ValueError(f"{file!r} is not a file in this folder")
    return str(path)


def _files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise BrokenCheckpoint(f"{folder} is not a folder")
    if (folder / SINGLE).exists():
        return [SINGLE]
    if files := sorted(path.name for path in folder.glob("*.safetensors")):
        return files
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    advice = (
        f"; {', '.join(pickles)} may be pickle files, which run code when they are opened and are never read here. "
        "If you trust them, convert them with `save_pretrained(..., safe_serialization=True)`"
        if pickles
        else ""
    )
    raise BrokenCheckpoint(f"{folder} has no *.safetensors{advice}")
