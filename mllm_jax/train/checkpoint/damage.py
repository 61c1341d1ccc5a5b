"""Detects and names damaged files of a run when they are read.

A checkpoint holds a fingerprint of every array and a checksum of everything else. A flipped bit in storage, or a copy
that stopped half way, is found when the checkpoint is restored.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from mllm_jax.common.config import ConfigError
from mllm_jax.common.errors import error_text, first_few
from mllm_jax.common.files import DISK_FULL, is_disk_full
from mllm_jax.train.checkpoint.fingerprint import fingerprints, names

CHECKSUM = "sha256"
# Errors of tensorstore about storage that may respond later: the files are not damaged.
OF_STORAGE = re.compile("PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|ABORTED")


class Damaged(ConfigError):
    """A checkpoint that cannot be read or does not hold what was saved.

    everywhere: every process of the run has found it.
    """

    def __init__(self, folder: Path, why: str, everywhere: bool):
        super().__init__(f"{folder} is damaged: {why}")
        self.everywhere = everywhere


def sealed(about: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own checksum."""
    return {**about, CHECKSUM: _checksum(about)}


def read_sealed(about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The inverse of `sealed`. Raises Damaged where the checksum is another one, or is not there."""
    about = dict(about)
    if about.pop(CHECKSUM, None) != _checksum(about):
        raise Damaged(folder, "its config or its position in the data is not what was saved", everywhere=True)
    return about


def check_arrays(tree: Any, saved: Mapping[str, int | None], folder: Path) -> None:
    """Raises ConfigError unless a tree, or its shapes, has leaves of the names that were `saved`."""
    wanted = set(names(tree))
    if lacking := sorted(wanted - saved.keys()):
        raise ConfigError(
            f"{folder} has no {', '.join(lacking[:3])}{' ...' if len(lacking) > 3 else ''}: another version of "
            "mllm_jax, jax or optax wrote it. Read it with that version, or use another --workdir"
        )


def verify(tree: Any, saved: Mapping[str, int | None], folder: Path) -> None:
    """Raises Damaged unless the arrays of a tree have the fingerprints that were saved; None = none was."""
    if None in saved.values():
        return
    if wrong := [name for name, found in fingerprints(tree).items() if found != saved[name]]:
        raise Damaged(folder, f"{first_few(wrong)} do not hold the values that were saved", everywhere=True)


@contextmanager
def reading(folder: Path, everywhere: bool = False) -> Iterator[None]:
    """Raises Damaged for whatever a reader of damaged files raises, but not where storage or memory fail.

    everywhere: all processes read the same files, so that all of them fail.
    """
    _hide_late_errors()
    try:
        yield
    except (ConfigError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if OF_STORAGE.search(str(error)) or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
            raise OSError(f"{folder} cannot be read now: {error_text(error)}") from error
        raise Damaged(folder, f"it cannot be read ({error_text(error)})", everywhere) from error


class SaveFailed(OSError):
    """A checkpoint that could not be written."""


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Raises SaveFailed, in one line, for what a writer of checkpoints raises where a disk is full or fails."""
    _hide_late_errors()
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except (ValueError, OSError, RuntimeError) as error:
        why = DISK_FULL if is_disk_full(error) else f"{error_text(error)}; see to the disk"
        raise SaveFailed(
            f"{folder}: a checkpoint could not be saved: {why}, and the same command resumes from the last complete one"
        ) from error


def _checksum(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _hide_late_errors() -> None:
    """Silences errors that pending reads and writes print from their own threads after one of them has failed."""
    before = sys.unraisablehook

    def hook_of_reading(found):
        if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
            before(found)

    if getattr(before, "__name__", "") != hook_of_reading.__name__:
        sys.unraisablehook = hook_of_reading
