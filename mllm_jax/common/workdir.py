"""Folder of a run: its checkpoints, completed stages and small JSON files.

A run has its checkpoints in its folder; a run with stages has a folder for each stage, and the file PROGRESS.
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
CONFIG = "config.json"  # config with which the run started
PROCESSOR = "processor"  # folder of the tokenizer and the chat template
PROGRESS = "stages.json"  # in the folder of a run with stages: the stages in order, and the last step of completed ones
EXAMPLE = '{"stages": ["align", "instruct"], "ended": {"align": 500}}'  # example of PROGRESS
BEGIN_ANEW = "Put a copy of it back, or begin anew in another --workdir"  # fix for errors of `read_note`


def is_run(folder: str | os.PathLike) -> bool:
    """Returns whether a folder belongs to a training run, a stage, or a run with stages."""
    return (Path(folder) / CHECKPOINTS).is_dir() or (Path(folder) / PROGRESS).is_file()


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a run or stage. Temporary checkpoints have other names."""
    return sorted(int(path.name) for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit())


def run_folder(workdir: str | Path, stage: str | None = None) -> Path:
    """Returns the folder with the checkpoints of a run, or of a stage (default: the last completed one).

    Raises:
      ConfigError: there is no such stage.
      FileNotFoundError: the run has stages, but none is complete.
    """
    workdir = Path(workdir)
    stages = _progress(workdir)["stages"]
    if stage is not None:
        if stage not in stages:
            raise ConfigError(f"{workdir} has no stage {stage!r}; {suggestion(stage, stages)}")
        return workdir / stage
    if not stages or (workdir / CHECKPOINTS).is_dir():
        return workdir
    if not (steps := ended(workdir)):
        saved = [str(workdir / name) for name in stages if saved_steps(workdir / name)]
        raise FileNotFoundError(
            f"{workdir}: no stage is complete yet. Wait, or name a stage with checkpoints: {', '.join(saved) or 'none'}"
        )
    return workdir / list(steps)[-1]


def ended(workdir: str | Path) -> dict[str, int]:
    """Returns the completed stages of `workdir` in order, with the last step of each."""
    return _progress(Path(workdir))["ended"]


def all_ended(workdir: str | Path) -> bool:
    """Returns whether `workdir` is the folder of a run with stages, all of them complete."""
    progress = _progress(Path(workdir))
    return bool(progress["stages"]) and set(progress["ended"]) == set(progress["stages"])


def note_ended(workdir: Path, order: list[str], steps: Mapping[str, int]) -> None:
    """Writes the stages in order, and the last step of completed ones, to the file that `ended` reads."""
    steps = {name: steps[name] for name in order if name in steps}
    write_atomically(workdir / PROGRESS, json.dumps({"stages": order, "ended": steps}, indent=2) + "\n")


def _progress(workdir: Path) -> dict[str, Any]:
    """Reads the file of `note_ended`; no stages if it does not exist. Raises ConfigError if it is damaged."""
    path = workdir / PROGRESS
    if not path.is_file():
        return {"stages": [], "ended": {}}
    fix = f"Write into it the stages that have ended, such as {EXAMPLE}, or remove it to train all of them anew"
    return read_note(path, fix, stages=list, ended=dict)


def read_note(path: Path, fix: str, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """Returns the object in a small JSON file of a run.

    Args:
      fix: sentence with which an error ends.
      fields: types of required fields.
    Raises:
      ConfigError: the file is damaged, or a field is missing or has another type.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error_text(error)}). {fix}") from error
    wrong = [
        name
        for name, kind in fields.items()
        if not isinstance(content, dict) or not isinstance(content.get(name), kind)
    ]
    if wrong or not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged ({', '.join(wrong) or 'no object'}). {fix}")
    return content
