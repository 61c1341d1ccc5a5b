"""The frozen base weights of a run with adapters, which checkpoints leave out.

A resumed run reads them again from where the run began. A fingerprint beside the checkpoints verifies them.
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
    """Returns the leaves that a checkpoint stores: all of them, or only the trained ones when the run uses adapters.

    params: the parameters, or any tree of their structure.
    """
    if not run.lora.rank:
        return params
    trained, frozen = split(params, run.optim.freeze)
    return join(trained, partition(frozen, lambda path: re.search(BIAS, path))[0])


def completed(run: Run, workdir: Path, params: Any, begin: Callable[[], dict]) -> dict:
    """The inverse of `saved` for a run in `workdir`. Raises ConfigError where the base is no longer the same.

    begin: gives the parameters that the run begins with, see `mllm_jax.train.checkpoint.restore`.
    """
    if not run.lora.rank:
        return params
    whole = begin()
    note_base(run, workdir, whole, again=True)
    return join(whole, params)


def note_base(run: Run, workdir: Path, params: Any, again: bool = False) -> None:
    """Writes the fingerprint of the base into the run's folder, or compares it with that which is there."""
    if not run.lora.rank:
        return
    kept, file = flatten(saved(run, params)), Path(workdir) / FILE
    base = partition(params, lambda path: path not in kept)[0]
    verify_frozen_weights(file, again, ("base", run.first_weights, base))
