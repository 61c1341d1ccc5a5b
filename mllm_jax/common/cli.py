"""Command lines of all programs: the form of their help, and errors of one line.

Programs that read the config of a run have absl's flags (`mllm_jax.train.runs.command`), all others a `Parser`.
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

OVERRIDE = "--config."  # words that begin with it replace a value of a config
REPLACES = f"{OVERRIDE}PATH=VALUE replaces a value of the config, as in {OVERRIDE}optim.steps=100."


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a docstring, and adds the defaults that the text of an option does not tell."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        absent = action.default in (None, False, [], argparse.SUPPRESS)
        return text if absent or action.required or "default" in text else f"{text} (default %(default)s)".lstrip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the nearest right word for a wrong one. No option is shortened.

    Args:
      prog: how the program is called, as in "python -m mllm_jax.families".
      description: its docstring.
    """

    def __init__(self, prog: str | None = None, description: str | None = None, **settings: Any):
        settings = {"formatter_class": Formatter, "allow_abbrev": False} | settings
        super().__init__(prog, description=description, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        found, surplus = self.parse_known_args(args, namespace)
        if surplus:
            self.unknown(surplus)
        return found

    def parse_with_overrides(self, args: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the words that replace values of a config."""
        found, surplus = self.parse_known_args(args)
        overrides, words = [], iter(surplus)
        for word in words:
            if not word.startswith(OVERRIDE):
                self.unknown([word, *words])
            overrides += [word] if "=" in word else [word, *[value for value in [next(words, None)] if value]]
        return found, overrides

    def unknown(self, words: Sequence[str]) -> NoReturn:
        """Refuses words that mean nothing here."""
        name = words[0].partition("=")[0]
        if name.startswith("-"):
            self.error(f"there is no option {name}; {suggestion(name, self.options())}")
        self.error(f"{' '.join(words)!r} belongs to no option")

    def options(self) -> Iterator[str]:
        """The options of this parser and of its commands, in their longest form."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser.options()
            elif action.option_strings:
                yield max(action.option_strings, key=len)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if value == "" and action.metavar in ("FILE", "FOLDER"):  # else it would count as left out
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
            said = f"needs {form}; where that begins with a hyphen, write {option}={form}"
            raise argparse.ArgumentError(action, said) from error

    def error(self, message: str) -> NoReturn:
        fail(f"{message.removesuffix('.')}; run with --help", 2)


def fail(message: str, exit_code: int) -> NoReturn:
    """Ends the process with one line for people."""
    print(f"error: {printable_lines(message)}", file=sys.stderr)
    sys.exit(exit_code)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with the exit code of a command. Ctrl-C prints one line and exits with 130, a full disk with 1.

    Args:
      main: the command. It may raise its own KeyboardInterrupt with the text of the line.
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
    """Ends the process without waiting for threads and processes that still work, or wait for some that have ended."""
    print(printable_lines(message), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    for worker in multiprocessing.active_children():
        worker.kill()
    multiprocessing.util._run_finalizers(0)  # or its resource tracker reports their semaphores as leaked
    os._exit(exit_code)


def cell(text: str) -> Text:
    """A text of others for a table of rich: neither markup nor control characters mean anything in it."""
    return Text(printable(text))
