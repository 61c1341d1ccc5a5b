"""Writes a plan as an HTML page: candidates, times, memory, collectives, and the sharding of every weight.

This module computes the figures, with coordinates in percent of their width and height; page.html contains the markup.
The page needs neither network nor scripts.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mllm_jax.common import html
from mllm_jax.common.format import GIB, duration, gib, percent, size_text
from mllm_jax.common.html import log_ticks, ticks
from mllm_jax.plan.hardware.chips import Chip
from mllm_jax.plan.roofline import Network, seconds
from mllm_jax.plan.search import Candidate, Found, mesh_text
from mllm_jax.plan.sharded_weight import STACKED, VOCABULARY, ShardedWeight
from mllm_jax.sharding.mesh import MESH_AXES

TALL, SLOW = 1.35, 4.0  # limits of the plot: multiples of a device's memory and of the shortest step
COLUMNS, ROWS = 16, 8  # maximum size of a weight's grid
X_LABEL, Y_LABEL = 14.0, 6.0  # size of a tick label on a phone, in percent of the plot


class Chosen(NamedTuple):
    """Candidate that the page describes in detail."""

    candidate: Candidate
    laid: Sequence[ShardedWeight]  # weights on the candidate's mesh
    network: Network


def write_page(path: str | os.PathLike, title: str, lead: str, chosen: Chosen, found: Found, chip: Chip) -> Path:
    """Writes a self-contained page atomically. Returns its path.

    Args:
      path: path of the HTML file. Its folder must exist.
      lead: summary in one sentence.
      found: all candidates, best first.
    """
    best = chosen.candidate
    return html.write_page(
        path,
        "plan/page.html",
        {"gib": gib, "duration": duration, "percent": percent, "mesh": mesh_text, "size": size_text},
        title=title,
        lead=lead,
        best=best,
        shown=found.candidates[:12],
        impossible=found.impossible.most_common(6),
        possible=len(found.candidates),
        plot=_plot(found.candidates, best, chip) if len(found.candidates) > 1 else None,
        longest=max(candidate.time.seconds for candidate in found.candidates[:12]),
        memory=_memory(best),
        moves=_moves(best, chosen.network),
        weights=_weights(chosen.laid),
        axes=[(axis, best.planned.mesh[axis]) for axis in MESH_AXES if best.planned.mesh.get(axis, 1) > 1],
        chip=chip,
        columns=COLUMNS,
        rows=ROWS,
    )


def _plot(candidates: Sequence[Candidate], best: Candidate, chip: Chip) -> dict[str, Any]:
    """Returns the plot of peak memory over step time, both logarithmic, without candidates beyond `TALL` and `SLOW`.

    The best candidate is always shown.
    """
    tall = TALL * max(chip.memory, _peak(best))
    small = [candidate for candidate in candidates if _peak(candidate) <= tall]
    slow = SLOW * min(map(_seconds, small))
    shown = [candidate for candidate in small if _seconds(candidate) <= slow or candidate is best]
    times, peaks = ([value(candidate) for candidate in shown] for value in (_seconds, _peak))
    left, right = min(times) / 1.06, max(times) * 1.06
    bottom, top = min(*peaks, chip.memory) / 1.15, max(*peaks, chip.memory) * 1.1
    x = lambda value: round(100 * math.log(value / left) / math.log(right / left), 2)
    y = lambda value: round(100 - 100 * math.log(value / bottom) / math.log(top / bottom), 2)
    policies = sorted({candidate.choice.remat for candidate in shown})
    points = [
        dict(
            x=x(_seconds(candidate)),
            y=y(_peak(candidate)),
            tone=policies.index(candidate.choice.remat),
            compiled=candidate.compiled,
            label=f"{mesh_text(candidate.choice.mesh)}, remat {candidate.choice.remat}: "
            f"{duration(_seconds(candidate))}, {gib(_peak(candidate))}",
        )
        for candidate in sorted(shown, key=lambda candidate: candidate.compiled)
    ]
    front = [(x(a), y(b)) for a, b in _frontier(list(zip(times, peaks)))]
    steps = [(before, (after[0], before[1]), after) for before, after in zip(front, front[1:])]
    return dict(
        points=points,
        front=[line for first, corner, last in steps for line in ((first, corner), (corner, last))],
        limit=y(chip.memory),
        x_ticks=_labels(x, _few_ticks(left, right), _seconds(best), duration, X_LABEL),
        y_ticks=_labels(lambda n: y(n * GIB), _few_ticks(bottom / GIB, top / GIB), _peak(best) / GIB, _gibs, Y_LABEL),
        policies=policies,
        hidden=len(candidates) - len(shown),
    )


def _labels(
    place: Callable[[float], float], values: list[float], best: float, text: Callable[[float], str], room: float
) -> list[tuple[float, str, bool]]:
    """Returns (place in percent, text, is best) of the ticks: the best candidate's, and round ones `room` away."""
    round_ones = [(place(value), text(value), False) for value in values if abs(place(value) - place(best)) > room]
    return [*round_ones, (place(best), text(best), True)]


def _gibs(value: float) -> str:
    return f"{value:.3g}"


def _few_ticks(low: float, high: float) -> list[float]:
    return log_ticks(low, high) if high / low > 8 else ticks(low, high, 8)


def _seconds(candidate: Candidate) -> float:
    return candidate.time.seconds


def _peak(candidate: Candidate) -> float:
    return candidate.planned.peak


def _frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the Pareto frontier: the points that no other point beats in both coordinates, from left to right."""
    frontier: list[tuple[float, float]] = []
    for point in sorted(points):
        if not frontier or point[1] < frontier[-1][1]:
            frontier.append(point)
    return frontier


def _memory(best: Candidate) -> list[dict[str, Any]]:
    """Returns the parts of a device's memory, as shares of the larger of its memory and the planned peak."""
    planned = best.planned
    parts = [("weights, moments and batch", planned.arguments)]
    if best.compiled:
        parts.append(("temporary arrays", planned.peak - planned.arguments))
    else:
        parts += planned.largest
    total = max(best.memory, planned.peak)
    return [dict(name=name, bytes=size, share=size / total) for name, size in parts if size > 0]


def _moves(best: Candidate, network: Network) -> list[dict[str, Any]]:
    """Returns the collectives, slowest first."""
    rows = [
        dict(kind=move.kind, axes=" × ".join(move.axes), runs=move.runs, bytes=move.bytes, time=seconds(move, network))
        for move in best.planned.collectives
    ]
    return sorted((row for row in rows if row["time"]), key=lambda row: -row["time"])[:10]


def _weights(laid: Sequence[ShardedWeight]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Returns the drawings of the matrices, embeddings and heads by part of the model, largest first."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for sharded in sorted(laid, key=lambda one: (MODEL.index(one.weight.part), -math.prod(one.weight.shape))):
        if sharded.weight.is_matrix or sharded.weight.path.endswith("embed") or sharded.weight.path in VOCABULARY:
            parts.setdefault(sharded.weight.part, []).append(_weight(sharded))
    return list(parts.items())


MODEL = ("encoder", "connector", "decoder")


def _weight(one: ShardedWeight) -> dict[str, Any]:
    weight = one.weight
    dimensions = [
        dict(
            name=name or "",
            size=whole,
            axes=[dict(name=axis, gathered=axis in one.gathered) for axis in axes],
            ways=whole // own,
        )
        for name, whole, own, axes in zip(weight.names, weight.shape, one.sizes, one.axes)
    ]
    # Draw the two dimensions with the most shards, or else the largest, in their order.
    inner = [n for n, name in enumerate(weight.names) if name not in STACKED]
    drawn = sorted(sorted(inner, key=lambda n: (-dimensions[n]["ways"], -weight.shape[n]))[:2])
    down, across = (dimensions[n] for n in drawn)
    size = 4 * math.prod(weight.shape)
    return dict(
        path=weight.path.split("/", 1)[1].removesuffix("/w"),
        dimensions=dimensions,
        down=_grid(down, ROWS),
        across=_grid(across, COLUMNS),
        bytes=size,
        own=4 * one.values,
        used=math.prod(one.used) // weight.repeats,
        parts=size // (4 * one.values),
    )


def _grid(dimension: dict[str, Any], most: int) -> dict[str, Any]:
    """Returns the lines that divide a dimension into at most `most` parts, and one device's share in percent."""
    ways = dimension["ways"]
    drawn = min(ways, most)
    axis = dimension["axes"][0]["name"] if dimension["axes"] else ""
    return dict(axis=axis, lines=[round(100 * n / drawn, 2) for n in range(1, drawn)], share=round(100 / ways, 3))
