"""Prepares data.

    python -m mllm_jax.data convert SOURCE FOLDER     any source to ArrayRecord shards, with the pictures inside

Each command says more under --help.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mllm_jax.config import told
from mllm_jax.data.convert import ABOUT, BROKEN, convert
from mllm_jax.data.sources import open_source

CONVERT = """From any source to ArrayRecord: numbered shards with the pictures and clips inside, in the source's order.

    python -m mllm_jax.data convert conversations.jsonl converted --root=pictures
    python -m mllm_jax.data convert 'shards/*.tar' converted --processes=32
    python -m mllm_jax.data convert tfds:scenes converted --where split=heldout

The same command goes on where it was interrupted. Broken records are left out, counted by reason, and named in the
folder's broken.txt. A run reads the result with --config.data.path=FOLDER.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 1 where something is wrong that the user can mend, told in one line."""
    args = _parser().parse_args(arguments)
    try:
        return args.command(args)
    except (OSError, ValueError) as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m mllm_jax.data", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("convert", description=CONVERT, formatter_class=raw, help="to ArrayRecord")
    command.set_defaults(command=_convert)
    add = command.add_argument
    add("source", metavar="SOURCE", help="a file, a pattern, a folder or tfds:NAME, as config.data.path takes it")
    add("folder", metavar="FOLDER", help="where the shards will be")
    add("--root", metavar="FOLDER", help="that paths in records are relative to (default: the folder of their file)")
    add("--where", metavar="FIELD=VALUE[,VALUE]", action="append", default=[], type=_where, help="keep only these")
    add("--records", metavar="N", type=_positive, default=4096, help="of a shard (default 4096)")
    add("--processes", metavar="N", type=int, default=os.cpu_count(), help="that work (default: one for each core)")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def _where(text: str) -> tuple[str, Any]:
    field, equals, values = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"needs FIELD=VALUE, not {text!r}")
    listed = tuple(map(_value, values.split(",")))
    return field, listed[0] if len(listed) == 1 else listed


def _value(text: str) -> Any:
    """A number, true, false or a quoted text as JSON has it; otherwise the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _convert(args: argparse.Namespace) -> int:
    where, folder = dict(args.where), Path(args.folder)
    source = open_source(args.source, args.root, where)
    size = sum(shard.path.stat().st_size for shard in source.shards)
    about = {"source": args.source, "root": args.root, "where": where, "source_bytes": size}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("records", total=len(source))
            progress = lambda done: bar.update(task, completed=done)
            held = convert(source, folder, about, args.records, args.processes, progress)
    except KeyboardInterrupt:
        done = len(list(folder.glob("*.array_record")))
        print(f"interrupted: {done} shards are whole; the same command goes on", file=sys.stderr)
        return 130
    print(f"{folder}: {held.records:,} records in {held.shards} shards; {ABOUT} says of what")
    if held.broken:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in held.broken.items())
        print(f"{sum(held.broken.values())} broken records left out, named in {folder / BROKEN}: {reasons}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
