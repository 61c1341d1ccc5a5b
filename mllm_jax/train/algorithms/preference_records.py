"""What a run on pairs of answers needs beside its step: how records are read, and what answers are compared with."""

import json
from collections.abc import Iterable
from pathlib import Path

import jax
from jax.sharding import Mesh

from mllm_jax.common.config import ConfigError
from mllm_jax.common.files import whole_file, write_whole
from mllm_jax.common.workdir import BEGIN_ANEW, read_note
from mllm_jax.data.pipeline.preference import Pairs, Reference
from mllm_jax.data.pipeline.reward import Judged
from mllm_jax.data.pipeline.workers import Reading
from mllm_jax.train.algorithms.ppo_records import make_judge, prompts_of
from mllm_jax.train.checkpoint.fingerprint import fingerprint
from mllm_jax.train.checkpoint.restore import first_params
from mllm_jax.train.losses.preference import FIRST
from mllm_jax.train.runs.config import Run

FILE = "reference.json"  # in the folder of a run with a frozen copy: the fingerprint of its weights


def reading_of(run: Run) -> Reading | None:
    """How a run's records are read; None where it learns from conversations."""
    preference = run.train.preference
    if run.train.reward.learn:
        return Judged(run.train.reward.prompt)
    if run.train.ppo.reward:
        return prompts_of(run)
    if not preference.has_pairs:
        return None
    return Pairs(preference.changed, read_references(preference.reference) if preference.stored else None)


def reference_of(run: Run, mesh: Mesh, workdir: Path, resumed: bool) -> tuple:
    """What a step takes beside state and batch: a frozen copy of the first weights, the judge of PPO, or nothing.

    Checkpoints leave it out, and it comes again from where the run began. Raises ConfigError where that has changed.
    """
    preference = run.train.preference
    if run.train.ppo.reward:
        return (make_judge(run, mesh, workdir, resumed),)
    if not preference.has_pairs or preference.reference != FIRST:
        return ()
    params, file = first_params(run, mesh), Path(workdir) / FILE
    found = int(fingerprint(params))
    if not resumed:
        if jax.process_index() == 0:
            write_whole(file, json.dumps({"init": run.init, "fingerprint": found}) + "\n")
    elif read_note(file, BEGIN_ANEW, fingerprint=int)["fingerprint"] != found:
        raise ConfigError(
            f"{workdir} compared its answers with other weights than config.init={run.init!r} and "
            f"config.train.seed={run.train.seed} give now: give it those again, or use another --workdir"
        )
    return (params,)


def read_references(path: str) -> dict[str, Reference]:
    """What `write_references` wrote, by the records' ids. Raises ConfigError where it is no such file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return {item["id"]: Reference(item["mark"], tuple(item["log_probs"])) for item in found}
    except OSError as error:
        raise ConfigError(
            f"config.train.preference.reference={path!r} is neither 'base', 'first' or 'none' nor a file that can be "
            f"read ({error.strerror}); python -m mllm_jax.train.algorithms.reference writes one"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a file of python -m mllm_jax.train.algorithms.reference") from error


def write_references(path: Path, found: Iterable[tuple[str, Reference]]) -> int:
    """Writes a line of JSON for every pair of answers, the whole file or none; returns how many there are.

    Raises:
      ConfigError: two records of different answers have one id.
    """
    with whole_file(path) as file:
        marks: dict[str, int] = {}
        for name, reference in found:
            if marks.setdefault(name, reference.mark) != reference.mark:
                raise ConfigError(f"two records are called {name!r}: give each its own id")
            line = {"id": name, "mark": reference.mark, "log_probs": reference.log_probs}
            file.write(json.dumps(line) + "\n")
    return len(marks)
