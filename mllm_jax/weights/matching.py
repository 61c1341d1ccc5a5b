"""Matches tensors of a checkpoint with a family's table: former names, other layouts, tied weights."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mllm_jax.common.trees import Tree, flatten
from mllm_jax.weights.safetensors import READABLE, Tensor
from mllm_jax.weights.table import Entry, Row, tensors_of

_PART = 16_000_000  # bytes of a tensor that are compared at once
Ties = Mapping[str, str]  # {leaf that a tree may lack: leaf whose values its tensor then has}


class WeightsMismatch(ValueError):
    """A checkpoint does not fit the model; the message lists every missing, unexpected and mis-shaped tensor."""


class Found(NamedTuple):
    """A tensor of a checkpoint: the table's name for it, its own, and where it is."""

    name: str
    disk: str
    tensor: Tensor

    def __str__(self) -> str:
        return f"{self.disk} (as {self.name})" if self.name != self.disk else self.disk


def named(tensors: Mapping[str, Tensor], rename: Iterable[tuple[str, str]]) -> list[Found]:
    """The tensors of a checkpoint by the table's names; all pairs (regular expression, replacement) apply in order."""
    found, rename = [], tuple(rename)
    for disk, tensor in tensors.items():
        name = disk
        for old, new in rename:
            name = re.sub(old, new, name)
        found.append(Found(name, disk, tensor))
    return found


def stored_rows(rows: Iterable[Row], found: Sequence[Found], abstract: Tree) -> list[Row]:
    """The rows in the layout that the checkpoint has, of those that `Row.others` lists: the one with most tensors."""
    shapes = {tensor.name: tensor.tensor.shape for tensor in found}
    leaves = flatten(abstract)

    def count(row: Row) -> int:
        wanted = tensors_of(row, tuple(leaves[row.ours].shape))
        return sum(shapes.get(name) == entry.shape for name, entry in wanted)

    return [max(row.layouts, key=count) if row.others and row.ours in leaves else row for row in rows]


def untied(found: Sequence[Found], rows: Iterable[Row], ties: Ties) -> list[tuple[Found, Found]]:
    """(tensor, the one it should equal) of every pair of `ties` that a checkpoint has with different values."""
    places = {row.ours: row.theirs for row in rows}
    tensors = {tensor.name: tensor for tensor in found}
    pairs = [(tensors.get(places.get(leaf)), tensors.get(places.get(source))) for leaf, source in ties.items()]
    return [(own, other) for own, other in pairs if own and other and not equal(own.tensor, other.tensor)]


def equal(left: Tensor, right: Tensor) -> bool:
    """Returns whether two tensors have the same shape and, as fp32, the same values. Reads parts until two differ."""
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
    """The tensors by the table's names.

    A tensor whose leaf is tied and not in the tree must equal that of the leaf it is tied to, and stands in for it
    where the checkpoint has no other.

    Raises:
      WeightsMismatch: they are not exactly what the table asks for; all faults are listed.
    """
    tensors, faults, ignore = {}, [], tuple(ignore)
    places, there = {row.ours: row.theirs for row in rows}, {tensor.name for tensor in found}
    ties = {leaf: source for leaf, source in ties.items() if places.get(leaf, "") not in entries}
    sources = {places[leaf]: places[source] for leaf, source in ties.items() if leaf in places and source in places}
    faults += [
        f"tied: {own} differs from {other}, to which the model ties it; give the model a head of its own "
        "(tie_word_embeddings=false, in a run tie_embeddings=False)"
        for own, other in untied(found, rows, ties)
    ]
    for tensor in found:
        name = tensor.name
        if name in sources:
            if sources[name] in there:
                continue
            name = sources[name]
        entry = entries.get(name)
        if entry is None:
            if not any(re.fullmatch(pattern, own) for pattern in ignore for own in (name, tensor.disk)):
                faults.append(f"unexpected: {tensor} {list(tensor.tensor.shape)}")
            continue
        if name in tensors:
            faults.append(f"twice: {tensor}")
        if tensor.tensor.shape != entry.shape:
            own, wanted = list(tensor.tensor.shape), list(entry.shape)
            faults.append(f"shape: {tensor} is {own}, {_place(entry)} needs {wanted}")
        if tensor.tensor.dtype not in READABLE:
            only = f"only {', '.join(READABLE)} can be read; load a copy without quantization"
            faults.append(f"dtype: {tensor} is {tensor.tensor.dtype}, {only}")
        tensors[name] = tensor.tensor
    missing = entries.keys() - tensors.keys()
    faults += [f"missing: {name} {list(entries[name].shape)} for {_place(entries[name])}" for name in missing]
    if faults:
        text = "\n  ".join(sorted(faults))
        raise WeightsMismatch(f"the weights in {where} do not fit the model, {len(faults)} faults:\n  {text}")
    return tensors


def _place(entry: Entry) -> str:
    return entry.path + "".join(f"[{i}]" for i in entry.index)
