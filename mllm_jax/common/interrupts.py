"""Handles Ctrl-C while KeyboardInterrupt cannot be handled: ends the process with one line, or delays the signal."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C, by the convention of shells


def end_imports(package: str) -> None:
    """Lets Ctrl-C end the process at once until `raise_interrupts`, if a command of this package runs (`-m`).

    During imports, a KeyboardInterrupt would print a traceback or be swallowed by a callback.
    """
    words = iter(sys.orig_argv)
    module = next((next(words, "") for word in words if word == "-m"), "").partition(".")[0]
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if module == package and default and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def raise_interrupts() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Delays Ctrl-C until the end of a block that cannot handle KeyboardInterrupt."""
    signals, handler = [], signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: signals.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if signals and callable(handler):
        handler(*signals[0])


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)
