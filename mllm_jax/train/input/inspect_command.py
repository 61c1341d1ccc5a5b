"""The command `python -m mllm_jax.data inspect`: what the batches of a run hold, as a table and as a page."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console

from mllm_jax.data.pipeline.loader import BadData
from mllm_jax.train.input.inspection import inspect, tables, write_page
from mllm_jax.train.runs.command import read_config
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.runs.stages import one_run


def main(args: argparse.Namespace, progress: Callable[[int], AbstractContextManager]) -> int:
    """Prints the tables, and writes the page that `args.html` names. Returns the exit status.

    Raises:
      ValueError, OSError: something is wrong that the user can mend.
    """
    if args.html and not Path(args.html).absolute().parent.is_dir():
        raise ValueError(f"--html={args.html} is in a folder that does not exist")
    run = read_run(one_run(read_config(["--config", args.config, *args.settings]), args.stage))
    try:
        with progress(args.count) as advance:
            found = inspect(run, args.count, advance)
    except BadData as error:
        raise ValueError(str(error)) from error
    Console().print(tables(found))
    if args.html:
        named = args.config + (f", stage {args.stage}" if args.stage else "")
        print(write_page(args.html, f"Data of {named}", found))
    return 0
