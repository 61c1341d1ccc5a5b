"""Errors for values in a file that are not supported, with suggestions."""

import difflib
from collections.abc import Iterable
from typing import Any


def unsupported(named: str, name: Any, known: Iterable[str]) -> ValueError:
    """The error for a `name` that is not one of `known`: the nearest of them, and all.

    named: what the file calls it, such as "vision_config.model_type".
    """
    known = sorted(known)
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
    return ValueError(f"{named} {name!r} is not supported; the nearest that is: {nearest!r}, all: {', '.join(known)}")
