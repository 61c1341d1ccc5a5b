"""Report of a run as one HTML page: scores beside a baseline, images with answers, and curves.

This file computes the values, in percent of a chart's width and height, and report.html lays them out. The page needs
no network and no scripts.
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

LABEL_HEIGHT = 15  # height of a line's label in pixels
POINTS = 500  # maximum number of points of a line, which limits the size of the page


class Kind(NamedTuple):
    """A kind of question. Shares are in 0..1."""

    name: str
    questions: int = 0  # number of questions
    chance: float | None = None  # share of right answers by guessing
    bar: float | None = None  # share that the first run should reach


class Run(NamedTuple):
    """Results of one training run. The first run of a report is its subject."""

    name: str
    records: Sequence[Mapping[str, Any]] = ()  # result of `mllm_jax.train.monitor.metrics.read_metrics`
    exact_match: Mapping[str, float] = {}  # kind -> final share of right answers
    marks: Sequence[tuple[int, str]] = ()  # (step, label of an event)


class Answer(NamedTuple):
    """A held-out question with the true answer and the model's answer."""

    kind: str
    question: str
    truth: str  # true answer
    answer: str  # answer of the model
    image: Any = None  # PIL image, video u8[t h w 3], or None


class Line(NamedTuple):
    """A line of a chart. Points with a value that is not finite interrupt it."""

    name: str
    points: Sequence[tuple[float, float]]
    tone: int = 0  # index of the page's colors
    end: str = ""  # label at the end of the line


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
    """Writes a self-contained page and returns its path. Sections without content are left out.

    Args:
      path: HTML file in an existing folder, written atomically.
      runs: the subject of the page, then up to three runs that it is compared with.
      title: title of the page.
      lead: first paragraph.
      kinds: rows of the table of scores. Empty: the kinds of the first run's scores.
      answers: images with questions and answers.
      right: function of (answer, truth) that returns whether the answer is right.
      parts: number of parameters by part of the model.
      facts: summary values by name, at the top.
      config: configuration as text.
    Raises:
      ValueError: `runs` is empty.
    """
    if not runs:
        raise ValueError("runs=(): a report needs at least one run. Pass the run that it describes.")
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
    """Computes the layout of a line chart of any width.

    Args:
      title: title of the chart.
      lines: lines of the chart.
      height: height of the plot in pixels.
      low, high: range of y that the axis includes at least. None: the range of the lines.
      log: whether the y axis is logarithmic.
      text: function that formats labels of the y axis.
      marks: (x, text) of vertical lines.
      rules: (y, text) of horizontal lines.
    Returns:
      Values for report.html, with positions in percent from the left and the top. None: no line has a point.
    """
    is_valid = lambda y: math.isfinite(y) and (y > 0 or not log)
    lines = [line._replace(points=[(x, y if is_valid(y) else None) for x, y in line.points]) for line in lines]
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    if not lines:
        return None
    values = [y for line in lines for _, y in line.points if y is not None] + [y for y in (low, high) if y is not None]
    low, high = min(values), max(values)
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
    _separate_labels(drawn, 100 * LABEL_HEIGHT / height)
    return {
        "title": title,
        "height": height,
        "lines": drawn,
        "x_ticks": [(to_x(x), short(x)) for x in ticks(0, right, 4)],
        "y_ticks": [(to_y(y), text(y)) for y in (log_ticks if log else ticks)(low, high)],
        "marks": [(to_x(x), label) for x, label in marks if 0 <= x <= right],
        "rules": [(to_y(y), label) for y, label in rules if low <= y <= high],
        "wide": max(len(line.end) for line in lines),  # number of characters to the right of the plot
    }


def _pieces(points):
    """Splits a line at missing values. Long lines are subsampled to about `POINTS` points, including the last one."""
    stride = -(-len(points) // POINTS)
    sampled = [point for i, point in enumerate(points) if i % stride == 0 or i == len(points) - 1 or point[1] is None]
    piece: list = []
    for x, y in [*sampled, (0, None)]:
        if y is not None:
            piece.append((x, y))
        elif piece:
            yield piece if len(piece) > 1 else piece * 2  # a single point is drawn as a dot
            piece = []


def _separate_labels(lines: list[dict[str, Any]], gap: float) -> None:
    """Sets "label", the label's position in percent from the top, so that labels at the ends of lines do not overlap.

    Args:
      lines: lines with "y", the position of the end in percent.
      gap: minimum distance of two labels in percent.
    """
    ordered = sorted(lines, key=lambda line: line["y"])
    for i, line in enumerate(ordered):
        line["label"] = line["y"] if i == 0 else max(line["y"], ordered[i - 1]["label"] + gap)
    for i, line in reversed(list(enumerate(ordered))):
        limit = 100 if i == len(ordered) - 1 else ordered[i + 1]["label"] - gap
        line["label"] = round(min(line["label"], limit), 2)


def _series(run: Run, *names: str) -> list[tuple[float, float]]:
    """Returns (step, value) of the records that have a number under these nested keys."""
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
        rules = [(y, label) for y, label in ((kind.chance, "chance"), (kind.bar, "bar")) if y is not None]
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
    """Returns the wall time by part, from the last record that has it. Parts without time are left out."""
    times = [record["seconds"] for record in run.records if isinstance(record.get("seconds"), Mapping)]
    parts = {name: seconds for name, seconds in (times[-1] if times else {}).items() if seconds > 0}
    total = sum(parts.values())
    return [
        {"name": name, "means": PARTS.get(name, ""), "spent": hours(seconds), "share": seconds / total}
        for name, seconds in parts.items()
    ]


def _loads(run: Run) -> list[dict[str, Any]]:
    """Returns the load of each layer's experts in the last evaluation, by kind of token, as a multiple of the mean."""
    heldout = [record.get("heldout") for record in run.records]
    loads = [scores["expert_load"] for scores in heldout if isinstance(scores, Mapping) and "expert_load" in scores]
    if not loads:
        return []
    counts = np.array(loads[-1], float)  # [layers with experts, 3 modalities, E]
    panels = [("all tokens", counts.sum(axis=1)), *((name, counts[:, i]) for i, name in enumerate(MODALITIES))]
    relative = lambda part: part / np.maximum(part.mean(axis=-1, keepdims=True), 1e-9)
    return [
        {"name": name, "layers": relative(part).round(2).tolist(), "most": relative(part).max()}
        for name, part in panels
        if part.any()
    ]


def frames_of(image) -> list[Image.Image]:
    """Returns an image, or the frames of a video u8[t h w 3] without repetitions of the previous frame; [] for None."""
    if image is None:
        return []
    if isinstance(image, Image.Image):
        return [image.convert("RGB")]
    frames = np.asarray(image)
    indices = [i for i in range(len(frames)) if i == 0 or (frames[i] != frames[i - 1]).any()]
    return [Image.fromarray(frames[i]) for i in indices]
