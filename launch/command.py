"""Shared parts of the launchers: their command line, and the training command that all of them run."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

from launch.checks import AFTER, Training, check_training, read_training
from launch.hosts import Hosts
from mllm_jax.common.cli import Parser, fail
from mllm_jax.common.config import ConfigError
from mllm_jax.common.settings import PositiveInt, argument

MODULE = "mllm_jax.train"
NAME = "lower-case letters, digits and hyphens, a letter first, at most 40"


def launcher(module: str, doc: str, actions: str = "") -> Parser:
    """The parser of a launcher, with --dry_run and --host_folder; `parse` reads with it."""
    parser = Parser(
        f"python -m {module}",
        doc,
        usage=f"python -m {module} {actions}[OPTIONS] {AFTER}",
        epilog=f"What follows -- are the arguments of python -m {MODULE}.",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands without running them")
    parser.add_argument(
        "--host_folder",
        type=absolute,
        action="append",
        default=[],
        metavar="FOLDER",
        help="folder with data or weights that every host has; may be repeated",
    )
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


def absolute(text: str) -> str:
    """A folder of the hosts; for argparse."""
    if not text.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder of the hosts: begin with /")
    return text


def checked(command: Sequence[str], hosts: Callable[[], Hosts]) -> Training:
    """The arguments of the training. Ends the process where training would refuse them, which takes about 2 s.

    Args:
      hosts: gives what the training runs on; it may raise ConfigError.
    """
    try:
        training = read_training(command)
        check_training(training, hosts())
    except ConfigError as error:
        fail(str(error), 2)
    return training


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
        print(f"error: {command[0]} is not installed here; --dry_run prints its commands", file=sys.stderr)
        return 1
