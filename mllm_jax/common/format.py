"""Formats numbers for messages, tables and charts: fractions, counts, bytes, seconds."""

import math

GIB = 2**30


def percent(share: float | None) -> str:
    """Returns a fraction in percent: 0.975 -> "97.5 %". None, NaN and infinity: a dash."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f}".removesuffix(".0") + " %"


def short(value: float) -> str:
    """Returns a number in a few characters: 0.25, 1,200, 35k, 1.2M."""
    for limit, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit * (1 - 5e-4):
            return f"{float(f'{value / unit:.3g}'):g}{letter}"
    return f"{float(f'{value:.4g}'):,g}"


def with_prefix(number: float) -> str:
    """Returns a number with three digits and a unit prefix: "1.23k", to be followed by "B" or "FLOP"."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 1000 or prefix == "P":
            return f"{number:.3g}{prefix}"
        number /= 1000


def gib(size: float) -> str:
    """Returns bytes in GiB: "0.42 GiB", "12.3 GiB"."""
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def size_text(size: float) -> str:
    """Returns bytes in a suitable unit: 512 B, 3.1 MiB, 1.20 GiB."""
    for limit, unit in ((2**10, "B"), (2**20, "KiB"), (2**30, "MiB")):
        if size < limit:
            return f"{size / (limit >> 10):.3g} {unit}"
    return gib(size)


def duration(value: float) -> str:
    """Returns seconds as "1.24 s" or "85 ms"."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def hours(seconds: float) -> str:
    """Returns seconds as hours, minutes and seconds: 3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
