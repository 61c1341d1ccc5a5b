"""Pages of HTML that open anywhere, without network and script: page.html is the frame that they fill."""

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
      template: path below the package, such as "evaluate/report.html"; it extends common/page.html.
      filters: filters of the template beside `percent`, `short` and `png`.
      values: values of the template: `title`, and `lead` (one sentence, or empty), beside its own.
    """
    loader = FileSystemLoader(Path(__file__).parents[1])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": percent, "short": short, "png": png} | dict(filters or {})
    page, path = environment.get_template(template).render(**values), Path(path)
    write_atomically(path, page)
    return path.resolve()


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) within [low, high], about `count` of them; [low] if equal."""
    if not low < high:
        return [low]
    step = _round_up((high - low) / count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last < first:  # a step of over half the range may miss it
        return ticks(low, high, count + 1)
    return [float(f"{i * step:.14g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The numbers 1, 2, 5 times powers of ten within [low, high]; plain `ticks` where fewer than two are."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [float(f"{m}e{d}") for d in decades for m in (1, 2, 5) if low * 0.999 <= float(f"{m}e{d}") <= high * 1.001]
    while len(found) > 7:  # a run over many decades: keep every other label
        found = found[::2]
    return found if len(found) > 1 else ticks(low, high, 4)


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * (1 - 1e-9))


def png(image: Image.Image) -> str:
    """An image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
