"""Command line of programs that read a run's config: `--config FILE.py[:argument] --config.path.to=value`.

Mistakes end in one line that names them, without a traceback.
"""

import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mllm_jax.common.cli import OVERRIDE, REPLACES, Parser, end_at_once, fail
from mllm_jax.common.config import ConfigError, check_path
from mllm_jax.common.errors import describe_error, nearest, suggestion
from mllm_jax.common.interrupts import INTERRUPTED, raise_interrupts
from mllm_jax.data.pipeline.workers import WorkerLost
from mllm_jax.data.records.records import BadData

WORDS = re.compile(r"(?<=^--)\w[\w-]*(?==|$)")  # of a flag: --max-new-tokens and --max_new_tokens are the same
HELP = ("-h", "--help", "-help")
UNREADABLE = {  # how the parsers of values word it, and the form that is needed
    r"invalid literal for int\(\) with base 10:": "needs an integer, not",
    r"could not convert string to float:": "needs a number, not",
    r"\('Non-boolean argument to boolean flag', (.*)\)$": r"needs true or false, not \1",
    r"Failed to parse (.*) as a ConfigDict: .*": r"needs names with values, as in {'name': 1}, not \1",
    r"Error while parsing string: (.*) as tuple\. .*": r"needs a list, as in ('first', 'second'), not \1",
}


def run(
    main: Callable[[], None], expected: tuple[type[Exception], ...] = (), exit_code: int = 1, command: str = ""
) -> None:
    """Parses the command line and runs `main`. Prints errors that users can fix, and exits with their `exit_code`.

    Args:
      main: function of a module whose docstring and flags are the help of the command.
      expected: further errors that users can fix. One may have an `exit_code` of its own.
      command: subcommand of the module, as in "certify" of `python -m mllm_jax.plan certify`.
    """

    def guarded(_argv) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname or not record.exc_info)
        try:
            main()
        except (ConfigError, BadData, OSError, *expected) as error:
            fail(_told(error), getattr(error, "exit_code", exit_code))
        except WorkerLost as error:
            end_at_once(f"error: {error}", error.exit_code)
        except KeyboardInterrupt:
            end_at_once("\ninterrupted", INTERRUPTED)

    raise_interrupts()
    app.run(guarded, flags_parser=partial(_parse, parser=_parser(main, command), exit_code=exit_code))


def _parser(main: Callable[[], None], command: str) -> Parser:
    """The help of a command: the docstring of its module, and the flags that the module defines."""
    program = getattr(sys.modules["__main__"].__spec__, "name", sys.argv[0]).removesuffix(".__main__")
    parser = Parser(f"python -m {program} {command}".rstrip(), sys.modules[main.__module__].__doc__)
    owner = sys.argv[0] if main.__module__ == "__main__" else main.__module__  # as absl names modules
    for flag in flags.FLAGS.flags_by_module_dict().get(owner, []):
        kind = {"action": "store_true"} if flag.boolean else {"choices": getattr(flag.parser, "enum_values", None)}
        parser.add_argument(f"--{flag.name}", help=flag.help.replace("%", "%%"), default=flag.default, **kind)
    if "--config" in parser.options():
        parser.epilog = REPLACES
    return parser


def _told(error: Exception) -> str:
    """Text of an error. get_config raises errors with a traceback in their text; of these, the end."""
    return re.split(r"^[\w.]+Error: ", describe_error(error), flags=re.MULTILINE)[-1].strip()


def _parse(argv: Sequence[str], parser: Parser, exit_code: int) -> list[str]:
    if any(word in HELP for word in argv[1:]):
        parser.print_help()
        sys.exit(0)
    try:
        return _parsed(argv, flags.FLAGS, list(parser.options()))
    except SystemExit:  # absl calls it a failure when it has printed the help of --helpfull
        sys.exit(0)
    except (ConfigError, OSError) as error:
        fail(_told(error), exit_code)


def read_config(words: Sequence[str], values: flags.FlagValues | None = None) -> ConfigDict:
    """Reads the config that `--config FILE.py[:argument] --config.path.to=value` set, for programs with other flags.

    Args:
      values: other flags that may be given; they receive their values, too.

    Raises:
      ConfigError: a mistake, with its place.
    """
    argv, values = ["", *words], flags.FlagValues() if values is None else values
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    try:
        _parsed(argv, values)
    except (ConfigError, OSError) as error:
        raise ConfigError(_told(error)) from error
    return values.config


def _parsed(argv: Sequence[str], values: flags.FlagValues, known: Sequence[str] = ("--config",)) -> list[str]:
    """Parses a command line into `values`. Raises ConfigError and OSError.

    Args:
      known: the flags that a wrong one may have meant.
    """
    try:
        path = _config_file(argv)
        rest = values([WORDS.sub(lambda flag: flag[0].replace("-", "_"), word) for word in argv])
        config = values.config
        if path and not isinstance(config, ConfigDict) and not hasattr(config, "fields"):  # OSError if it was not read
            raise ConfigError(f"get_config of {path} must return what run_config does, not a {type(config).__name__}")
        for flag in map(values.__getitem__, values):  # else it would count as left out
            if flag.present and flag.value == "" and not f"--{flag.name}".startswith(OVERRIDE):
                raise ConfigError(f"--{flag.name} is empty; give it a value, or leave it out")
        if rest[1:]:
            raise ConfigError(f"{' '.join(rest[1:])!r} belongs to no flag; run with --help")
        return rest
    except (ConfigError, OSError):
        raise
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except (AttributeError, KeyError) as error:  # ConfigDict's error for an unknown name, which has only the name
        if getattr(error, "name", None) == "get_config":
            raise ConfigError(f"{path} has no function get_config, which returns the config") from error
        raise _unknown_name(argv) or ConfigError(describe_error(error)) from error
    except flags.UnrecognizedFlagError as error:
        meant = nearest(f"--{error.flagname}", known, 0.75)
        hint = f"write {meant[0]}" if meant else f"settings of a run are {OVERRIDE}path.to=value"
        raise ConfigError(f"there is no flag --{error.flagname}; {hint}; run with --help") from error
    except (flags.Error, TypeError, ValueError) as error:
        missing = re.findall(r"Flag (--\w+) must have a value other than None", str(error))
        advice = f"{' and '.join(missing)} must be given; run with --help"
        raise ConfigError(advice if missing else _told(ConfigError(_plain(describe_error(error))))) from error


def _plain(text: str) -> str:
    """Rewords an error of Python, absl or ml_collections about a value: names the form that is needed."""
    for pattern, needed in UNREADABLE.items():
        text = re.sub(pattern, needed, text, flags=re.DOTALL)
    return text


def _config_file(argv: Sequence[str]) -> str:
    """The file that --config names, without its argument; empty where there is no such flag. ConfigError: no file."""
    named = re.search(r"^--?config[=\n]([^:\n]+)", "\n".join(argv), re.MULTILINE)
    if named is None:
        return ""
    if not Path(named[1]).is_file():
        here = [*Path(named[1]).parent.glob("*.py"), *Path("configs").glob("*.py")]
        raise ConfigError(f"there is no config file {named[1]}; {suggestion(named[1], set(here))}")
    return named[1]


def _unknown_name(argv: Sequence[str]) -> ConfigError | None:
    """The first override of a name that the config does not have."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=[])
    joined = [f"{flag}={value}" for flag, value in zip(argv, argv[1:]) if flag.lstrip("-") == "config"]
    values([argv[0], *joined, *(flag for flag in argv if flag.startswith(("--config=", "-config=")))])
    for flag in argv:
        name = flag.lstrip("-").split("=")[0]
        if flag.startswith("-") and name.startswith("config."):
            try:
                check_path(values.config, name.removeprefix("config."))
            except ConfigError as error:
                return error
    return None
