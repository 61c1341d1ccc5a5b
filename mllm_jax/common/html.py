"""Self-contained HTML pages, without network and scripts. Their templates extend page.html."""

import base64
import io
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from mllm_jax.common.files import write_atomically
from mllm_jax.common.format import percent, short


def write_page(
    path: str | os.PathLike, template: str, filters: Mapping[str, Callable] | None = None, **values: Any
) -> Path:
    """Writes a page atomically and returns its path.

    Args:
      path: HTML file in an existing folder.
      template: path of a template within the package, such as "evaluate/report.html". It extends common/page.html.
      filters: filters of the template, in addition to `percent`, `short` and `png`.
      values: values of the template, in addition to `title` and `lead` (one sentence, or empty) of page.html.
    """
    loader = FileSystemLoader(Path(__file__).parents[1])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": percent, "short": short, "png": png} | dict(filters or {})
    page, path = environment.get_template(template).render(**values), Path(path)
    write_atomically(path, page)
    return path.resolve()


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers within [low, high], multiples of 1, 2 or 5 times a power of ten.

    Returns [low] if the bounds are equal.
    """
    if not low < high:
        return [low]
    step = _round_up((high - low) / count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last < first:  # a step of over half the range may miss it
        return ticks(low, high, count + 1)
    return [float(f"{i * step:.14g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns the numbers 1, 2 and 5 times powers of ten within [low, high]; `ticks` if there are fewer than two."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [float(f"{m}e{d}") for d in decades for m in (1, 2, 5) if low * 0.999 <= float(f"{m}e{d}") <= high * 1.001]
    while len(marks) > 7:  # over many decades, keeps every second mark
        marks = marks[::2]
    return marks if len(marks) > 1 else ticks(low, high, 4)


def _round_up(value: float) -> float:
    """Returns the smallest of 1, 2 and 5 times powers of ten that is at least `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-9))


def png(image: Image.Image) -> str:
    """Returns an image as a data URI of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
