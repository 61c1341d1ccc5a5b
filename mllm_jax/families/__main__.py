"""Published models by name: their parts, their parameters, and what an image costs them.

python -m mllm_jax.families --image 1920x1080
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from mllm_jax.common.cli import Parser, run_command
from mllm_jax.common.errors import suggestion
from mllm_jax.data.pipeline.spans import NativeImage, TiledImage
from mllm_jax.data.vision.images import check_size
from mllm_jax.families import FAMILIES, spec_for
from mllm_jax.model.vlm import ModelConfig, cache_bytes_per_token, count_params
from mllm_jax.types import NEWLINE


class Tokens(NamedTuple):
    """Tokens of an image in the text: visual tokens of patches, and learned tokens that end their rows."""

    patches: int
    newlines: int


def published(family: str | None = None) -> Iterator[tuple[str, Any]]:
    """(name of a size, config) of all published models, or of one family, by the model_type of its config.json."""
    for each in dict.fromkeys(FAMILIES.values()):  # some have several model_types
        for name, config in each.sizes.items():
            if family in (None, config.family):
                yield name, config


def image_tokens(config: Any, height: int, width: int) -> Tokens | None:
    """Visual tokens of an image of height x width pixels. None: the model does not put images into text."""
    if getattr(config, "connector", None) is None:
        return None
    spec = spec_for(config)
    image = NativeImage(None, height, width) if spec.rule is None else TiledImage(None, height, width, spec.rule)
    runs = image.plan(spec, float("inf"), float("inf")).runs
    newlines = sum(int((run.order == NEWLINE).sum()) for run in runs)
    return Tokens(sum(len(run.order) for run in runs) - newlines, newlines)


def parts(config: Any) -> str:
    """The kinds of its parts: encoder, connector, decoder."""
    found = (getattr(config, name, None) for name in ("encoder", "connector", "decoder"))
    return ", ".join(_kind(part) for part in found if part is not None)


def generates(config: Any) -> bool:
    """Returns whether a model generates text."""
    return isinstance(config, ModelConfig) and config.decoder is not None


def _kind(part: Any) -> str:
    kind = type(part).__name__.removesuffix("Config")
    return f"{kind} {part.layers}x{part.width}" if hasattr(part, "width") else kind


def table(size: tuple[int, int], family: str | None = None) -> Table:
    """Table of all published models; `size` is (height, width) of an image in pixels."""
    height, width = size
    title = f"Published models, and an image of {width} x {height} pixels"
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for name in ("family", "size", "made of"):
        made.add_column(name, overflow="fold")
    for name in ("parameters", "visual\ntokens", "KV cache,\nKiB/token", "MiB of\nimage"):
        made.add_column(name, justify="right", no_wrap=True)  # a narrow terminal folds names, and cuts no number
    for name, config in published(family):
        tokens = image_tokens(config, height, width)
        cache = generates(config) and cache_bytes_per_token(config, "bfloat16")
        made.add_row(
            config.family,
            name,
            parts(config),
            f"{sum(count_params(config).values()):,}",
            "" if tokens is None else f"{tokens.patches:,}" + (f" + {tokens.newlines}" if tokens.newlines else ""),
            f"{cache / 2**10:.0f}" if cache else "",
            f"{cache * sum(tokens) / 2**20:.0f}" if cache and tokens else "",
        )
    return made


def _size(text: str) -> tuple[int, int]:
    """(height, width) of an image that can be read; for argparse."""
    if not (match := re.fullmatch(r"([1-9]\d{,8})x([1-9]\d{,8})", text, re.ASCII)):
        raise argparse.ArgumentTypeError(f"{text!r} is not an image size; write width and height, as in 1920x1080")
    width, height = int(match[1]), int(match[2])
    try:
        check_size(height, width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; no model reads it") from error
    return height, width


def _family(text: str) -> str:
    if text not in FAMILIES:
        raise argparse.ArgumentTypeError(f"there is no family {text!r}; {suggestion(text, FAMILIES)}")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = Parser("python -m mllm_jax.families", __doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--image",
        type=_size,
        default=(768, 1024),
        metavar="WIDTHxHEIGHT",
        help="size of an image in pixels (default 1024x768)",
    )
    add("--family", type=_family, help="show only this family: a model_type, such as llava_next")
    args = parser.parse_args(arguments)
    console = Console()
    with console.status("counting parameters"):
        made = table(args.image, args.family)
    Console(width=None if console.is_terminal else 160).print(made)
    return 0


if __name__ == "__main__":
    run_command(main)
