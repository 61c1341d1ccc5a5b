"""A run as one HTML page: scores with a baseline, images with answers, curves. It needs no network and no script.

This file computes the values (in percent of a chart's width and height); report.html lays them out.
"""

import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mllm_jax.common.format import hours, percent, short
from mllm_jax.common.html import log_ticks, ticks, write_page
from mllm_jax.train.monitor.goodput import PARTS
from mllm_jax.types import MODALITIES

LABEL_HEIGHT = 15  # pixels that the label of a line needs
POINTS = 500  # of a line at most; a page of a long run stays small


class Kind(NamedTuple):
    """One kind of question. Shares are in 0..1."""

    name: str
    questions: int = 0
    chance: float | None = None  # of a guess
    bar: float | None = None  # to be reached by the first run


class Run(NamedTuple):
    """Results of one training run. The first run of a report is its subject."""

    name: str
    records: Sequence[Mapping[str, Any]] = ()  # of `mllm_jax.train.monitor.metrics.read_metrics`
    exact_match: Mapping[str, float] = {}  # kind -> share of right answers in the end
    marks: Sequence[tuple[int, str]] = ()  # (step, what happened then)


class Answer(NamedTuple):
    """A question of the held-out set and what the model said."""

    kind: str
    question: str
    truth: str
    answer: str
    image: Any = None  # a PIL image, a video u8[t h w 3], or None


class Line(NamedTuple):
    """A line of a chart. Points with a value that is not finite break it."""

    name: str
    points: Sequence[tuple[float, float]]
    tone: int = 0  # which of the page's colors
    end: str = ""  # label at its end


def write_report(
    path: str | os.PathLike,
    runs: Sequence[Run],
    *,
    title: str,
    lead: str = "",
    kinds: Sequence[Kind] = (),
    answers: Sequence[Answer] = (),
    right: Callable[[str, str], bool] = operator.eq,
    parts: Mapping[str, int] | None = None,
    facts: Mapping[str, str] | None = None,
    config: str = "",
) -> Path:
    """Writes a self-contained page and returns its path.

    Args:
      path: HTML file in an existing folder, written atomically.
      runs: the subject of the page, then the runs that it is compared with (up to three).
      kinds: rows of the table of scores. Empty: the kinds of the first run's scores.
      answers: images with questions and answers. right: returns whether an answer agrees with the truth.
      parts: part of the model -> number of parameters.
      facts: summary numbers, name -> text, at the top.
      config: the configuration as text.

    Anything may be missing: a section without content is left out. Raises ValueError if there is no run.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    kinds = kinds or [Kind(name) for name in runs[0].exact_match]
    runs = [run._replace(exact_match={k: v for k, v in run.exact_match.items() if math.isfinite(v)}) for run in runs]
    return write_page(
        path,
        "evaluate/report.html",
        title=title,
        lead=lead,
        runs=runs,
        kinds=kinds,
        facts=facts or {},
        loss=_loss(runs),
        accuracy=_accuracy(runs, kinds),
        speed=_speed(runs[0]),
        answers=[(item, right(item.answer, item.truth), frames_of(item.image)) for item in answers],
        parts=_shares(parts or {}),
        loads=_loads(runs[0]),
        hours=_time(runs[0]),
        config=config,
    )


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    height: int = 180,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    text: Callable[[float], str] = short,
    marks: Iterable[tuple[int, str]] = (),
    rules: Iterable[tuple[float, str]] = (),
) -> dict[str, Any] | None:
    """Places lines in a chart whose width is the reader's. None where no line has a point.

    Args:
      height: of the plot, in pixels.
      low, high: range of y that is shown at least; a logarithmic axis needs no low.
      text: writes the labels of the y axis.
      marks: (x, text) of vertical lines.
      rules: (y, text) of horizontal lines.

    Returns positions in percent, from the left and from the top.
    """
    usable = lambda y: math.isfinite(y) and (y > 0 or not log)
    lines = [line._replace(points=[(x, y if usable(y) else None) for x, y in line.points]) for line in lines]
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    if not lines:
        return None
    seen = [y for line in lines for _, y in line.points if y is not None] + [y for y in (low, high) if y is not None]
    low, high = min(seen), max(seen)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
    right = max([x for line in lines for x, _ in line.points] + [1])
    scale = math.log if log else float
    to_x = lambda x: round(100 * x / right, 2)
    to_y = lambda y: round(100 * (1 - (scale(y) - scale(low)) / (scale(high) - scale(low))), 2)

    drawn = []
    for line in lines:
        last_x, last_y = [(x, y) for x, y in line.points if y is not None][-1]
        pieces = [" ".join(f"{to_x(x)},{to_y(y)}" for x, y in piece) for piece in _pieces(line.points)]
        ends = {"x": to_x(last_x), "y": to_y(last_y), "end": line.end}
        drawn.append({"name": line.name, "tone": line.tone, "pieces": pieces, **ends})
    _part(drawn, 100 * LABEL_HEIGHT / height)
    return {
        "title": title,
        "height": height,
        "lines": drawn,
        "x_ticks": [(to_x(x), short(x)) for x in ticks(0, right, 4)],
        "y_ticks": [(to_y(y), text(y)) for y in (log_ticks if log else ticks)(low, high)],
        "marks": [(to_x(x), note) for x, note in marks if 0 <= x <= right],
        "rules": [(to_y(y), note) for y, note in rules if low <= y <= high],
        "wide": max(len(line.end) for line in lines),  # characters to the right of the plot
    }


def _pieces(points):
    """Splits a line where a value is missing; long lines are thinned out, their ends kept."""
    stride = -(-len(points) // POINTS)
    kept = [point for i, point in enumerate(points) if i % stride == 0 or i == len(points) - 1 or point[1] is None]
    piece: list = []
    for x, y in [*kept, (0, None)]:
        if y is not None:
            piece.append((x, y))
        elif piece:
            yield piece if len(piece) > 1 else piece * 2  # a line of no length is drawn as a dot
            piece = []


def _part(lines: list[dict[str, Any]], gap: float) -> None:
    """Separates the labels at the ends of lines, so that none covers another: sets "label", percent from the top."""
    ordered = sorted(lines, key=lambda line: line["y"])
    for i, line in enumerate(ordered):
        line["label"] = line["y"] if i == 0 else max(line["y"], ordered[i - 1]["label"] + gap)
    for i, line in reversed(list(enumerate(ordered))):
        limit = 100 if i == len(ordered) - 1 else ordered[i + 1]["label"] - gap
        line["label"] = round(min(line["label"], limit), 2)


def _series(run: Run, *names: str) -> list[tuple[float, float]]:
    """(step, value) of the records that hold a value under these nested names."""
    points = []
    for record in run.records:
        value: Any = record
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            points.append((record["step"], value))
    return points


def _loss(runs: Sequence[Run]):
    lines = [Line(run.name, _series(run, "mean_loss"), tone, run.name) for tone, run in enumerate(runs)]
    return chart("Training loss, nats per answer token", lines, height=260, log=True, marks=runs[0].marks)


def _accuracy(runs: Sequence[Run], kinds: Sequence[Kind]):
    charts = []
    for kind in kinds:
        lines = []
        for tone, run in enumerate(runs):
            points = _series(run, "heldout", "exact_match", kind.name)
            lines.append(Line(run.name, points, tone, percent(points[-1][1]) if points else ""))
        rules = [(y, note) for y, note in ((kind.chance, "chance"), (kind.bar, "bar")) if y is not None]
        charts.append(chart(kind.name, lines, height=140, low=0.0, high=1.0, text=percent, rules=rules))
    return [drawn for drawn in charts if drawn]


def _speed(run: Run):
    def last(points, text):
        return text(points[-1][1]) if points else ""

    charts = []
    for title in ("Tokens per second", "Patches per second"):
        points = _series(run, title.lower().replace(" ", "_"))
        charts.append(chart(title, [Line(title, points, 0, last(points, short))], height=140, low=0.0))
    fills = [("tokens", _series(run, "fill_tokens")), ("patches", _series(run, "fill_patches"))]
    lines = [Line(name, points, i + 2, f"{name} {last(points, percent)}") for i, (name, points) in enumerate(fills)]
    charts.append(chart("Share that is not padding", lines, height=140, low=0.0, high=1.0, text=percent))
    return [drawn for drawn in charts if drawn]


def _shares(parts: Mapping[str, int]) -> list[dict[str, Any]]:
    total = sum(parts.values()) or 1
    return [{"name": name, "count": count, "share": count / total} for name, count in parts.items()]


def _time(run: Run) -> list[dict[str, Any]]:
    """Wall time by part, up to the last record that has it; parts without time are left out."""
    told = [record["seconds"] for record in run.records if isinstance(record.get("seconds"), Mapping)]
    spent = {name: seconds for name, seconds in (told[-1] if told else {}).items() if seconds > 0}
    total = sum(spent.values())
    return [
        {"name": name, "means": PARTS.get(name, ""), "spent": hours(seconds), "share": seconds / total}
        for name, seconds in spent.items()
    ]


def _loads(run: Run) -> list[dict[str, Any]]:
    """Load of each layer's experts in the last evaluation, for every kind of token: 1 is the mean."""
    found = [record.get("heldout") for record in run.records]
    loads = [known["expert_load"] for known in found if isinstance(known, Mapping) and "expert_load" in known]
    if not loads:
        return []
    counts = np.array(loads[-1], float)  # [Lm 3 E]
    panels = [("all tokens", counts.sum(axis=1)), *((name, counts[:, i]) for i, name in enumerate(MODALITIES))]
    relative = lambda part: part / np.maximum(part.mean(axis=-1, keepdims=True), 1e-9)
    return [
        {"name": name, "layers": relative(part).round(2).tolist(), "most": relative(part).max()}
        for name, part in panels
        if part.any()
    ]


def frames_of(image) -> list[Image.Image]:
    """An image, or the frames of a video without those that repeat the one before."""
    if image is None:
        return []
    if isinstance(image, Image.Image):
        return [image.convert("RGB")]
    frames = np.asarray(image)
    new = [i for i in range(len(frames)) if i == 0 or (frames[i] != frames[i - 1]).any()]
    return [Image.fromarray(frames[i]) for i in new]
