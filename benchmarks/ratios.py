"""Ratios of times that were taken in turn, pair by pair, so that a load of the machine meets both."""

import statistics
from collections.abc import Sequence


def ratio_text(first: Sequence[float], second: Sequence[float]) -> str:
    """The median of first / second of all pairs, with the least and the largest: "1.85 (1.79 to 1.92)"."""
    ratios = sorted(a / b for a, b in zip(first, second))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
