"""Ctrl-C where an exception would come too early: one line and the exit code of shells, or a while later."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C, as shells have it


def end_imports(package: str) -> None:
    """Lets Ctrl-C end the process at once until `raise_interrupts`, if it is a command of this package (`-m`).

    An exception could not do it: in a module that is half imported it is a traceback, or is swallowed by a callback.
    """
    words = iter(sys.orig_argv)
    named = next((next(words, "") for word in words if word == "-m"), "").partition(".")[0]
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if named == package and usual and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def raise_interrupts() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Holds Ctrl-C back until the end of the block, where it comes too early to be handled."""
    noted, before = [], signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: noted.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if noted and callable(before):
        before(*noted[0])


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)
