"""Matches the tensors of a checkpoint with a family's table: renamed tensors, other layouts, tied weights."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mllm_jax.common.trees import Tree, flatten
from mllm_jax.weights.safetensors import READABLE, Tensor
from mllm_jax.weights.table import Entry, Row, tensors_of

_PART = 16_000_000  # bytes of two tensors that are compared at once, as fp32
Ties = Mapping[str, str]  # {leaf that a tree may lack: leaf that it is tied to}


class WeightsMismatch(ValueError):
    """A checkpoint does not fit the model. The message lists all missing, unexpected and wrongly shaped tensors."""


class Found(NamedTuple):
    """A tensor of a checkpoint: its name in the table, its name on disk, and its location."""

    name: str
    disk: str
    tensor: Tensor

    def __str__(self) -> str:
        return f"{self.disk} (as {self.name})" if self.name != self.disk else self.disk


def named(tensors: Mapping[str, Tensor], rename: Iterable[tuple[str, str]]) -> list[Found]:
    """Returns the tensors of a checkpoint with their names in the table.

    `rename`: (regular expression, replacement) pairs, all applied in order.
    """
    renamed, rename = [], tuple(rename)
    for disk, tensor in tensors.items():
        name = disk
        for old, new in rename:
            name = re.sub(old, new, name)
        renamed.append(Found(name, disk, tensor))
    return renamed


def stored_rows(rows: Iterable[Row], found: Sequence[Found], abstract: Tree) -> list[Row]:
    """Returns each row in the layout of `Row.layouts` that matches most tensors of the checkpoint."""
    shapes = {tensor.name: tensor.tensor.shape for tensor in found}
    leaves = flatten(abstract)

    def count(row: Row) -> int:
        entries = tensors_of(row, tuple(leaves[row.ours].shape))
        return sum(shapes.get(name) == entry.shape for name, entry in entries)

    return [max(row.layouts, key=count) if row.others and row.ours in leaves else row for row in rows]


def untied(found: Sequence[Found], rows: Iterable[Row], ties: Ties) -> list[tuple[Found, Found]]:
    """Returns the pairs (tensor, tied tensor) of `ties` whose values differ in the checkpoint."""
    names = {row.ours: row.theirs for row in rows}
    tensors = {tensor.name: tensor for tensor in found}
    pairs = [(tensors.get(names.get(leaf)), tensors.get(names.get(source))) for leaf, source in ties.items()]
    return [(left, right) for left, right in pairs if left and right and not equal(left.tensor, right.tensor)]


def equal(left: Tensor, right: Tensor) -> bool:
    """Returns whether two tensors have the same shape and, as fp32, the same values. Stops at a difference."""
    if left.shape != right.shape or not {left.dtype, right.dtype} <= READABLE.keys():
        return False
    if left == right:
        return True
    flat = [tensor.map().reshape(-1) for tensor in (left, right)]
    count = _PART // 8
    parts = ([array[start : start + count] for array in flat] for start in range(0, flat[0].size, count))
    return all(np.array_equal(*(part.astype(np.float32) for part in pair)) for pair in parts)


def match(
    where: str,
    found: Sequence[Found],
    rows: Sequence[Row],
    entries: Mapping[str, Entry],
    ignore: Iterable[str],
    ties: Ties,
) -> dict[str, Tensor]:
    """Returns the tensors by their names in the table.

    If a tied leaf is not in the tree, its tensor must equal the one it is tied to, and replaces it if that is missing.

    Args:
      where: folders of the checkpoint, for messages.
      found: tensors of the checkpoint.
      rows: the family's weight table.
      entries: tensors that the model needs, by name.
      ignore: regular expressions of full names of tensors that are not needed.
      ties: see `load_tensors`.
    Raises:
      WeightsMismatch: the tensors are not exactly those of `entries`. The message lists all faults.
    """
    tensors, faults, ignore = {}, [], tuple(ignore)
    theirs, names = {row.ours: row.theirs for row in rows}, {tensor.name for tensor in found}
    ties = {leaf: source for leaf, source in ties.items() if theirs.get(leaf, "") not in entries}
    sources = {theirs[leaf]: theirs[source] for leaf, source in ties.items() if leaf in theirs and source in theirs}
    faults += [
        f"tied: {left} differs from {right}, to which the model ties it. Untie the model's head "
        "(tie_word_embeddings=false, in a run tie_embeddings=False)."
        for left, right in untied(found, rows, ties)
    ]
    for tensor in found:
        name = tensor.name
        if name in sources:
            if sources[name] in names:
                continue
            name = sources[name]
        entry = entries.get(name)
        if entry is None:
            if not any(re.fullmatch(pattern, alias) for pattern in ignore for alias in (name, tensor.disk)):
                faults.append(f"unexpected: {tensor} {list(tensor.tensor.shape)}")
            continue
        if name in tensors:
            faults.append(f"twice: {tensor}")
        if tensor.tensor.shape != entry.shape:
            actual, expected = list(tensor.tensor.shape), list(entry.shape)
            faults.append(f"shape: {tensor} is {actual}, {_place(entry)} needs {expected}")
        if tensor.tensor.dtype not in READABLE:
            advice = f"only {', '.join(READABLE)} can be read. Load a copy without quantization."
            faults.append(f"dtype: {tensor} is {tensor.tensor.dtype}, {advice}")
        tensors[name] = tensor.tensor
    missing = entries.keys() - tensors.keys()
    faults += [f"missing: {name} {list(entries[name].shape)} for {_place(entries[name])}" for name in missing]
    if faults:
        text = "\n  ".join(sorted(faults))
        raise WeightsMismatch(f"the weights in {where} do not fit the model ({len(faults)} faults):\n  {text}")
    return tensors


def _place(entry: Entry) -> str:
    """Returns the place of an entry in our tree, such as "decoder/layers/mlp/up/w[3]"."""
    return entry.path + "".join(f"[{i}]" for i in entry.index)
