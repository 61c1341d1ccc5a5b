"""Command line of programs that read a run's config: `--config FILE.py[:argument] --config.path.to=value`.

Errors of users end the program with one line, without a traceback.
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

WORDS = re.compile(r"(?<=^--)\w[\w-]*(?==|$)")  # name of a flag, in which - and _ are equivalent
HELP = ("-h", "--help", "-help")
UNREADABLE = {  # pattern of a parser's error -> text that states the required form
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
      main: function of the command. The docstring and flags of its module are the help.
      expected: further errors that users can fix. Their attribute `exit_code` has priority.
      command: subcommand of the module, such as "certify" in `python -m mllm_jax.plan certify`.
    """

    def run_main(_argv) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname or not record.exc_info)
        try:
            main()
        except (ConfigError, BadData, OSError, *expected) as error:
            fail(_text_of(error), getattr(error, "exit_code", exit_code))
        except WorkerLost as error:
            end_at_once(f"error: {error}", error.exit_code)
        except KeyboardInterrupt:
            end_at_once("\ninterrupted", INTERRUPTED)

    raise_interrupts()
    app.run(run_main, flags_parser=partial(_parse, parser=_parser(main, command), exit_code=exit_code))


def _parser(main: Callable[[], None], command: str) -> Parser:
    """Returns the parser of a command's help: the docstring of its module, and the flags that the module defines."""
    program = getattr(sys.modules["__main__"].__spec__, "name", sys.argv[0]).removesuffix(".__main__")
    parser = Parser(f"python -m {program} {command}".rstrip(), sys.modules[main.__module__].__doc__)
    module = sys.argv[0] if main.__module__ == "__main__" else main.__module__  # absl's name of the module
    for flag in flags.FLAGS.flags_by_module_dict().get(module, []):
        options = {"action": "store_true"} if flag.boolean else {"choices": getattr(flag.parser, "enum_values", None)}
        parser.add_argument(f"--{flag.name}", help=flag.help.replace("%", "%%"), default=flag.default, **options)
    if "--config" in parser.options():
        parser.epilog = REPLACES
    return parser


def _text_of(error: Exception) -> str:
    """Returns the text of an error. Errors of get_config contain a traceback, of which only the end is kept."""
    return re.split(r"^[\w.]+Error: ", describe_error(error), flags=re.MULTILINE)[-1].strip()


def _parse(argv: Sequence[str], parser: Parser, exit_code: int) -> list[str]:
    if any(word in HELP for word in argv[1:]):
        parser.print_help()
        sys.exit(0)
    try:
        return _parsed(argv, flags.FLAGS, list(parser.options()))
    except SystemExit:  # absl exits with a failure after --helpfull
        sys.exit(0)
    except (ConfigError, OSError) as error:
        fail(_text_of(error), exit_code)


def read_config(words: Sequence[str], values: flags.FlagValues | None = None) -> ConfigDict:
    """Reads a config from `--config FILE.py[:argument] --config.path.to=value`, for programs with other flags.

    Args:
      values: other allowed flags, which are parsed as well.

    Raises:
      ConfigError: the command line or the config is invalid.
    """
    argv, values = ["", *words], flags.FlagValues() if values is None else values
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    try:
        _parsed(argv, values)
    except (ConfigError, OSError) as error:
        raise ConfigError(_text_of(error)) from error
    return values.config


def _parsed(argv: Sequence[str], values: flags.FlagValues, flag_names: Sequence[str] = ("--config",)) -> list[str]:
    """Parses a command line into `values`. Raises ConfigError and OSError.

    Args:
      flag_names: flags to suggest for an unknown one.
    """
    try:
        path = _config_file(argv)
        words = values([WORDS.sub(lambda flag: flag[0].replace("-", "_"), word) for word in argv])
        config = values.config
        if (
            path and not isinstance(config, ConfigDict) and not hasattr(config, "fields")
        ):  # raises OSError if the file was not read
            raise ConfigError(f"{path}: get_config returns a {type(config).__name__}. Return run_config(Run(...)).")
        for flag in map(values.__getitem__, values):  # an empty flag would count as absent
            if flag.present and flag.value == "" and not f"--{flag.name}".startswith(OVERRIDE):
                raise ConfigError(f"--{flag.name} is empty. Give it a value, or leave it out.")
        if words[1:]:
            raise ConfigError(f"{' '.join(words[1:])!r} belongs to no flag; run with --help")
        return words
    except (ConfigError, OSError):
        raise
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except (AttributeError, KeyError) as error:  # ConfigDict's errors for an unknown name lack the path
        if getattr(error, "name", None) == "get_config":
            raise ConfigError(f"{path}: has no function get_config. Define it, and return the config.") from error
        raise _unknown_name(argv) or ConfigError(describe_error(error)) from error
    except flags.UnrecognizedFlagError as error:
        candidates = nearest(f"--{error.flagname}", flag_names, 0.75)
        hint = f"write {candidates[0]}" if candidates else f"settings of a run are {OVERRIDE}path.to=value"
        raise ConfigError(f"there is no flag --{error.flagname}; {hint}; run with --help") from error
    except (flags.Error, TypeError, ValueError) as error:
        missing = re.findall(r"Flag (--\w+) must have a value other than None", str(error))
        advice = f"{' and '.join(missing)} must be given; run with --help"
        raise ConfigError(advice if missing else _text_of(ConfigError(_plain(describe_error(error))))) from error


def _plain(text: str) -> str:
    """Rewords an error of Python, absl or ml_collections about a value to state the required form."""
    for pattern, replacement in UNREADABLE.items():
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text


def _config_file(argv: Sequence[str]) -> str:
    """Returns the file of --config without its argument, "" without the flag. Raises ConfigError if it is missing."""
    match = re.search(r"^--?config[=\n]([^:\n]+)", "\n".join(argv), re.MULTILINE)
    if match is None:
        return ""
    if not Path(match[1]).is_file():
        candidates = [*Path(match[1]).parent.glob("*.py"), *Path("configs").glob("*.py")]
        raise ConfigError(f"there is no config file {match[1]}; {suggestion(match[1], set(candidates))}")
    return match[1]


def _unknown_name(argv: Sequence[str]) -> ConfigError | None:
    """Returns the error of the first override of an unknown name, or None."""
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
