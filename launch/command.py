"""What the launchers share: their command line, and the training command that all of them end in."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.cli import Parser
from mllm_jax.settings import PositiveInt, argument

ROOT = Path(__file__).resolve().parents[1]
MODULE = "mllm_jax.train"
AGAIN = 75  # its exit code where the same command goes on: `mllm_jax.train.processes.AGAIN`, without jax
AFTER = "-- --config FILE --workdir DIR ..."  # the arguments of the training
NAME = "lower-case letters, digits and hyphens, a letter first, at most 40"


def launcher(module: str, doc: str, actions: str = "") -> Parser:
    """The parser of a launcher, with --dry_run; `parse` reads with it."""
    parser = Parser(
        f"python -m {module}",
        doc,
        usage=f"python -m {module} {actions}[OPTIONS] {AFTER}",
        epilog=f"What follows -- are the arguments of python -m {MODULE}.",
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be done, and do nothing")
    return parser


def parse(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, and as `command` what follows the `--`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:cut])
    options.command = words[cut + 1 :]
    return options


def name(text: str) -> str:
    """A name that Google Cloud, Kubernetes and Slurm accept; for argparse."""
    plain = text.replace("-", "")
    good = plain.isascii() and plain.isalnum() and text == text.lower() and text[0].isalpha() and text[-1] != "-"
    if not (good and len(text) <= 40):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: {NAME}")
    return text


positive = argument(PositiveInt)  # for argparse


def check_training(parser: Parser, command: Sequence[str], mount: str = "") -> str:
    """Refuses arguments that training would refuse only after a machine was waited for. Returns the workdir.

    Args:
      mount: the folder of the file system that all hosts share, in which the workdir must lie.
    """
    if "--dry_run" in command:
        parser.error("--dry_run must stand before the --, or it is an argument of the training")
    values = {}
    for word, following in zip(command, [*command[1:], ""]):
        flag, equals, value = word.partition("=")
        values.setdefault(flag.lstrip("-"), value if equals else following)
    missing = [flag for flag in ("config", "workdir") if not values.get(flag)]
    if missing:
        parser.error(f"--{' and --'.join(missing)} must be given to the training, as in: {AFTER}")
    config, workdir = values["config"].partition(":")[0], values["workdir"]
    if not (ROOT / config).is_file():
        parser.error(f"there is no config file {config} in {ROOT}")
    if "://" in workdir:
        parser.error(f"--workdir={workdir} is not a folder: mount the bucket on every host, and name a folder in it")
    if mount and mount not in (workdir.rstrip("/"), *map(str, Path(workdir).parents)):
        parser.error(f"--workdir={workdir} is lost with its host: the file system that all hosts share is {mount}")
    return workdir


def training(command: Sequence[str], *cluster: str, python: str = "python") -> list[str]:
    """The command of every process. `cluster`: how it finds the others, see `python -m mllm_jax.train --help`."""
    return [python, "-m", MODULE, *cluster, *command]


def run(command: Sequence[str], text: str | None = None, dry_run: bool = False) -> int:
    """Runs a command with `text` as its input and returns its exit code; `dry_run` prints both instead."""
    if dry_run:
        print(shlex.join(command) + (" <<'END'\n" + text.rstrip("\n") + "\nEND" if text else ""))
        return 0
    try:
        return subprocess.run(command, input=text, text=True).returncode
    except FileNotFoundError:
        print(f"error: {command[0]} is not installed here; --dry_run prints what it would be told", file=sys.stderr)
        return 1
