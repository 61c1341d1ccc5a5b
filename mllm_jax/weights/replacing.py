"""Replaces the files of a folder as a whole: a reader finds all old files, all new files, or refuses the folder.

The new files are first completed in a sibling folder. Then the file without which readers refuse the folder is removed,
the others are moved, and its new version is moved last. The next save finishes an interrupted one.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mllm_jax.common.files import writing

_PLAN = ".files.json"


def unfinished(folder: Path) -> Path:
    """Returns the sibling folder for the new files of `folder`."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.unfinished")


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Finishes an interrupted save, and yields a new, empty sibling folder, which is removed at the end of the block.

    Raises:
      DiskFull: an error in the block reports a full disk.
    """
    finish(folder)
    stage = unfinished(folder)
    shutil.rmtree(stage, ignore_errors=True)
    try:
        with writing(folder):
            stage.mkdir(parents=True)
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def replace_files(folder: Path, last: str, stale: Iterable[str] = ()) -> None:
    """Moves the files of the sibling folder to `folder`.

    Args:
      last: name of the file without which readers refuse the folder.
      stale: names of old files of the folder that are removed.
    """
    stage = unfinished(folder)
    if not folder.exists():
        stage.rename(folder)
        return
    names = sorted((file.name for file in stage.iterdir()), key=lambda name: name == last)
    (stage / _PLAN).write_text(json.dumps({"files": names, "stale": sorted(set(stale) - set(names))}))
    stage.rename(_moving(folder))
    finish(folder)


def finish(folder: Path) -> None:
    """Finishes an interrupted save, if there is one, by moving its remaining files."""
    moving = _moving(folder)
    if not (moving / _PLAN).is_file():
        return
    plan = json.loads((moving / _PLAN).read_text())
    folder.mkdir(parents=True, exist_ok=True)
    if (moving / plan["files"][-1]).exists():
        for name in (plan["files"][-1], *plan["stale"]):
            (folder / name).unlink(missing_ok=True)
    for name in plan["files"]:
        if (moving / name).exists():
            (moving / name).replace(folder / name)
    shutil.rmtree(moving)


def interrupted(folder: Path) -> str:
    """Returns advice for a folder that readers refuse because a save was interrupted; "" for any other reason."""
    moving = _moving(folder)
    if not (moving / _PLAN).is_file():
        return ""
    return (
        f"a save was interrupted while it moved its files to {folder}; the remaining files are in {moving}. "
        "Save again, or move them too"
    )


def _moving(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.moving")
