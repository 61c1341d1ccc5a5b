"""List published models with their parts, parameters, and the tokens and memory of an image.

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
    """Numbers of an image's tokens in the text: visual tokens of patches, and learned tokens that end their rows."""

    patches: int
    newlines: int


def published(family: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yields (size name, config) of all published models, or of one family, given by its model_type."""
    for models in dict.fromkeys(FAMILIES.values()):  # a family with several model_types is listed once
        for name, config in models.sizes.items():
            if family in (None, config.family):
                yield name, config


def image_tokens(config: Any, height: int, width: int) -> Tokens | None:
    """Returns the tokens of an image of height x width pixels. None: the model does not put images into text."""
    if getattr(config, "connector", None) is None:
        return None
    spec = spec_for(config)
    image = NativeImage(None, height, width) if spec.rule is None else TiledImage(None, height, width, spec.rule)
    runs = image.plan(spec, float("inf"), float("inf")).runs
    newlines = sum(int((run.order == NEWLINE).sum()) for run in runs)
    return Tokens(sum(len(run.order) for run in runs) - newlines, newlines)


def parts(config: Any) -> str:
    """Returns a summary of encoder, connector and decoder, such as "Vit 24x1024, MlpConnector, Decoder 32x4096"."""
    components = (getattr(config, name, None) for name in ("encoder", "connector", "decoder"))
    return ", ".join(_kind(part) for part in components if part is not None)


def generates(config: Any) -> bool:
    """Returns whether a model generates text."""
    return isinstance(config, ModelConfig) and config.decoder is not None


def _kind(part: Any) -> str:
    kind = type(part).__name__.removesuffix("Config")
    return f"{kind} {part.layers}x{part.width}" if hasattr(part, "width") else kind


def table(size: tuple[int, int], family: str | None = None) -> Table:
    """Returns a table of all published models, or of one family.

    Args:
      size: (height, width) in pixels of the image whose tokens and cache memory are shown.
    """
    height, width = size
    title = f"Published models, and an image of {width} x {height} pixels"
    listing = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for name in ("family", "size", "made of"):
        listing.add_column(name, overflow="fold")
    for name in ("parameters", "visual\ntokens", "KV cache,\nKiB/token", "MiB of\nimage"):
        listing.add_column(name, justify="right", no_wrap=True)  # a narrow terminal wraps names, never numbers
    for name, config in published(family):
        tokens = image_tokens(config, height, width)
        cache = generates(config) and cache_bytes_per_token(config, "bfloat16")
        listing.add_row(
            config.family,
            name,
            parts(config),
            f"{sum(count_params(config).values()):,}",
            "" if tokens is None else f"{tokens.patches:,}" + (f" + {tokens.newlines}" if tokens.newlines else ""),
            f"{cache / 2**10:.0f}" if cache else "",
            f"{cache * sum(tokens) / 2**20:.0f}" if cache and tokens else "",
        )
    return listing


def _size(text: str) -> tuple[int, int]:
    """Parses "WIDTHxHEIGHT" to (height, width) for argparse. Rejects sizes that no model reads."""
    if not (match := re.fullmatch(r"([1-9]\d{,8})x([1-9]\d{,8})", text, re.ASCII)):
        raise argparse.ArgumentTypeError(f"{text!r} is not an image size. Write width and height, as in 1920x1080.")
    width, height = int(match[1]), int(match[2])
    try:
        check_size(height, width)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}. Choose another size.") from error
    return height, width


def _family(text: str) -> str:
    if text not in FAMILIES:
        raise argparse.ArgumentTypeError(f"there is no family {text!r}; {suggestion(text, FAMILIES)}")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit status."""
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
        listing = table(args.image, args.family)
    Console(width=None if console.is_terminal else 160).print(listing)
    return 0


if __name__ == "__main__":
    run_command(main)
