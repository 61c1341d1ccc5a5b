"""Texts of errors: the cause of a system's error, the nearest right word for a wrong one, the beginning of a value."""

import difflib
from collections.abc import Iterable
from typing import Any

from mllm_jax.common.files import DISK_FULL, is_disk_full

MOST = 80  # characters of a value


def describe_error(error: Exception) -> str:
    """Text of an error for users: without the number of a system error, and with its file first."""
    if isinstance(error, OSError) and error.strerror:
        why = DISK_FULL if is_disk_full(error) else error.strerror
        return f"{error.filename}: {why}" if error.filename else why
    return str(error)


def error_text(error: Exception) -> str:
    """The kind of an error and the beginning of its text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """Text for an unknown name: the nearest known name, and all of them."""
    known = sorted(map(str, known))
    close = nearest(name, known, 0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}Known here: {', '.join(known) or 'nothing'}"


def nearest(name: str, known: Iterable[str], likeness: float = 0.0, count: int = 1) -> list[str]:
    """The known names most similar to another one, best first: at most `count`, each with a ratio of at least
    `likeness`."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=likeness)


def value_text(value: Any) -> str:
    """A value in an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= MOST else f"{text[:MOST]}..."


def first_few(names: Iterable[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are: "a, b, c and 4 more"."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
