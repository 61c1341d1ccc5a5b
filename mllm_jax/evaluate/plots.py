"""Images, curves and tables as self-contained HTML, for notebooks."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mllm_jax.common.format import short
from mllm_jax.common.html import png, ticks
from mllm_jax.evaluate.report import frames_of

TONES = ("#2368c4", "#d2691e", "#11906f", "#9a52c8", "#b8932a", "#c0396b")
WARM = (230, 40, 30)  # of what is attended to
WIDTH, HEIGHT = 620, 230  # of a plot, pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 34, 36


def images(cards: Iterable[tuple[Any, str]], height: int = 120) -> str:
    """Images side by side, each with a text below.

    Args:
      cards: (a PIL image, or the frames u8[t h w 3] of a video, of which those that repeat are left out; text).
      height: of each, in pixels.
    """
    figures = []
    for image, text in cards:
        shown = np.hstack([np.asarray(frame) for frame in frames_of(image)])
        tag = f'<img src="{png(Image.fromarray(shown))}" style="height:{height}px;image-rendering:pixelated">'
        wide = max(150, round(height * shown.shape[1] / shown.shape[0]))
        style = (
            f"display:inline-block;vertical-align:top;margin:6px 10px 6px 0;max-width:{wide}px;overflow-wrap:anywhere"
        )
        figures.append(f'<div style="{style}">{tag}<br>{html.escape(text)}</div>')
    return "".join(figures)


def overlay(image: Image.Image, share: Any, side: int = 320) -> Image.Image:
    """The image under a veil that is the redder, the larger a share is, and gray where it is least.

    Args:
      image: as it was shown to the model; it is enlarged, where its longer side is below `side` pixels.
      share: f[h w], of a grid that divides the image.
    """
    scale = max(1, round(side / max(image.size)))
    size = (image.width * scale, image.height * scale)
    plain = np.asarray(image.convert("RGB").resize(size, Image.NEAREST), np.float32)
    share = np.asarray(share, np.float32)
    most = (share - share.min()) / max(float(np.ptp(share)), 1e-9)
    strength = np.asarray(Image.fromarray(most).resize(size, Image.NEAREST))[..., None]
    gray = plain.mean(axis=-1, keepdims=True) * 0.5 + 100
    veiled = strength * (0.45 * plain + 0.55 * np.array(WARM)) + (1 - strength) * (0.35 * plain + 0.65 * gray)
    return Image.fromarray(veiled.clip(0, 255).astype(np.uint8))


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], across: str = "step") -> str:
    """A plot of lines by name, each of (x, y) points in order; the y axis begins at 0.

    Args:
      across: what x counts.
    """
    most_x = max((x for line in lines.values() for x, _ in line), default=1) or 1
    most_y = max((y for line in lines.values() for _, y in line), default=1) * 1.05 or 1
    to_x = lambda x: round(LEFT + (WIDTH - LEFT - RIGHT) * x / most_x, 1)
    to_y = lambda y: round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / most_y, 1)
    text = lambda x, y, words, more="": f'<text x="{x}" y="{y}" fill="currentColor" {more}>{html.escape(words)}</text>'
    parts = [text(LEFT, 14, title, 'font-weight="bold"')]
    for y in ticks(0, most_y, 4):
        parts.append(f'<path d="M{LEFT} {to_y(y)}H{WIDTH - RIGHT}" stroke="#8886" fill="none"/>')
        parts.append(text(LEFT - 6, to_y(y) + 4, short(y), 'text-anchor="end"'))
    for x in ticks(0, most_x, 5):
        parts.append(text(to_x(x), HEIGHT - BOTTOM + 16, short(x), 'text-anchor="middle"'))
    parts.append(text(WIDTH - RIGHT, HEIGHT - 4, across, 'text-anchor="end"'))
    key = WIDTH - RIGHT
    for (name, line), tone in reversed(list(zip(lines.items(), TONES * len(lines)))):
        points = " ".join(f"{to_x(x)},{to_y(y)}" for x, y in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{tone}" stroke-width="2"/>')
        if len(lines) > 1:
            parts.append(f'<text x="{key}" y="14" fill="{tone}" text-anchor="end">{html.escape(name)}</text>')
            key -= 7 * len(name) + 16
    style = f"width:{WIDTH}px;max-width:100%;font:12px sans-serif"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" style="{style}">{"".join(parts)}</svg>'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys, which head the columns; numbers are written short, and right-aligned."""
    number = lambda value: isinstance(value, int | float | np.number) and not isinstance(value, bool)

    def cell(value: Any, kind: str = "td", right: bool = False) -> str:
        words = short(float(value)) if number(value) else str(value)
        style = f"text-align:{'right' if right else 'left'};padding:3px 12px"
        return f'<{kind} style="{style}">{html.escape(words)}</{kind}>'

    first = rows[0]
    head = "".join(cell(name, "th", number(value)) for name, value in first.items())
    body = "".join(
        f"<tr>{''.join(cell(value, right=number(first[name])) for name, value in row.items())}</tr>" for row in rows
    )
    return f'<table style="border-collapse:collapse"><tr>{head}</tr>{body}</table>'
