"""The folder of a run: its checkpoints, its completed stages, and its small JSON files.

A run has its checkpoints below its folder; a run with stages has a folder for each of them, and PROGRESS beside them.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.common.config import ConfigError
from mllm_jax.common.errors import error_text, suggestion
from mllm_jax.common.files import write_atomically

CHECKPOINTS = "checkpoints"  # in the folder of a training run or of a stage
CONFIG = "config.json"  # the config that the run began with
PROCESSOR = "processor"  # folder of the tokenizer and the chat template
PROGRESS = "stages.json"  # in the folder of a run with stages: them in order, and the last step of those that ended
EXAMPLE = '{"stages": ["align", "instruct"], "ended": {"align": 500}}'  # what PROGRESS looks like
BEGIN_ANEW = "Put a copy of it back, or begin anew in another --workdir"  # a fix of what `read_note` refuses


def is_run(folder: str | os.PathLike) -> bool:
    """Returns whether a folder is that of a training run, of a stage, or of a run with stages."""
    return (Path(folder) / CHECKPOINTS).is_dir() or (Path(folder) / PROGRESS).is_file()


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints of a run or a stage in this folder; temporary ones have no number as their
    name."""
    return sorted(int(path.name) for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit())


def run_folder(workdir: str | Path, stage: str | None = None) -> Path:
    """The folder with the checkpoints of a run: its own, or that of a stage, by default the last completed one.

    Raises:
      ConfigError: there is no such stage. FileNotFoundError: there are stages, and none is complete.
    """
    workdir = Path(workdir)
    known = _progress(workdir)["stages"]
    if stage is not None:
        if stage not in known:
            raise ConfigError(f"{workdir} has no stage {stage!r}; {suggestion(stage, known)}")
        return workdir / stage
    if not known or (workdir / CHECKPOINTS).is_dir():
        return workdir
    if not (steps := ended(workdir)):
        begun = [str(workdir / name) for name in known if saved_steps(workdir / name)]
        raise FileNotFoundError(
            f"no stage of {workdir} has ended yet; those that have saved: {', '.join(begun) or 'none'}"
        )
    return workdir / list(steps)[-1]


def ended(workdir: str | Path) -> dict[str, int]:
    """The stages in `workdir` that came to their end, in order, with the step that each reached."""
    return _progress(Path(workdir))["ended"]


def all_ended(workdir: str | Path) -> bool:
    """Returns whether this is the folder of a run whose stages are all complete."""
    found = _progress(Path(workdir))
    return bool(found["stages"]) and set(found["ended"]) == set(found["stages"])


def note_ended(workdir: Path, order: list[str], steps: Mapping[str, int]) -> None:
    """Writes the file that `ended` reads, atomically."""
    steps = {name: steps[name] for name in order if name in steps}
    write_atomically(workdir / PROGRESS, json.dumps({"stages": order, "ended": steps}, indent=2) + "\n")


def _progress(workdir: Path) -> dict[str, Any]:
    """Reads what `note_ended` wrote; no stages if it wrote nothing. Raises ConfigError where the file is damaged."""
    path = workdir / PROGRESS
    if not path.is_file():
        return {"stages": [], "ended": {}}
    fix = f"Write into it the stages that have ended, such as {EXAMPLE}, or remove it to train all of them anew"
    return read_note(path, fix, stages=list, ended=dict)


def read_note(path: Path, fix: str, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """The content of a small JSON file of a run, an object with these fields of these types.

    Raises:
      ConfigError: it is not; the message ends with the `fix`.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error_text(error)}). {fix}") from error
    wrong = [
        name for name, kind in fields.items() if not isinstance(found, dict) or not isinstance(found.get(name), kind)
    ]
    if wrong or not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged ({', '.join(wrong) or 'no object'}). {fix}")
    return found
