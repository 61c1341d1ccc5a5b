"""Detects damaged checkpoints when they are read.

A checkpoint contains a fingerprint of every array and a checksum of everything else. A flipped bit or an incomplete
copy is therefore found when the checkpoint is restored.
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
# Status codes of tensorstore for storage errors that may pass: the files themselves may be intact.
OF_STORAGE = re.compile("PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|ABORTED")


class Damaged(ConfigError):
    """A checkpoint that cannot be read, or whose content differs from what was saved.

    everywhere: True if every process of the run has found the damage.
    """

    def __init__(self, folder: Path, why: str, everywhere: bool):
        super().__init__(f"{folder} is damaged: {why}")
        self.everywhere = everywhere


def sealed(about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a JSON object with its checksum added under the key `CHECKSUM`."""
    return {**about, CHECKSUM: _checksum(about)}


def read_sealed(about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the object without its checksum: the inverse of `sealed`. Raises Damaged if it is wrong or missing."""
    about = dict(about)
    if about.pop(CHECKSUM, None) != _checksum(about):
        raise Damaged(folder, "its config or its position in the data differs from what was saved", everywhere=True)
    return about


def check_arrays(tree: Any, saved: Mapping[str, int | None], folder: Path) -> None:
    """Raises ConfigError unless every leaf of a tree (arrays or shapes) has its name among those `saved`."""
    wanted = set(names(tree))
    if missing := sorted(wanted - saved.keys()):
        raise ConfigError(
            f"{folder} has no {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: another version of "
            "mllm_jax, jax or optax wrote it. Read it with that version, or use another --workdir."
        )


def verify(tree: Any, saved: Mapping[str, int | None], folder: Path) -> None:
    """Raises Damaged unless the arrays of a tree have the saved fingerprints. Does nothing if a fingerprint is None."""
    if None in saved.values():
        return
    if wrong := [name for name, value in fingerprints(tree).items() if value != saved[name]]:
        raise Damaged(folder, f"{first_few(wrong)} differ from the values that were saved", everywhere=True)


@contextmanager
def reading(folder: Path, everywhere: bool = False) -> Iterator[None]:
    """Turns the errors of reading a damaged checkpoint into Damaged, and errors of the storage into OSError.

    Errors of memory and of jax, and ConfigErrors, pass unchanged.

    Args:
      everywhere: True if all processes read the same files, so that all of them fail.
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
    """Turns the errors of writing a checkpoint to a full or failing disk into SaveFailed, in one line."""
    _hide_late_errors()
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except (ValueError, OSError, RuntimeError) as error:
        why = DISK_FULL if is_disk_full(error) else f"{error_text(error)}; repair the disk"
        raise SaveFailed(
            f"{folder}: a checkpoint could not be saved: {why}, then rerun the same command: it resumes from the last "
            "complete checkpoint."
        ) from error


def _checksum(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _hide_late_errors() -> None:
    """Suppresses "Event loop is closed", which threads of pending reads and writes print after one of them failed."""
    before = sys.unraisablehook

    def hook_of_reading(found):
        if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
            before(found)

    if getattr(before, "__name__", "") != hook_of_reading.__name__:
        sys.unraisablehook = hook_of_reading
