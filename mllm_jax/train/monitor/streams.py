"""Keeps a run going, and saving, after its terminal or pipe was closed."""

import os
import sys
from typing import Any


def survive_closed_streams() -> None:
    """Makes writes to a closed stdout or stderr have no effect, instead of ending the program."""
    sys.stdout, sys.stderr = Surviving(sys.stdout), Surviving(sys.stderr)


class Surviving:
    """Text stream that redirects itself to the null device at the first write after its reader is gone."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:  # EPIPE of a pipe, EIO of a terminal
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:  # EPIPE of a pipe, EIO of a terminal
            self._drop()

    def _drop(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
