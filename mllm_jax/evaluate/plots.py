"""Self-contained HTML of images, curves and tables for notebooks."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mllm_jax.common.format import short
from mllm_jax.common.html import png, ticks
from mllm_jax.evaluate.report import frames_of

TONES = ("#2368c4", "#d2691e", "#11906f", "#9a52c8", "#b8932a", "#c0396b")
WARM = (230, 40, 30)  # color of attended regions, RGB
WIDTH, HEIGHT = 620, 230  # size of a plot in pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 34, 36  # margins of a plot in pixels


def images(cards: Iterable[tuple[Any, str]], height: int = 120) -> str:
    """Returns HTML of images side by side, each above its text.

    Args:
      cards: pairs of an image and a text. An image is a PIL image, or the frames u8[t h w 3] of a video, of which
        repeated ones are skipped.
      height: height of each image in pixels.
    """
    figures = []
    for image, text in cards:
        pixels = np.hstack([np.asarray(frame) for frame in frames_of(image)])
        tag = f'<img src="{png(Image.fromarray(pixels))}" style="height:{height}px;image-rendering:pixelated">'
        width = max(150, round(height * pixels.shape[1] / pixels.shape[0]))
        style = (
            f"display:inline-block;vertical-align:top;margin:6px 10px 6px 0;max-width:{width}px;overflow-wrap:anywhere"
        )
        figures.append(f'<div style="{style}">{tag}<br>{html.escape(text)}</div>')
    return "".join(figures)


def overlay(image: Image.Image, share: Any, side: int = 320) -> Image.Image:
    """Returns the image with a heat map: red where `share` is largest, gray where it is smallest.

    Args:
      image: image as the model read it.
      share: f[h w] values, such as attention weights, of a grid that divides the image evenly.
      side: approximate length in pixels to which an integer factor enlarges the longer side.
    """
    scale = max(1, round(side / max(image.size)))
    size = (image.width * scale, image.height * scale)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.NEAREST), np.float32)
    share = np.asarray(share, np.float32)
    normalized = (share - share.min()) / max(float(np.ptp(share)), 1e-9)
    strength = np.asarray(Image.fromarray(normalized).resize(size, Image.NEAREST))[..., None]
    gray = pixels.mean(axis=-1, keepdims=True) * 0.5 + 100
    blended = strength * (0.45 * pixels + 0.55 * np.array(WARM)) + (1 - strength) * (0.35 * pixels + 0.65 * gray)
    return Image.fromarray(blended.clip(0, 255).astype(np.uint8))


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], across: str = "step") -> str:
    """Returns an SVG plot. Both axes start at 0.

    Args:
      title: title of the plot.
      lines: (x, y) points of each line in order, by name.
      across: label of the x axis.
    """
    max_x = max((x for line in lines.values() for x, _ in line), default=1) or 1
    max_y = max((y for line in lines.values() for _, y in line), default=1) * 1.05 or 1
    to_x = lambda x: round(LEFT + (WIDTH - LEFT - RIGHT) * x / max_x, 1)
    to_y = lambda y: round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / max_y, 1)
    text = lambda x, y, label, attr="": f'<text x="{x}" y="{y}" fill="currentColor" {attr}>{html.escape(label)}</text>'
    parts = [text(LEFT, 14, title, 'font-weight="bold"')]
    for y in ticks(0, max_y, 4):
        parts.append(f'<path d="M{LEFT} {to_y(y)}H{WIDTH - RIGHT}" stroke="#8886" fill="none"/>')
        parts.append(text(LEFT - 6, to_y(y) + 4, short(y), 'text-anchor="end"'))
    for x in ticks(0, max_x, 5):
        parts.append(text(to_x(x), HEIGHT - BOTTOM + 16, short(x), 'text-anchor="middle"'))
    parts.append(text(WIDTH - RIGHT, HEIGHT - 4, across, 'text-anchor="end"'))
    legend_x = WIDTH - RIGHT
    for (name, line), tone in reversed(list(zip(lines.items(), TONES * len(lines)))):
        points = " ".join(f"{to_x(x)},{to_y(y)}" for x, y in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{tone}" stroke-width="2"/>')
        if len(lines) > 1:
            parts.append(f'<text x="{legend_x}" y="14" fill="{tone}" text-anchor="end">{html.escape(name)}</text>')
            legend_x -= 7 * len(name) + 16
    style = f"width:{WIDTH}px;max-width:100%;font:12px sans-serif"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" style="{style}">{"".join(parts)}</svg>'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns an HTML table of rows with equal keys, its column headers. Numbers are shortened and right-aligned."""
    is_number = lambda value: isinstance(value, int | float | np.number) and not isinstance(value, bool)

    def cell(value: Any, kind: str = "td", right: bool = False) -> str:
        text = short(float(value)) if is_number(value) else str(value)
        style = f"text-align:{'right' if right else 'left'};padding:3px 12px"
        return f'<{kind} style="{style}">{html.escape(text)}</{kind}>'

    first = rows[0]
    head = "".join(cell(name, "th", is_number(value)) for name, value in first.items())
    body = "".join(
        f"<tr>{''.join(cell(value, right=is_number(first[name])) for name, value in row.items())}</tr>" for row in rows
    )
    return f'<table style="border-collapse:collapse"><tr>{head}</tr>{body}</table>'
