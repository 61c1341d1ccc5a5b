"""Texts for error messages: causes of system errors, suggestions for unknown names, shortened values."""

import difflib
from collections.abc import Iterable
from typing import Any

from mllm_jax.common.files import DISK_FULL, is_disk_full

MOST = 80  # largest number of characters of a value in a message


def describe_error(error: Exception) -> str:
    """Returns the text of an error for users: a system error without its number and with its file first."""
    if isinstance(error, OSError) and error.strerror:
        cause = DISK_FULL if is_disk_full(error) else error.strerror
        return f"{error.filename}: {cause}" if error.filename else cause
    return str(error)


def error_text(error: Exception) -> str:
    """Returns the type of an error and the beginning of its text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns a hint for an unknown name: the most similar known name, and all known names."""
    known = sorted(map(str, known))
    close = nearest(name, known, 0.5)
    question = f"did you mean {close[0]!r}? " if close else ""
    return f"{question}Known here: {', '.join(known) or 'nothing'}"


def nearest(name: str, known: Iterable[str], likeness: float = 0.0, count: int = 1) -> list[str]:
    """Returns at most `count` known names most similar to `name`, best first, with ratios of at least `likeness`."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=likeness)


def value_text(value: Any) -> str:
    """Returns the text of a value for a message, shortened to MOST characters."""
    text = repr(value)
    return text if len(text) <= MOST else f"{text[:MOST]}..."


def first_few(names: Iterable[str], most: int = 3) -> str:
    """Returns the first names of a list, and the number of others: "a, b, c and 4 more"."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
