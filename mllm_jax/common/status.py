"""Status messages on stderr for operations that take long, so that a silent program is not mistaken for a hung one."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mllm_jax.common.printable import printable_lines

PATIENCE = 2.0  # seconds


def say(text: str) -> None:
    """Prints a line to stderr and flushes it."""
    print(printable_lines(text), file=sys.stderr, flush=True)


@contextmanager
def announced(text: str) -> Iterator[threading.Timer]:
    """Prints `text` to stderr if the block takes longer than PATIENCE.

    Yields the timer, whose `cancel()` suppresses the message.
    """
    timer = threading.Timer(PATIENCE, say, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield timer
    finally:
        timer.cancel()
