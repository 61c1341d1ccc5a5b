"""Hugging Face checkpoints <-> our parameters, one tensor at a time: no host ever holds a full model."""

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
# Folders (`original/`, `onnx/`, ...), the same weights in another layout or precision, adapters, logs.
_NOT_OF_HUB = ["*/*", "consolidated*", "model*.*.safetensors", "adapter_*", "*.bin.index.json", "trainer_state.json"]
log = logging.getLogger(__name__)
_WORTH_A_BAR = 300_000_000  # parameters


def local_folder(source: str | os.PathLike) -> Path:
    """The folder itself, or a local copy of the hub's model `source` ("organization/name"): its weights and texts only.

    Raises:
      FileNotFoundError: there is no such folder, and the hub could not give it.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise FileNotFoundError(f"{source} is a file. Name its folder")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)):
        raise FileNotFoundError(f"there is no folder {source}")
    import huggingface_hub

    try:
        patterns = {"allow_patterns": _HUB_FILES, "ignore_patterns": _NOT_OF_HUB}
        return Path(huggingface_hub.snapshot_download(str(source), **patterns))
    except Exception as fault:
        raise FileNotFoundError(
            f"{source} is not a folder here, and the Hugging Face hub did not give a model of that name. Without "
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
    ties: Ties = {},  # noqa: B006 (nobody changes it)
) -> dict[str, Any]:
    """Streams a checkpoint into arrays with the given `shardings`.

    Large tensors are moved in parts, so host memory above the final arrays stays far below the largest tensor's. In a
    multi-process run each process reads only the slices of its own devices.

    Args:
      folder: a folder or the name of a model on the hub; or several, of which the first wins if two have a name.
      rows: the family's table of weights.
      abstract: nested dict of ShapeDtypeStruct, the parameters; only shapes are used.
      shardings: nested dict of jax.sharding.Sharding like `abstract`. None: all on the default device.
      dtype: dtype of the returned arrays, except for rows with their own.
      ignore: regular expressions that match full names of tensors which may be on disk and are not needed.
      rename: (regular expression, replacement) pairs that turn old names on disk into those of the table, all in order.
      ties: {leaf: other leaf}; if the tree lacks the first, its tensor may be on disk with the values of the other.

    Returns:
      nested dict of jax.Array like `abstract`.

    Raises:
      BrokenCheckpoint: the files cannot be read. WeightsMismatch: they do not fit. Both before anything is allocated.
      ValueError: the table does not fit the tree.
    """
    folders = [folder] if isinstance(folder, (str, os.PathLike)) else folder
    folders, rows = [local_folder(folder) for folder in folders], [Row(*row) for row in rows]
    found = {name: tensor for folder in reversed(folders) for name, tensor in open_checkpoint(folder).items()}
    found = named(found, rename)
    rows = stored_rows(rows, found, abstract)
    entries = expand(rows, abstract)
    where = " and ".join(map(str, folders))
    tensors = match(where, found, rows, entries, ignore, ties)
    leaves = flatten(abstract)
    default = SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))
    places = dict.fromkeys(leaves, default) if shardings is None else flatten(shardings)

    elements = {(part.path, part.index): (name, part) for name, entry in entries.items() for part in entry.parts}
    depths = {path: len(index) for path, index in elements}
    dtypes = {row.ours: row.dtype for row in rows if row.dtype}

    def element(path: str, index: tuple[int, ...]) -> np.ndarray:
        name, part = elements[path, index]
        return to_ours(tensors[name].map(), part)

    broken = set()

    def inspect(path: str, part: np.ndarray) -> None:
        if path not in broken and not all_finite(part):
            broken.add(path)

    with _progress("loading", sum(math.prod(leaf.shape) for leaf in leaves.values())) as advance:
        for path, leaf in leaves.items():
            read = functools.partial(element, path)
            kind = dtypes.get(path, dtype)
            look = functools.partial(inspect, path)
            leaves[path] = fill(tuple(leaf.shape), depths.get(path, 0), kind, places[path], read, advance, look)
    if broken:
        log.warning(
            "the weights in %s hold inf or NaN, in %d parameters: %s", where, len(broken), first_few(sorted(broken), 5)
        )
    return unflatten(leaves)


def save_tensors(
    params: Tree,
    rows: Iterable[Row | tuple],
    folder: str | os.PathLike,
    max_shard_bytes: int = 5_000_000_000,
    dtype: Any = None,
) -> None:
    """Writes parameters as `model.safetensors`, or as shards and an index where they exceed `max_shard_bytes`.

    Tensors are gathered one at a time. All processes must call; process 0 writes. Files get their names when all of
    them are complete on disk, and replace the weights that the folder held before.

    Args:
      params: nested dict of arrays, fp32, bf16 or fp16.
      rows: the family's table of weights.
      folder: made where absent.
      dtype: written; None = each parameter's own.
    """
    leaves, entries = flatten(params), expand(rows, params)
    layout = {name: (jnp.dtype(dtype or leaves[e.path].dtype), e.shape) for name, e in entries.items()}
    if odd := [f"{name} {kind}" for name, (kind, _) in layout.items() if kind not in FLOATS.values()]:
        raise ValueError(f"only fp32, bf16 and fp16 are written, these are not: {', '.join(odd)}")
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
            for _ in arrays():  # this process's part in the gathering
                pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_tensors")


class _Export(NamedTuple):
    """Conversion of one leaf for export; equal for equal tensors, so that it compiles once."""

    entry: Entry
    dtype: np.dtype

    def __call__(self, element: jax.Array) -> jax.Array:
        return to_theirs(element, self.entry).astype(self.dtype)


@contextmanager
def _progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal for what takes a while; gives the function that advances it by a number of parameters."""
    if total < _WORTH_A_BAR or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich import console, progress

    with progress.Progress(console=console.Console(stderr=True)) as bar:
        task = bar.add_task(f"{text} {total / 1e9:.1f}B parameters", total=total)
        yield lambda count: bar.advance(task, count)
