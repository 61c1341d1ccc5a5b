"""One table of rows per family maps our parameters to Hugging Face's tensors, in both directions.

    Row("decoder/layers/attention/q/w", "model.language_model.layers.{n}.self_attn.q_proj.weight", "(n h) d -> d n h")

reads: our leaf `decoder/layers/attention/q/w` is a stack, along its leading axis, of the tensors whose names have a
number in place of `{n}`, each rearranged by the einops pattern `theirs -> ours`. Each further `{name}` is one more
leading axis, in order of appearance; names in braces are independent of the letters of the pattern. The texts that
replace 0, 1, ... in a name may be given: other numbers (every second layer) or words ("gate", "up"). A pattern of
"" or "..." keeps a tensor as it is. Axis sizes come from our abstract tree; the inverse is the reversed pattern.

Several of our leaves may share one tensor, each as a part along one axis of the pattern, which `part` names:

    Row("decoder/layers/mlp/up/w", "model.layers.{n}.mlp.gate_up_proj.weight", "f d -> d f", part=("f", 96, 192))
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from mllm_jax.common.trees import Tree, flatten
from mllm_jax.types import Array


class Row(NamedTuple):
    """One kind of tensor.

    sizes: the axes that our shape leaves open: c, t, y in "d c t y x -> (c t y x) d".
    values: what stands in their names for 0, 1, ... of a stacked axis, where that is something else.
    dtype: of our leaf, where it has its own in a model of any dtype.
    part: (axis, first, count): ours is what begins at `first` of `count` along that axis; other rows have the rest.
    others: fields in which the row differs for files of another layout, such as {"pattern": "f d -> d f"}; these are
      read too, and never written.
    """

    ours: str
    theirs: str
    pattern: str = ""
    sizes: Mapping[str, int] = {}
    values: Mapping[str, Sequence[Any]] = {}
    dtype: str | None = None
    part: tuple[str, int, int] | None = None
    others: Sequence[Mapping[str, Any]] = ()

    @property
    def layouts(self) -> list["Row"]:
        """The row, and what it is for files of other layouts."""
        own = self._replace(others=())
        return [own, *(own._replace(**fields) for fields in self.others)]


class Entry(NamedTuple):
    """Location of one of their tensors, or of a part of it, in our tree."""

    path: str  # our leaf
    index: tuple[int, ...]  # place on the leaf's stacked leading axes
    pattern: str  # theirs -> ours, without the stacked axes; "" = as it is
    sizes: tuple[tuple[str, int], ...]  # of every named axis of the pattern, on our side
    shape: tuple[int, ...]  # of their tensor
    part: tuple[str, int, int] | None = None  # see Row
    rest: tuple["Entry", ...] = ()  # the other parts of the tensor, in order

    @property
    def parts(self) -> tuple["Entry", ...]:
        """All parts of the tensor in order, itself the first."""
        return (self._replace(rest=()), *self.rest)


def expand(rows: Iterable[Row | tuple], abstract: Tree) -> dict[str, Entry]:
    """Returns every tensor of a checkpoint of this tree: `{their name: Entry}`.

    Args:
      rows: the family's table, Rows or tuples. A row whose leaf is not in the tree is not used, so that a table may
        list optional parts (a head that may be tied, say).
      abstract: nested dict of anything with a `.shape`.

    Raises:
      ValueError: the table does not fit the tree: a leaf without a row, two rows for one leaf or one name, or a pattern
        that cannot give the leaf's shape. The message lists all faults.
    """
    leaves = flatten(abstract)
    entries, found, covered, faults = {}, {}, set(), []
    for row in (Row(*row) for row in rows):
        if row.ours not in leaves:
            continue
        if row.ours in covered:
            faults.append(f"{row.ours}: more than one row")
        covered.add(row.ours)
        try:
            for name, entry in tensors_of(row, tuple(leaves[row.ours].shape)):
                found.setdefault(name, []).append(entry)
        except ValueError as fault:
            faults.append(str(fault))
    for name, parts in found.items():
        if fault := _overlap(parts):
            faults.append(f"{name}: {fault}")
        first, *rest = sorted(parts, key=lambda entry: entry.part[1] if entry.part else 0)
        entries[name] = first._replace(rest=tuple(rest))
    faults += [f"{path}: no row" for path in leaves if path not in covered]
    if faults:
        raise ValueError("the table of weights does not fit the tree of parameters:\n  " + "\n  ".join(faults))
    return entries


def tensors_of(row: Row, shape: tuple[int, ...]) -> list[tuple[str, Entry]]:
    """(their name, Entry) of every tensor that a row's leaf of this shape has. ValueError where they do not fit."""
    axes = tuple(dict.fromkeys(re.findall(r"\{(\w+)\}", row.theirs)))
    try:
        sizes, theirs_shape = _solve(row, shape, len(axes))
    except ValueError as fault:
        raise ValueError(f"{row.ours} {list(shape)} from {row.theirs}, {row.pattern!r}: {fault}") from None
    stands = [row.values.get(axis, range(size)) for axis, size in zip(axes, shape)]
    if wrong := [axis for axis, size, own in zip(axes, shape, stands) if len(own) != size]:
        raise ValueError(f"{row.ours} {list(shape)}: the values of {wrong} do not match the size of their axis")
    pattern = "" if row.pattern == "..." else row.pattern
    return [
        (
            row.theirs.format(**{axis: own[i] for axis, own, i in zip(axes, stands, index)}),
            Entry(row.ours, index, pattern, sizes, theirs_shape, row.part),
        )
        for index in np.ndindex(shape[: len(axes)])
    ]


def _overlap(parts: Sequence[Entry]) -> str | None:
    """Fault of the entries of one tensor. None: together they are all of it."""
    if len(parts) == 1 and parts[0].part is None:
        return None
    paths = " and ".join(entry.path for entry in parts)
    if any(entry.part is None for entry in parts):
        return f"both {paths}"
    ends = sorted((entry.part[1], entry.part[1] + dict(entry.sizes)[entry.part[0]]) for entry in parts)
    whole = [first for first, _ in ends] + [parts[0].part[2]] == [0] + [last for _, last in ends]
    alike = len({(entry.part[0], entry.part[2], entry.shape) for entry in parts}) == 1
    return None if whole and alike else f"{paths} are not the parts of one tensor: {[e.part for e in parts]}"


def to_ours(array: Array, entry: Entry) -> Array:
    """Their tensor as an element of our leaf (without the stacked axes); a view where numpy can give one."""
    if entry.part is None:
        return rearrange(array, entry.pattern, **dict(entry.sizes)) if entry.pattern else array
    theirs, split, ours = _sides(entry)
    axis, first, count = entry.part
    apart = rearrange(array, f"{theirs} -> {split}", **dict(entry.sizes) | {axis: count})
    window = (slice(None),) * split.split().index(axis) + (slice(first, first + dict(entry.sizes)[axis]),)
    return rearrange(apart[window], f"{split} -> {ours}", **dict(entry.sizes))


def to_theirs(array: Array, entry: Entry) -> Array:
    """The inverse of `to_ours`; for a part, with all axes of the pattern separate, for `join`."""
    if not entry.pattern:
        return array
    theirs, split, ours = _sides(entry)
    return rearrange(array, f"{ours} -> {split if entry.part else theirs}", **dict(entry.sizes))


def join(arrays: Sequence[np.ndarray], entry: Entry) -> np.ndarray:
    """Their tensor from what `to_theirs` makes of all of `entry.parts`."""
    if entry.part is None:
        return arrays[0]
    theirs, split, _ = _sides(entry)
    axis, _, count = entry.part
    whole = np.concatenate(arrays, axis=split.split().index(axis))
    return rearrange(whole, f"{split} -> {theirs}", **dict(entry.sizes) | {axis: count})


def _sides(entry: Entry) -> tuple[str, str, str]:
    """Their side of a pattern, the same with all axes separate, and ours."""
    theirs, _, ours = (side.strip() for side in entry.pattern.partition("->"))
    return theirs, " ".join(axis for group in _axes(theirs) for axis in group), ours


def _solve(row: Row, shape: tuple[int, ...], depth: int) -> tuple[tuple[tuple[str, int], ...], tuple[int, ...]]:
    """Sizes of all axes of a row's pattern, and the shape of their tensor; `depth` leading axes of ours are stacked."""
    if depth > len(shape):
        raise ValueError(f"the name has {depth} stacked axes, the leaf has {len(shape)}")
    if row.pattern in ("", "..."):
        return (), shape[depth:]
    theirs, ours = (_axes(side) for side in row.pattern.split("->"))
    if len(ours) != len(shape) - depth:
        raise ValueError(f"the pattern gives {len(ours)} axes, the leaf has {len(shape) - depth} that are not stacked")
    sizes = dict(row.sizes)
    for group, size in zip(ours, shape[depth:]):
        free = [axis for axis in group if axis not in sizes]
        known = math.prod(sizes[axis] for axis in group if axis in sizes)
        if len(free) == 1 and known:
            sizes[free[0]] = size // known
        if len(free) > 1 or math.prod(sizes[axis] for axis in group) != size:
            raise ValueError(f"({' '.join(group)}) cannot be {size}; give the sizes of the axes in the row's `sizes`")
    if unknown := {axis for group in theirs for axis in group} - sizes.keys():
        raise ValueError(f"axes {sorted(unknown)} are not on our side")
    if row.part and row.part[0] not in sizes:
        raise ValueError(f"part names {row.part[0]!r}, which is not an axis of the pattern")
    whole = sizes | {row.part[0]: row.part[2]} if row.part else sizes
    return tuple(sizes.items()), tuple(math.prod(whole[axis] for axis in group) for group in theirs)


def _axes(side: str) -> list[list[str]]:
    """ "(n h) d 1" -> [["n", "h"], ["d"], []]."""
    groups = re.findall(r"\(([^()]*)\)|(\S+)", side)
    return [[axis for axis in (group or single).split() if axis != "1"] for group, single in groups]
