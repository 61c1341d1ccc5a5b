"""The command `python -m mllm_jax.data inspect`: statistics of the batches of a run as tables and a page."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console

from mllm_jax.data.records.records import BadData
from mllm_jax.train.inspection import inspect, tables, write_page
from mllm_jax.train.runs.command import read_config
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.runs.stages import one_run


def main(args: argparse.Namespace, progress: Callable[[int], AbstractContextManager]) -> int:
    """Prints the tables and writes the page `args.html`. Returns the exit status.

    Raises:
      ValueError, OSError: errors that the user can fix.
    """
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise ValueError(f"--html={args.html}: its folder does not exist. Create {Path(args.html).parent}.")
    run = read_run(one_run(read_config(["--config", args.config, *args.settings]), args.stage))
    try:
        with progress(args.count) as advance:
            inspection = inspect(run, args.count, advance)
    except BadData as error:
        raise ValueError(str(error)) from error
    Console().print(tables(inspection))
    if args.html:
        name = args.config + (f", stage {args.stage}" if args.stage else "")
        print(write_page(args.html, f"Data of {name}", inspection))
    return 0
