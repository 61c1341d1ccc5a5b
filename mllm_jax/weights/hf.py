"""Reads and writes Hugging Face checkpoints one tensor at a time, so that no host holds a full model."""

import functools
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from mllm_jax.common.errors import first_few
from mllm_jax.common.trees import Tree, flatten, unflatten
from mllm_jax.weights.matching import Ties, match, named, stored_rows
from mllm_jax.weights.safetensors import FLOATS, all_finite, open_checkpoint, write_checkpoint
from mllm_jax.weights.streaming import fill, gather
from mllm_jax.weights.table import Entry, Row, expand, join, to_ours, to_theirs

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
# Folders (`original/`, `onnx/`, ...), copies of the weights in another layout or precision, adapters, logs.
_HUB_IGNORED = ["*/*", "consolidated*", "model*.*.safetensors", "adapter_*", "*.bin.index.json", "trainer_state.json"]
log = logging.getLogger(__name__)
_PROGRESS_MIN = 300_000_000  # parameters; smaller models have no progress bar


def local_folder(source: str | os.PathLike) -> Path:
    """Returns the folder `source`, or a local copy of the hub's model `source` ("organization/name").

    Only weights, configs and tokenizer files are downloaded.

    Raises:
      FileNotFoundError: there is no such folder, and it cannot be downloaded.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise FileNotFoundError(f"{source} is a file. Pass its folder.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)):
        raise FileNotFoundError(f"there is no folder {source}. Pass a folder or the name of a model on the hub.")
    import huggingface_hub

    try:
        patterns = {"allow_patterns": _HUB_FILES, "ignore_patterns": _HUB_IGNORED}
        return Path(huggingface_hub.snapshot_download(str(source), **patterns))
    except Exception as fault:
        raise FileNotFoundError(
            f"{source} is not a folder here, and the download from the Hugging Face hub failed. Without "
            f"network, run `hf download {source}` elsewhere and pass the folder. ({type(fault).__name__}: "
            f"{' '.join(str(fault).split())})"
        ) from fault


def load_tensors(
    folder: str | os.PathLike | Sequence[str | os.PathLike],
    rows: Iterable[Row | tuple],
    abstract: Tree,
    shardings: Tree | None = None,
    dtype: Any = "float32",
    *,
    ignore: Iterable[str] = (),
    rename: Iterable[tuple[str, str]] = (),
    ties: Ties = {},  # noqa: B006 (never changed)
) -> dict[str, Any]:
    """Streams a checkpoint into arrays with the given `shardings`.

    Large tensors are moved in parts, so that host memory beyond the final arrays stays far below the largest tensor. In
    a multi-process run each process reads only the slices of its own devices.

    Args:
      folder: a folder or the name of a model on the hub; or several, of which the first has priority for a name.
      rows: the family's weight table.
      abstract: nested dict of ShapeDtypeStruct, the parameters; only shapes are used.
      shardings: nested dict of jax.sharding.Sharding like `abstract`. None: all on the default device.
      dtype: dtype of the returned arrays, except for rows with a dtype of their own.
      ignore: regular expressions of full names of tensors that are not needed.
      rename: (regular expression, replacement) pairs, applied in order, that turn old names on disk into the table's.
      ties: {leaf: other leaf}. If the tree lacks the first, a tensor of it may be on disk if it equals the other's.

    Returns:
      nested dict of jax.Array like `abstract`.

    Raises:
      BrokenCheckpoint: the files cannot be read. Raised before anything is allocated, as are the following.
      WeightsMismatch: the tensors do not fit the model.
      ValueError: the table does not fit the tree.
    """
    folders = [folder] if isinstance(folder, (str, os.PathLike)) else folder
    folders, rows = [local_folder(folder) for folder in folders], [Row(*row) for row in rows]
    on_disk = {name: tensor for folder in reversed(folders) for name, tensor in open_checkpoint(folder).items()}
    on_disk = named(on_disk, rename)
    rows = stored_rows(rows, on_disk, abstract)
    entries = expand(rows, abstract)
    where = " and ".join(map(str, folders))
    tensors = match(where, on_disk, rows, entries, ignore, ties)
    leaves = flatten(abstract)
    default = SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))
    targets = dict.fromkeys(leaves, default) if shardings is None else flatten(shardings)

    elements = {(part.path, part.index): (name, part) for name, entry in entries.items() for part in entry.parts}
    depths = {path: len(index) for path, index in elements}
    dtypes = {row.ours: row.dtype for row in rows if row.dtype}

    def element(path: str, index: tuple[int, ...]) -> np.ndarray:
        name, part = elements[path, index]
        return to_ours(tensors[name].map(), part)

    nonfinite = set()

    def inspect(path: str, part: np.ndarray) -> None:
        if path not in nonfinite and not all_finite(part):
            nonfinite.add(path)

    with _progress("loading", sum(math.prod(leaf.shape) for leaf in leaves.values())) as advance:
        for path, leaf in leaves.items():
            read = functools.partial(element, path)
            kind = dtypes.get(path, dtype)
            check = functools.partial(inspect, path)
            leaves[path] = fill(tuple(leaf.shape), depths.get(path, 0), kind, targets[path], read, advance, check)
    if nonfinite:
        log.warning(
            "the weights in %s contain inf or NaN, in %d parameters: %s",
            where,
            len(nonfinite),
            first_few(sorted(nonfinite), 5),
        )
    return unflatten(leaves)


def save_tensors(
    params: Tree,
    rows: Iterable[Row | tuple],
    folder: str | os.PathLike,
    max_shard_bytes: int = 5_000_000_000,
    dtype: Any = None,
) -> None:
    """Writes parameters as `model.safetensors`, or as shards and an index if they exceed `max_shard_bytes`.

    Tensors are gathered one at a time. All processes must call this; process 0 writes. Files are renamed to their final
    names when all are complete on disk, and replace earlier weights of the folder.

    Args:
      params: nested dict of arrays, fp32, bf16 or fp16.
      rows: the family's weight table.
      folder: folder to write, created if it does not exist.
      max_shard_bytes: largest size of a file, except for a single larger tensor.
      dtype: dtype on disk. None: the dtype of each parameter.
    Raises:
      ValueError: a dtype is not fp32, bf16 or fp16, or the table does not fit the tree.
    """
    leaves, entries = flatten(params), expand(rows, params)
    layout = {name: (jnp.dtype(dtype or leaves[e.path].dtype), e.shape) for name, e in entries.items()}
    if others := [f"{name} {kind}" for name, (kind, _) in layout.items() if kind not in FLOATS.values()]:
        raise ValueError(f"only fp32, bf16 and fp16 can be written. Cast these parameters: {', '.join(others)}")
    layout = dict(sorted(layout.items(), key=lambda item: -item[1][0].itemsize))  # keeps every tensor of a file aligned

    def arrays() -> Iterator[np.ndarray]:
        for name, (kind, shape) in layout.items():
            pieces = []
            for part in entries[name].parts:
                change = _Export(part._replace(path="", index=()), kind)
                pieces.append(gather(leaves[part.path], part.index, change))
            yield join(pieces, entries[name])
            advance(math.prod(shape))

    with _progress("saving", sum(math.prod(shape) for _, shape in layout.values())) as advance:
        if jax.process_index() == 0:
            write_checkpoint(Path(folder), layout, arrays(), max_shard_bytes)
        else:
            for _ in arrays():  # takes part in gathering the tensors
                pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_tensors")


class _Export(NamedTuple):
    """Conversion of one leaf for export. Instances for tensors of one kind are equal, so that it compiles once."""

    entry: Entry
    dtype: np.dtype

    def __call__(self, element: jax.Array) -> jax.Array:
        return to_theirs(element, self.entry).astype(self.dtype)


@contextmanager
def _progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on a terminal for large models; yields a function that advances it by some parameters."""
    if total < _PROGRESS_MIN or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich import console, progress

    with progress.Progress(console=console.Console(stderr=True)) as bar:
        task = bar.add_task(f"{text} {total / 1e9:.1f}B parameters", total=total)
        yield lambda count: bar.advance(task, count)
