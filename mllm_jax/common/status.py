"""Life signs of what takes long, on stderr: silence means that a program ends soon, never that it may have hung."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mllm_jax.common.printable import printable_lines

PATIENCE = 2.0  # seconds


def say(text: str) -> None:
    """Prints a line to stderr at once."""
    print(printable_lines(text), file=sys.stderr, flush=True)


@contextmanager
def announced(text: str) -> Iterator[threading.Timer]:
    """Prints `text` to stderr if its body takes longer than PATIENCE.

    Yields the timer; its `cancel()` ends the wait before the body ends.
    """
    timer = threading.Timer(PATIENCE, say, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield timer
    finally:
        timer.cancel()
