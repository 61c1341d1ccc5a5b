"""Patterns of weights: regular expressions that are searched for in paths such as "decoder/layers/mlp/gate/w"."""

import difflib
import re
from collections.abc import Iterable
from typing import Any


def check_patterns(patterns: Iterable[str], paths: Iterable[str], what: str) -> None:
    """Raises ValueError, with the nearest names of parts and weights, for a pattern that is found in no path."""
    paths = list(paths)
    names = sorted({"/".join(path.split("/")[:n]) for path in paths for n in range(1, path.count("/") + 2)})
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ValueError(f"{what}: {pattern!r} matches no weight; the nearest names are {', '.join(nearest)}")


def first_found(pairs: Iterable[tuple[str, Any]], path: str, default: Any) -> Any:
    """The value of the first of (pattern, value) pairs whose pattern is found in a path."""
    return next((value for pattern, value in pairs if re.search(pattern, path)), default)
