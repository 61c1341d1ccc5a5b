"""Prepares data.

    python -m mllm_jax.data convert SOURCE FOLDER     writes any source as ArrayRecord shards, images included
    python -m mllm_jax.data inspect --config FILE     shows the batches of a run as a table or an HTML page

Use COMMAND --help for details.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mllm_jax.common.cli import REPLACES, Parser, run_command
from mllm_jax.common.errors import describe_error
from mllm_jax.common.printable import printable_lines
from mllm_jax.common.settings import NonNegativeInt, PositiveInt, argument
from mllm_jax.data.sources import open_source
from mllm_jax.data.tools.convert import ABOUT, BROKEN, convert

INSPECT_COMMAND = "mllm_jax.train.inspect_command"  # imports jax, which the workers of `convert` never do

CONVERT = """Converts any source to numbered ArrayRecord shards, with images and videos inside, in the source's order.

    python -m mllm_jax.data convert conversations.jsonl converted --root=images
    python -m mllm_jax.data convert 'shards/*.tar' converted --processes=32
    python -m mllm_jax.data convert tfds:scenes converted --where split=heldout

Repeat the same command to resume after an interruption. Broken records are left out, counted by reason, and listed in
the folder's broken.txt. A run reads the result with --config.data.path=FOLDER.
"""


INSPECT = """Shows the batches of a run: counts, lengths, fill, and the records that are left out, by reason.

    python -m mllm_jax.data inspect --config configs/scenes.py
    python -m mllm_jax.data inspect --config configs/sft.py --config.init=FOLDER --config.data.path=conversations.jsonl
    python -m mllm_jax.data inspect --config configs/recipes/llava_1_5.py --stage=align --html=align.html

Records are read, packed and counted as in the run, in the same order. The page of --html shows histograms,
conversations with their images and loss weights as the model reads them, and packed rows as colored bars.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit status: 1 after an error of one line that the user can fix."""
    parser = _parser()
    args, args.settings = parser.parse_with_overrides(arguments)
    if args.settings and args.command is not _inspect:
        parser.unknown(args.settings)
    try:
        return args.command(args)
    except (OSError, ValueError) as error:
        print(f"error: {printable_lines(describe_error(error))}", file=sys.stderr)
        return 1


def _parser() -> Parser:
    parser = Parser("python -m mllm_jax.data", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("convert", description=CONVERT, help="convert to ArrayRecord")
    command.set_defaults(command=_convert)
    add = command.add_argument
    add("source", metavar="SOURCE", help="file, pattern, folder or tfds:NAME, as in config.data.path")
    add("folder", metavar="FOLDER", help="folder that the shards are written to")
    add("--root", metavar="FOLDER", help="folder of relative paths in records (default: the folder of their file)")
    add("--where", metavar="FIELD=VALUE[,VALUE]", action="append", default=[], type=_where, help="records to keep")
    add("--records", metavar="N", type=argument(PositiveInt), default=4096, help="records per shard (default 4096)")
    add(
        "--processes",
        metavar="N",
        type=argument(NonNegativeInt),
        default=os.cpu_count(),
        help="number of worker processes (default: one per core)",
    )
    command = commands.add_parser("inspect", description=INSPECT, epilog=REPLACES, help="show the batches of a run")
    command.set_defaults(command=_inspect)
    add = command.add_argument
    add("--config", metavar="FILE[:ARGUMENT]", required=True, help="config of the run")
    add("--stage", metavar="NAME", help="stage, for a run with stages")
    add(
        "--count",
        metavar="N",
        type=argument(PositiveInt),
        default=1000,
        help="approximate number of records to pack (default 1000)",
    )
    add("--html", metavar="FILE", help="HTML page to write")
    return parser


def _where(text: str) -> tuple[str, Any]:
    field, equals, values = text.partition("=")
    if not (field and equals):
        raise argparse.ArgumentTypeError(f"needs FIELD=VALUE, not {text!r}")
    listed = tuple(map(_value, values.split(",")))
    return field, listed[0] if len(listed) == 1 else listed


def _value(text: str) -> Any:
    """Returns the text parsed as JSON (a number, true, false, a quoted text), or unchanged if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar of records; yields a function that sets the number of records done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("records", total=total)
        yield lambda done: bar.update(task, completed=min(done, total))


def _convert(args: argparse.Namespace) -> int:
    where, folder = dict(args.where), Path(args.folder)
    source = open_source(args.source, args.root, where)
    size = sum(shard.path.stat().st_size for shard in source.shards)
    about = {"source": args.source, "root": args.root, "where": where, "source_bytes": size}
    try:
        with _progress(len(source)) as progress:
            result = convert(source, folder, about, args.records, args.processes, progress)
    except KeyboardInterrupt as interrupt:
        done = len(list(folder.glob("*.array_record")))
        raise KeyboardInterrupt(f"interrupted: {done} shards are complete. Repeat the command to go on.") from interrupt
    print(f"{folder}: {result.records:,} records in {result.shards} shards, described in {ABOUT}.")
    if result.broken:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in result.broken.items())
        print(f"{sum(result.broken.values())} broken records left out, listed in {folder / BROKEN}: {reasons}")
    for note, count in result.noted.items():
        print(f"{note}: {count:,} records")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    return importlib.import_module(INSPECT_COMMAND).main(args, _progress)


if __name__ == "__main__":
    run_command(main)
