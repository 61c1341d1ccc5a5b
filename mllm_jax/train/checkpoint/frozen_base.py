"""The frozen base of a run with adapters: checkpoints leave it out, and it comes again from where the run began.

So that a run never goes on from other weights, a fingerprint of the base lies beside the checkpoints.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mllm_jax.common.config import ConfigError
from mllm_jax.common.files import write_whole
from mllm_jax.common.trees import flatten, join, partition
from mllm_jax.common.workdir import BEGIN_ANEW, read_note
from mllm_jax.train.checkpoint.fingerprint import fingerprint
from mllm_jax.train.runs.config import Run
from mllm_jax.train.step.optimizer import BIAS, split

FILE = "base.json"


def saved(run: Run, params: Any) -> dict:
    """Of a tree like the parameters, what checkpoints hold: of a run with adapters what it changes, else all."""
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
    found = {"init": run.init or run.taken, "fingerprint": int(fingerprint(base))}
    if not again:
        if jax.process_index() == 0:
            write_whole(file, json.dumps(found) + "\n")
        return
    began = read_note(file, BEGIN_ANEW, fingerprint=int)
    if began["fingerprint"] != found["fingerprint"]:
        named = f"config.init={run.init!r}" if run.init else f"config.parts={run.taken}" if run.taken else ""
        source = named or f"config.train.seed={run.train.seed}"
        raise ConfigError(
            f"{workdir} began with other weights (of {began['init'] or 'config.train.seed'!r}) than {source} gives; "
            "its checkpoints hold what is trained alone: give it those weights again, or use another --workdir"
        )
