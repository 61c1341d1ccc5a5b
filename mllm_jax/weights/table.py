"""One table of rows per family maps our parameters to Hugging Face's tensors, in both directions.

    Row("decoder/layers/attention/q/w", "model.language_model.layers.{n}.self_attn.q_proj.weight", "(n h) d -> d n h")

Our leaf `decoder/layers/attention/q/w` is the stack, along its leading axis, of all tensors whose names have a number
in place of `{n}`, each rearranged by the einops pattern `theirs -> ours`. Every further `{name}` is another leading
axis, in order of appearance; names in braces are independent of the letters of the pattern. `values` replaces the
numbers 0, 1, ... in names by others (every second layer) or by words ("gate", "up"). The pattern "" or "..." leaves a
tensor unchanged. Axis sizes come from our abstract tree; the inverse is the reversed pattern.

Several leaves may share one tensor, each as a part along one axis of the pattern. `part` is (axis, first, count):

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

    ours: path of our leaf.
    theirs: name of their tensors, with a name in braces for each stacked axis.
    pattern: einops pattern "theirs -> ours". "" or "...": unchanged.
    sizes: sizes of axes that our shape does not determine, such as c, t and y of "d c t y x -> (c t y x) d".
    values: {name in braces: numbers or words that replace 0, 1, ... in their names}.
    dtype: dtype of our leaf. None: the dtype of the model.
    part: (axis, first, count): our leaf is the part of `axis`, of size `count`, from `first` on. None: all of it.
    others: changes of fields for files of other layouts, such as {"pattern": "f d -> d f"}. These are only read.
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
        """The row itself, and the row for each layout of `others`."""
        row = self._replace(others=())
        return [row, *(row._replace(**fields) for fields in self.others)]


class Entry(NamedTuple):
    """Location in our tree of one of their tensors, or of a part of it."""

    path: str  # our leaf
    index: tuple[int, ...]  # index on the leaf's stacked leading axes
    pattern: str  # theirs -> ours, without the stacked axes. "": unchanged
    sizes: tuple[tuple[str, int], ...]  # size of every named axis of the pattern, on our side
    shape: tuple[int, ...]  # shape of their tensor
    part: tuple[str, int, int] | None = None  # see Row
    rest: tuple["Entry", ...] = ()  # the tensor's other parts, in order

    @property
    def parts(self) -> tuple["Entry", ...]:
        """All parts of the tensor in order, this one first."""
        return (self._replace(rest=()), *self.rest)


def expand(rows: Iterable[Row | tuple], abstract: Tree) -> dict[str, Entry]:
    """Returns all tensors of a checkpoint of this tree: {their name: Entry}.

    Args:
      rows: the family's table, Rows or tuples. Rows of absent leaves are ignored, so that a table may list optional
        weights (for example, a head that may be tied).
      abstract: nested dict of leaves with a `.shape`.

    Raises:
      ValueError: the table does not fit the tree: a leaf has no row, a leaf or a name has two, or a pattern cannot give
        the leaf's shape. The message lists all faults.
    """
    leaves = flatten(abstract)
    entries, by_name, covered, faults = {}, {}, set(), []
    for row in (Row(*row) for row in rows):
        if row.ours not in leaves:
            continue
        if row.ours in covered:
            faults.append(f"{row.ours}: more than one row")
        covered.add(row.ours)
        try:
            for name, entry in tensors_of(row, tuple(leaves[row.ours].shape)):
                by_name.setdefault(name, []).append(entry)
        except ValueError as fault:
            faults.append(str(fault))
    for name, parts in by_name.items():
        if fault := _overlap(parts):
            faults.append(f"{name}: {fault}")
        first, *others = sorted(parts, key=lambda entry: entry.part[1] if entry.part else 0)
        entries[name] = first._replace(rest=tuple(others))
    faults += [f"{path}: no row" for path in leaves if path not in covered]
    if faults:
        raise ValueError("the table of weights does not fit the tree of parameters:\n  " + "\n  ".join(faults))
    return entries


def tensors_of(row: Row, shape: tuple[int, ...]) -> list[tuple[str, Entry]]:
    """Returns (their name, Entry) of every tensor of a row's leaf of this shape. ValueError if it does not fit."""
    axes = tuple(dict.fromkeys(re.findall(r"\{(\w+)\}", row.theirs)))
    try:
        sizes, theirs_shape = _solve(row, shape, len(axes))
    except ValueError as fault:
        raise ValueError(f"{row.ours} {list(shape)} from {row.theirs}, {row.pattern!r}: {fault}") from None
    values = [row.values.get(axis, range(size)) for axis, size in zip(axes, shape)]
    if wrong := [axis for axis, size, texts in zip(axes, shape, values) if len(texts) != size]:
        raise ValueError(f"{row.ours} {list(shape)}: the values of {wrong} do not match the size of their axis")
    pattern = "" if row.pattern == "..." else row.pattern
    return [
        (
            row.theirs.format(**{axis: texts[i] for axis, texts, i in zip(axes, values, index)}),
            Entry(row.ours, index, pattern, sizes, theirs_shape, row.part),
        )
        for index in np.ndindex(shape[: len(axes)])
    ]


def _overlap(parts: Sequence[Entry]) -> str | None:
    """Returns the fault of the entries of one tensor, or None if together they cover it exactly once."""
    if len(parts) == 1 and parts[0].part is None:
        return None
    paths = " and ".join(entry.path for entry in parts)
    if any(entry.part is None for entry in parts):
        return f"both {paths}"
    ends = sorted((entry.part[1], entry.part[1] + dict(entry.sizes)[entry.part[0]]) for entry in parts)
    adjoining = [first for first, _ in ends] + [parts[0].part[2]] == [0] + [last for _, last in ends]
    consistent = len({(entry.part[0], entry.part[2], entry.shape) for entry in parts}) == 1
    return None if adjoining and consistent else f"{paths} are not the parts of one tensor: {[e.part for e in parts]}"


def to_ours(array: Array, entry: Entry) -> Array:
    """Returns their tensor as an element of our leaf, without the stacked axes; a view if numpy can provide one."""
    if entry.part is None:
        return rearrange(array, entry.pattern, **dict(entry.sizes)) if entry.pattern else array
    theirs, split, ours = _sides(entry)
    axis, first, count = entry.part
    array = rearrange(array, f"{theirs} -> {split}", **dict(entry.sizes) | {axis: count})
    window = (slice(None),) * split.split().index(axis) + (slice(first, first + dict(entry.sizes)[axis]),)
    return rearrange(array[window], f"{split} -> {ours}", **dict(entry.sizes))


def to_theirs(array: Array, entry: Entry) -> Array:
    """Inverts `to_ours`. The result for a part has all axes of the pattern separate, as `join` expects."""
    if not entry.pattern:
        return array
    theirs, split, ours = _sides(entry)
    return rearrange(array, f"{ours} -> {split if entry.part else theirs}", **dict(entry.sizes))


def join(arrays: Sequence[np.ndarray], entry: Entry) -> np.ndarray:
    """Joins the results of `to_theirs` for all `entry.parts` into their tensor."""
    if entry.part is None:
        return arrays[0]
    theirs, split, _ = _sides(entry)
    axis, _, count = entry.part
    joined = np.concatenate(arrays, axis=split.split().index(axis))
    return rearrange(joined, f"{split} -> {theirs}", **dict(entry.sizes) | {axis: count})


def _sides(entry: Entry) -> tuple[str, str, str]:
    """Returns their side of a pattern, their side with all axes separate, and our side.

    Example: "(n h) d -> d n h" gives "(n h) d", "n h d" and "d n h".
    """
    theirs, _, ours = (side.strip() for side in entry.pattern.partition("->"))
    return theirs, " ".join(axis for group in _axes(theirs) for axis in group), ours


def _solve(row: Row, shape: tuple[int, ...], depth: int) -> tuple[tuple[tuple[str, int], ...], tuple[int, ...]]:
    """Returns (sizes of all axes of a row's pattern, shape of their tensor). `depth`: number of our stacked axes."""
    if depth > len(shape):
        raise ValueError(f"the name has {depth} stacked axes, the leaf has {len(shape)} axes")
    if row.pattern in ("", "..."):
        return (), shape[depth:]
    theirs, ours = (_axes(side) for side in row.pattern.split("->"))
    if len(ours) != len(shape) - depth:
        raise ValueError(f"the pattern gives {len(ours)} axes, the leaf has {len(shape) - depth} that are not stacked")
    sizes = dict(row.sizes)
    for group, size in zip(ours, shape[depth:]):
        free = [axis for axis in group if axis not in sizes]
        fixed = math.prod(sizes[axis] for axis in group if axis in sizes)
        if len(free) == 1 and fixed:
            sizes[free[0]] = size // fixed
        if len(free) > 1 or math.prod(sizes[axis] for axis in group) != size:
            raise ValueError(f"({' '.join(group)}) cannot be {size}. Add the sizes of its axes to the row's `sizes`.")
    if unknown := {axis for group in theirs for axis in group} - sizes.keys():
        raise ValueError(f"axes {sorted(unknown)} are not on our side")
    if row.part and row.part[0] not in sizes:
        raise ValueError(f"part names {row.part[0]!r}, which is not an axis of the pattern")
    their_sizes = sizes | {row.part[0]: row.part[2]} if row.part else sizes
    return tuple(sizes.items()), tuple(math.prod(their_sizes[axis] for axis in group) for group in theirs)


def _axes(side: str) -> list[list[str]]:
    """Returns the axes of one side of a pattern by group: "(n h) d 1" -> [["n", "h"], ["d"], []]."""
    groups = re.findall(r"\(([^()]*)\)|(\S+)", side)
    return [[axis for axis in (group or single).split() if axis != "1"] for group, single in groups]
