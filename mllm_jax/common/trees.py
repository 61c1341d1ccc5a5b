"""Nested dicts (of parameters, gradients, shapes, boxes) by the paths of their leaves, as "decoder/norm/scale".

Patterns of weights are regular expressions that are searched for in such paths.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from mllm_jax.common.errors import nearest

Tree = Mapping[str, Any]


def flatten(tree: Tree, separator: str = "/", prefix: str = "") -> dict[str, Any]:
    """A nested dict as `{"decoder/norm/scale": leaf}`, in the order of the tree. What is no mapping is a leaf."""
    leaves = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= flatten(value, separator, path + separator) if isinstance(value, Mapping) else {path: value}
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def partition(tree: Tree, chosen: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree into (the leaves whose paths are chosen, the others), each without the leaves of the other."""
    leaves = flatten(tree)
    part = {path: bool(chosen(path)) for path in leaves}
    first, second = ({path: leaf for path, leaf in leaves.items() if part[path] == own} for own in (True, False))
    return unflatten(first), unflatten(second)


def join(*trees: Tree) -> dict[str, Any]:
    """The tree that has the leaves of all; of one path, the last tree's."""
    return unflatten({path: leaf for tree in trees for path, leaf in flatten(tree).items()})


def map_with_paths(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """The tree of `function(path, leaf)`."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def differences(theirs: Any, ours: Any, skip: Iterable[str] = (), path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (path, theirs, ours) of the fields in which two configs, dataclasses inside each other, differ.

    Args:
      skip: names of fields that may differ.
    """
    if theirs == ours:
        return
    if type(theirs) is not type(ours) or not is_dataclass(ours):
        yield path, theirs, ours
        return
    for name in (field.name for field in fields(ours) if field.name not in skip):
        yield from differences(getattr(theirs, name), getattr(ours, name), skip, f"{path}.{name}" if path else name)


def check_patterns(patterns: Iterable[str], paths: Iterable[str], what: str) -> None:
    """Raises ValueError, with the nearest names of parts and weights, for a pattern that is found in no path."""
    paths = list(paths)
    names = sorted({"/".join(path.split("/")[:n]) for path in paths for n in range(1, path.count("/") + 2)})
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            close = nearest(pattern, names, count=3)
            raise ValueError(f"{what}: {pattern!r} matches no weight; the nearest names are {', '.join(close)}")


def first_found(pairs: Iterable[tuple[str, Any]], path: str, default: Any) -> Any:
    """The value of the first of (pattern, value) pairs whose pattern is found in a path."""
    return next((value for pattern, value in pairs if re.search(pattern, path)), default)
