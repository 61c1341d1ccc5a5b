"""Leaves the frozen base weights of a run with adapters out of its checkpoints, and reloads them from their source.

A fingerprint of the base is stored next to the checkpoints, so that a run cannot resume from other weights.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mllm_jax.common.trees import flatten, join, partition
from mllm_jax.train.checkpoint.fingerprint import verify_frozen_weights
from mllm_jax.train.runs.config import Run
from mllm_jax.train.step.optimizer import BIAS, split

FILE = "base.json"


def saved(run: Run, params: Any) -> dict:
    """Returns the leaves that a checkpoint stores: all of them, or only those that change in a run with adapters.

    Args:
      params: a tree with the structure of the parameters.
    """
    if not run.lora.rank:
        return params
    trained, frozen = split(params, run.optim.freeze)
    return join(trained, partition(frozen, lambda path: re.search(BIAS, path))[0])


def completed(run: Run, workdir: Path, params: Any, begin: Callable[[], dict]) -> dict:
    """Returns all parameters of a run in `workdir` from the saved ones: the inverse of `saved`.

    Args:
      begin: returns the initial parameters of the run, see `mllm_jax.train.checkpoint.restore`.
    Raises:
      ConfigError: the base has changed.
    """
    if not run.lora.rank:
        return params
    initial = begin()
    note_base(run, workdir, initial, again=True)
    return join(initial, params)


def note_base(run: Run, workdir: Path, params: Any, again: bool = False) -> None:
    """Writes the fingerprint of the base into the run's folder or, if `again`, compares it with the one stored there.

    Raises ConfigError if they differ.
    """
    if not run.lora.rank:
        return
    stored, file = flatten(saved(run, params)), Path(workdir) / FILE
    base = partition(params, lambda path: path not in stored)[0]
    verify_frozen_weights(file, again, ("base", run.first_weights, base))
