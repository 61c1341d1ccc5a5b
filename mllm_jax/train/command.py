"""The command line of programs that read a run's config: `--config FILE.py[:argument] --config.path.to=value`.

What people get wrong ends in one line that says what and where, not in a traceback.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mllm_jax.config import ConfigError, check_path, suggestion, told
from mllm_jax.data.loader import BadData
from mllm_jax.data.readers import WorkerLost

WORDS = re.compile(r"(?<=^--)\w[\w-]*(?==|$)")  # of a flag: --max-new-tokens and --max_new_tokens are the same


def run(main: Callable[[], None], expected: tuple[type[Exception], ...] = (), exit_code: int = 1) -> None:
    """Parses the command line and runs `main`. Errors that people can mend are printed, and end it with `exit_code`.

    An error of `expected` may have an `exit_code` of its own.
    """

    def guarded(_argv) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname or not record.exc_info)
        try:
            main()
        except (ConfigError, BadData, OSError, *expected) as error:
            _fail(error, getattr(error, "exit_code", exit_code))
        except WorkerLost as error:
            _end_at_once(f"error: {error}", error.exit_code)
        except KeyboardInterrupt:
            _end_at_once("interrupted", 128 + signal.SIGINT)

    app.run(guarded, flags_parser=partial(_parse, exit_code=exit_code))


def _fail(error: Exception, exit_code: int) -> None:
    print(f"error: {_told(error)}", file=sys.stderr)
    sys.exit(exit_code)


def _end_at_once(text: str, exit_code: int) -> NoReturn:
    """Does not wait for threads and processes that still work, or that wait for some that have ended."""
    print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _told(error: Exception) -> str:
    """What is wrong: of what get_config raises, which comes wrapped in a traceback, what stands at its end."""
    return re.split(r"^[\w.]+Error: ", told(error), flags=re.MULTILINE)[-1].strip()


def _parse(argv: Sequence[str], exit_code: int) -> list[str]:
    try:
        return _parsed(argv, flags.FLAGS)
    except SystemExit:  # absl calls it a failure when it has printed the help
        sys.exit(0)
    except (ConfigError, OSError) as error:
        _fail(error, exit_code)


def read_config(words: Sequence[str]) -> ConfigDict:
    """The config that `--config FILE.py[:argument] --config.path.to=value` say, for programs with flags of their own.

    Raises:
      ConfigError: what is wrong, and where.
    """
    argv, values = ["", *words], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    try:
        _parsed(argv, values)
    except (ConfigError, OSError) as error:
        raise ConfigError(_told(error)) from error
    return values.config


def _parsed(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Parses a command line into `values`. Raises ConfigError and OSError."""
    try:
        path = _config_file(argv)
        rest = values([WORDS.sub(lambda flag: flag[0].replace("-", "_"), word) for word in argv])
        config = values.config
        if path and not isinstance(config, ConfigDict) and not hasattr(config, "fields"):  # OSError if it was not read
            raise ConfigError(f"get_config of {path} must return what run_config does, not a {type(config).__name__}")
        if rest[1:]:
            raise ConfigError(f"{' '.join(rest[1:])!r} belongs to no flag; run with --help")
        return rest
    except (ConfigError, OSError):
        raise
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except (AttributeError, KeyError) as error:  # what ConfigDict says to an unknown name: nothing but the name
        if getattr(error, "name", None) == "get_config":
            raise ConfigError(f"{path} has no function get_config, which returns the config") from error
        raise _unknown_name(argv) or ConfigError(told(error)) from error
    except flags.UnrecognizedFlagError as error:
        hint = "settings of a run are --config.path.to=value; run with --help"
        raise ConfigError(f"there is no flag --{error.flagname}; {hint}") from error
    except (flags.Error, TypeError, ValueError) as error:
        missing = re.findall(r"Flag (--\w+) must have a value other than None", str(error))
        advice = f"{' and '.join(missing)} must be given; run with --help"
        raise ConfigError(advice if missing else _told(ConfigError(_no_number(told(error))))) from error


def _no_number(text: str) -> str:
    """What Python says of a text that is no int or float, in plain words."""
    text = text.replace("invalid literal for int() with base 10:", "needs a whole number, not")
    return text.replace("could not convert string to float:", "needs a number, not")


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
