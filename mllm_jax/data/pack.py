"""Packs several conversations into rows of a static shape: T tokens and R x P patches."""

from typing import NamedTuple


class Budget(NamedTuple):
    """The static shape of a batch row. `rows == 0` means a batch without pictures."""

    tokens: int  # T
    rows: int = 0  # R patch rows
    patches: int = 0  # P patches in a patch row: no picture is larger


class TooLarge(ValueError):
    """A conversation that does not fit an empty batch row."""
