"""Writes files atomically. Errors of full disks name the file, and no partial file remains."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

DISK_FULL = "the disk is full; free some space"
_CODES = (errno.ENOSPC, errno.EDQUOT)
_TEXTS = re.compile(
    "No space left|Disk quota exceeded"
)  # messages of C++ writers; RESOURCE_EXHAUSTED can also mean device memory


class DiskFull(OSError):
    """A file could not be written because its disk or its owner's quota is full."""


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error, of Python or of a C++ library, reports a full disk."""
    return getattr(error, "errno", None) in _CODES or _TEXTS.search(str(error)) is not None


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns errors of a full disk, which name no file, into DiskFull with the name `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, DiskFull) or not is_disk_full(error):
            raise
        raise DiskFull(errno.ENOSPC, DISK_FULL, os.fspath(path)) from error


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[IO[str]]:
    """Opens a temporary text file, which replaces `path` at the end of the block.

    Devices and pipes, such as /dev/stdout, are written directly.

    Raises:
      DiskFull: the file could not be written. An existing file is unchanged.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        with writing(path), open(path, "w", encoding="utf-8") as file:
            yield file
        return
    target = path.resolve()  # keeps a symbolic link
    partial = target.with_name(f".{target.name}.partial")
    try:
        with writing(path):
            with open(partial, "w", encoding="utf-8") as file:
                yield file
            os.replace(partial, target)
    except OSError as error:
        error.filename = str(path) if error.filename == str(partial) else error.filename
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Writes a text file atomically, as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(text)
