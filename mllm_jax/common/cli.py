"""Command lines of all programs: help texts and one-line errors.

Programs that read the config of a run use absl's flags (`mllm_jax.train.runs.command`), all others a `Parser`.
"""

import argparse
import multiprocessing.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from rich.text import Text

from mllm_jax.common.errors import describe_error, suggestion
from mllm_jax.common.files import is_disk_full
from mllm_jax.common.interrupts import INTERRUPTED, raise_interrupts
from mllm_jax.common.printable import printable, printable_lines

OVERRIDE = "--config."  # prefix of arguments that replace a value of a config
REPLACES = f"{OVERRIDE}PATH=VALUE replaces a value of the config, as in {OVERRIDE}optim.steps=100."


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a docstring, and adds defaults that the help of an option does not mention."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        absent = action.default in (None, False, [], argparse.SUPPRESS)
        return text if absent or action.required or "default" in text else f"{text} (default %(default)s)".lstrip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors and suggestions for unknown words. Options cannot be abbreviated.

    Args:
      prog: command of the program, such as "python -m mllm_jax.families".
      description: docstring of the program.
      settings: other arguments of ArgumentParser.
    """

    def __init__(self, prog: str | None = None, description: str | None = None, **settings: Any):
        settings = {"formatter_class": Formatter, "allow_abbrev": False} | settings
        super().__init__(prog, description=description, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.unknown(unknown)
        return options

    def parse_with_overrides(self, args: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """Returns (the options, the arguments that replace values of a config)."""
        options, unknown = self.parse_known_args(args)
        overrides, words = [], iter(unknown)
        for word in words:
            if not word.startswith(OVERRIDE):
                self.unknown([word, *words])
            overrides += [word] if "=" in word else [word, *[value for value in [next(words, None)] if value]]
        return options, overrides

    def unknown(self, words: Sequence[str]) -> NoReturn:
        """Ends the program with an error about unknown arguments."""
        name = words[0].partition("=")[0]
        if name.startswith("-"):
            self.error(f"there is no option {name}; {suggestion(name, self.options())}")
        self.error(f"{' '.join(words)!r} belongs to no option")

    def options(self) -> Iterator[str]:
        """Yields the options of this parser and of its commands, in their longest form."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser.options()
            elif action.option_strings:
                yield max(action.option_strings, key=len)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if value == "" and action.metavar in ("FILE", "FOLDER"):  # would be treated like an absent option
            raise argparse.ArgumentError(action, f"needs {action.metavar}, not an empty name")
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"there is no {value!r}; {suggestion(value, action.choices)}")

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError as error:
            if not action.option_strings or action.nargs is not None:
                raise
            form, option = action.metavar or action.dest.upper(), max(action.option_strings, key=len)
            message = f"needs {form}; if it begins with a hyphen, write {option}={form}"
            raise argparse.ArgumentError(action, message) from error

    def error(self, message: str) -> NoReturn:
        fail(f"{message.removesuffix('.')}; run with --help", 2)


def fail(message: str, exit_code: int) -> NoReturn:
    """Ends the process with a one-line error on stderr."""
    print(f"error: {printable_lines(message)}", file=sys.stderr)
    sys.exit(exit_code)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with the exit code of a command. Ctrl-C prints one line and exits with 130, a full disk with 1.

    Args:
      main: the command. It may raise a KeyboardInterrupt with the text of that line.
    """
    raise_interrupts()
    try:
        sys.exit(main())
    except (OSError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        fail(describe_error(error), 1)
    except KeyboardInterrupt as interrupt:
        end_at_once(f"\n{str(interrupt) or 'interrupted'}", INTERRUPTED)


def end_at_once(message: str, exit_code: int) -> NoReturn:
    """Ends the process at once, without waiting for its threads and worker processes, which may hang."""
    print(printable_lines(message), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    for worker in multiprocessing.active_children():
        worker.kill()
    multiprocessing.util._run_finalizers(0)  # otherwise the resource tracker reports leaked semaphores
    os._exit(exit_code)


def cell(text: str) -> Text:
    """Returns an untrusted text for a table of rich, without markup and control characters."""
    return Text(printable(text))
