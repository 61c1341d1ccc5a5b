"""Batches as one HTML page: histograms, conversations with their images, and packed rows as colored bars.

This file computes the values, in percent of a drawing's width and height; inspection.html lays them out.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_jax.common.format import short
from mllm_jax.common.html import log_ticks, png, ticks, write_page
from mllm_jax.data.tools.inspection import KINDS, Inspection, Row, Stretch

BINS = 30  # of a histogram at most
WIDE = 30  # times the smallest value is the largest in a histogram whose bins grow with their values
BUBBLES = 60  # sizes of images that are drawn, the most frequent ones
SIDE, TINY = 240, 160  # pixels of an image on the page at most, and up to which small ones are enlarged
LETTERS, IMAGES = 1500, 12  # of a stretch of text, and of a conversation, that are shown


def write_inspection(
    path: str | os.PathLike,
    inspection: Inspection,
    *,
    title: str,
    lead: str,
    facts: Mapping[str, str],
    sources: Sequence[Mapping[str, Any]] = (),
    left_out: Mapping[str, int] | None = None,
    named: Sequence[str] = (),
    noted: Mapping[str, int] | None = None,
) -> Path:
    """Writes a self-contained page atomically and returns its path.

    Args:
      path: HTML file in an existing folder.
      facts: summary numbers, name -> text.
      sources: of a mixture: `name`, `records`, `weight` and `drawn` of each source, the last two as fractions.
      left_out: number of unusable records by reason; named: errors of some of them.
      noted: number of records that were read in part, by the part that was left out.
    """
    found = inspection
    histograms = [
        histogram("Tokens of a conversation", found.tokens),
        histogram("Visual tokens of a conversation", found.visual),
        histogram("Learned tokens of a conversation", found.learned),
        histogram("Images of a conversation, frames of videos included", found.images),
    ]
    return write_page(
        path,
        "data/tools/inspection.html",
        {"small": small},
        title=title,
        lead=lead,
        facts=facts,
        rows=[drawn(row) for row in found.rows],
        keys=[(KINDS.index(kind), kind) for kind in ("text", "learned text", "image", "video", "padding")],
        histograms=[drawing for drawing in histograms if drawing],
        sizes=bubbles(found.sizes),
        samples=found.samples,
        letters=LETTERS,
        images=IMAGES,
        kinds=[(kind or "other", count, count / found.kinds.total()) for kind, count in found.kinds.most_common()],
        sources=sources,
        left_out=left_out or {},
        named=named,
        noted=noted or {},
    )


def small(image: Image.Image) -> dict[str, Any]:
    """An image for the page: its data, and the width at which it is shown; tiny ones are enlarged."""
    width, side = image.width, max(image.size)
    if side > SIDE:
        image = image.copy()
        image.thumbnail((SIDE, SIDE))
        width = image.width
    return {"data": png(image), "width": width * max(1, TINY // side)}


def histogram(title: str, values: Sequence[int]) -> dict[str, Any] | None:
    """Bars (left, width, height, label) in percent, of those values that are not 0. None where all are."""
    all_values = np.asarray(values)
    known = all_values[all_values > 0]
    if not len(known):
        return None
    low, high = int(known.min()), int(known.max()) + 1
    log = high > WIDE * low and high - low > BINS
    if log:
        edges = np.unique(np.geomspace(low, high, BINS + 1).round().astype(int))
    else:
        edges = np.unique(np.linspace(low, high, min(BINS, high - low) + 1).round().astype(int))
    counts, _ = np.histogram(known, edges)
    scale = np.log if log else np.asarray
    to_x = lambda x: 100 * (scale(x) - scale(low)) / (scale(high) - scale(low))
    most = int(counts.max())
    single = high - low <= BINS  # a bin is one value, with its label in the middle
    bars = [
        {
            "left": round(float(to_x(a)), 3),
            "width": round(float(to_x(b) - to_x(a)), 3),
            "height": round(100 * count / most, 2),
            "label": f"{a if b - a == 1 else f'{a} to {b - 1}'}: {count:,}",
        }
        for a, b, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist())
        if count
    ]
    marks = log_ticks(low, high - 1) if log else [x for x in ticks(low, high - 1, 5) if x == int(x)]
    return {
        "title": title,
        "bars": bars,
        "x_ticks": [(round(float(to_x(x + single / 2)), 2), short(x)) for x in marks],
        "y_ticks": [(round(100 - 100 * y / most, 2), short(y)) for y in ticks(0, most, 4) if y == int(y)],
        "note": f"median {short(float(np.median(known)))}, mean {short(float(known.mean()))}, most {short(high - 1)}",
        "none": len(all_values) - len(known),
        "log": log,
    }


def bubbles(sizes: Mapping[tuple[int, int], int]) -> dict[str, Any] | None:
    """Images by width and height: a circle for each size, of an area in proportion to their number."""
    if not sizes:
        return None
    shown = sorted(sizes.items(), key=lambda item: -item[1])[:BUBBLES]
    side = max(max(size) for size, _ in shown) * 1.12
    most = shown[0][1]
    return {
        "circles": [
            {
                "x": round(100 * width / side, 2),
                "y": round(100 - 100 * height / side, 2),
                "diameter": round(max(5, 30 * (count / most) ** 0.5), 1),
                "label": f"{width} x {height}: {count:,}",
            }
            for (width, height), count in shown
        ],
        "ticks": [(round(100 * x / side, 2), short(x)) for x in ticks(0, side, 4)],
        "most": [(f"{width} × {height}", count) for (width, height), count in shown[:5]],
        "hidden": len(sizes) - len(shown),
    }


def drawn(row: Row) -> dict[str, Any]:
    """A row as stretches (kind, first, count) in percent, and where its conversations begin."""
    length = sum(stretch.count for stretch in row.tokens)
    conversations: dict[int, list[int]] = {}
    for stretch in row.tokens:
        if stretch.number:
            extent = conversations.setdefault(stretch.number, [stretch.first, 0])
            extent[1] += stretch.count
    return {
        "tokens": _stretches(row.tokens, length, "conversation"),
        "conversations": [
            {"first": _share(first, length), "count": _share(count, length), "label": f"{count} tokens"}
            for first, count in conversations.values()
        ],
        "patches": [_stretches(part, sum(stretch.count for stretch in part), "image") for part in row.patches],
    }


def _stretches(stretches: Sequence[Stretch], length: int, of: str) -> list[dict[str, Any]]:
    unit = "tokens" if of == "conversation" else "patches"
    return [
        {
            "kind": KINDS.index(stretch.kind),
            "first": _share(stretch.first, length),
            "count": _share(stretch.count, length),
            "label": f"{stretch.kind}, {stretch.count} {unit}" + f", {of} {stretch.number}" * bool(stretch.number),
        }
        for stretch in stretches
        if stretch.number
    ]


def _share(value: int, whole: int) -> float:
    return round(100 * value / whole, 3)
