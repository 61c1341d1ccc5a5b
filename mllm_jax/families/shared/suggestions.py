"""Errors for unsupported values in a file, with suggestions."""

import difflib
from collections.abc import Iterable
from typing import Any


def unsupported(named: str, name: Any, known: Iterable[str]) -> ValueError:
    """Returns the error for a value that is not one of `known`; it names the nearest supported value and all of them.

    Args:
      named: path of the field, such as "vision_config.model_type".
      name: its value.
    """
    known = sorted(known)
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
    return ValueError(f"{named}={name!r}: not supported. Did you mean {nearest!r}? Supported: {', '.join(known)}.")
