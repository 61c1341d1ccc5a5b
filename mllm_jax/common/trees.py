"""Nested dicts of parameters, gradients, shapes or boxes, addressed by paths such as "decoder/norm/scale".

Patterns of weights are regular expressions that are searched for in paths.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from mllm_jax.common.errors import nearest

Tree = Mapping[str, Any]


def flatten(tree: Tree, separator: str = "/", prefix: str = "") -> dict[str, Any]:
    """Returns a nested dict as {"decoder/norm/scale": leaf}, in the order of the tree. Non-mappings are leaves."""
    leaves = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= flatten(value, separator, path + separator) if isinstance(value, Mapping) else {path: value}
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts `flatten`."""
    tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def partition(tree: Tree, chosen: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree into (leaves whose path is chosen, other leaves)."""
    leaves = flatten(tree)
    selected = {path: bool(chosen(path)) for path in leaves}
    first, second = ({path: leaf for path, leaf in leaves.items() if selected[path] == key} for key in (True, False))
    return unflatten(first), unflatten(second)


def join(*trees: Tree) -> dict[str, Any]:
    """Returns a tree with the leaves of all trees. A later tree replaces leaves of earlier ones."""
    return unflatten({path: leaf for tree in trees for path, leaf in flatten(tree).items()})


def map_with_paths(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """Returns the tree of `function(path, leaf)`."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def differences(theirs: Any, ours: Any, skip: Iterable[str] = (), path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (path, theirs, ours) of the fields in which two nested dataclasses differ.

    Fields with `compare=False` are ignored.

    Args:
      skip: names of fields that may differ.
    """
    if theirs == ours:
        return
    if type(theirs) is not type(ours) or not is_dataclass(ours):
        yield path, theirs, ours
        return
    for name in (field.name for field in fields(ours) if field.compare and field.name not in skip):
        yield from differences(getattr(theirs, name), getattr(ours, name), skip, f"{path}.{name}" if path else name)


def in_words(value: Any) -> str:
    """Returns a value of `differences` as text: the type of a dataclass, or the repr of another value."""
    return type(value).__name__ if is_dataclass(value) else repr(value)


def check_patterns(patterns: Iterable[str], paths: Iterable[str], what: str) -> None:
    """Raises ValueError, with the most similar names of parts and weights, for a pattern that matches no path."""
    paths = list(paths)
    names = sorted({"/".join(path.split("/")[:n]) for path in paths for n in range(1, path.count("/") + 2)})
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            close = nearest(pattern, names, count=3)
            raise ValueError(f"{what}: {pattern!r} matches no weight; the nearest names are {', '.join(close)}")


def first_found(pairs: Iterable[tuple[str, Any]], path: str, default: Any) -> Any:
    """Returns the value of the first (pattern, value) pair whose pattern is found in `path`, or the default."""
    return next((value for pattern, value in pairs if re.search(pattern, path)), default)
