"""The command line of programs that read a run's config: `--config FILE.py[:argument] --config.path.to=value`.

What people get wrong ends in one line that says what and where, not in a traceback.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mllm_jax.config import ConfigError, check_path
from mllm_jax.data.loader import BadData


def run(main: Callable[[], None], expected: tuple[type[Exception], ...] = (), exit_code: int = 1) -> None:
    """Parses the command line and runs `main`. Errors that people can mend are printed, and end it with `exit_code`."""

    def guarded(_argv) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            main()
        except (ConfigError, BadData, FileNotFoundError, *expected) as error:
            _fail(error, exit_code)

    app.run(guarded, flags_parser=partial(_parse, exit_code=exit_code))


def _fail(error: Exception, exit_code: int) -> None:
    print(f"error: {str(error).rpartition('ConfigError: ')[2].strip()}", file=sys.stderr)  # get_config's come wrapped
    sys.exit(exit_code)


def _parse(argv: Sequence[str], exit_code: int) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
        if flags.FLAGS["config"].present and not isinstance(flags.FLAGS.config, ConfigDict):
            flags.FLAGS.config.fields  # noqa: B018  a file that could not be read says why when it is used
        if rest[1:]:
            raise ConfigError(f"{' '.join(rest[1:])!r} belongs to no flag; run with --help")
        return rest
    except (AttributeError, KeyError) as error:  # what ConfigDict says to an unknown name: nothing but the name
        _fail(_unknown_name(argv) or error, exit_code)
    except (flags.Error, ConfigError, OSError, TypeError, ValueError) as error:
        _fail(error, exit_code)


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
