"""Computes once what a reference model thinks of pairs of answers, so that a preference run need not hold that model.

    python -m mllm_jax.train.algorithms.reference --config CONFIG --output reference.jsonl
    python -m mllm_jax.train --config CONFIG --workdir DIR --config.algorithm.reference=reference.jsonl

The model is that with which the run begins, config.init. The file has a line for each record with a chosen and a
rejected answer: its id, the two log-probabilities, and a number by which the run notices that the record, its
tokenizer, the size of its images or the weights of its tokens are no longer the same. It runs as one process.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags
from rich.console import Console
from rich.progress import track

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.packing import Packer, collate
from mllm_jax.data.pipeline.preference import Pairs, Reference, content_hash
from mllm_jax.data.pipeline.workers import Process, SkipBadRecords, Skipped
from mllm_jax.data.sources.mixture import Mixture
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms import algorithm_of
from mllm_jax.train.algorithms.stored_references import write_references
from mllm_jax.train.checkpoint.restore import first_params
from mllm_jax.train.losses.preference import PreferenceConfig
from mllm_jax.train.runs import command
from mllm_jax.train.runs.config import Run, read_run
from mllm_jax.train.runs.stages import one_run
from mllm_jax.train.step.batches import batch_shardings
from mllm_jax.train.step.forward import answer_log_probs
from mllm_jax.types import Batch, Example

TOGETHER = 64  # records that are read at once
Named = tuple[str, Example]


def log_probs(
    run: Run,
    mesh: Mesh,
    leave_out: Callable[[Skipped], None],
    watch: Callable[[Sequence], Any] = lambda records: records,
) -> Iterator[tuple[str, Reference]]:
    """Yields the id of every record of a run's training data, and the log-probabilities of its two answers at first.

    Args:
      leave_out: receives records that cannot be used.
      watch: passes on the indices of records as they are begun.
    """
    params, rules = first_params(run, mesh), run.model.runtime.rules

    @jax.jit
    def answers(params, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return answer_log_probs(run.model, params, batch, run.train.loss_chunk)[0]

    size = run.data.batch // run.train.grad_accum_steps
    for rows in _batches(_examples(run, leave_out, watch), run, size):
        batch = collate([[example for _, example in row] for row in rows], run.data.budget, **run.model.layout)
        found = np.asarray(answers(params, jax.device_put(batch, batch_shardings(batch, mesh, rules))))
        for row, values in zip(rows, found):
            for number, (name, example) in enumerate(row):
                chosen, rejected = values[2 * number : 2 * number + 2].tolist()
                yield name, Reference(content_hash(example), (chosen, rejected))


def _examples(run: Run, leave_out: Callable, watch: Callable) -> Iterator[Named]:
    data = run.data
    source = data.source("train")
    sources = source.sources if isinstance(source, Mixture) else [source]
    processor = algorithm_of(run).processor()
    read = Process(processor, data.budget, data.fail_on_bad_record, Pairs(run.algorithm.diff_token_weight))
    places = [(one, index) for one in sources for index in range(len(one))]

    def example(place: tuple[Any, int]) -> tuple[str, Example | Skipped]:
        record = SkipBadRecords(place[0], data.fail_on_bad_record)[place[1]]
        return ("", record) if isinstance(record, Skipped) else (record["id"], read(record))

    with ThreadPoolExecutor(max(data.workers, 1)) as pool:
        for start in watch(range(0, len(places), TOGETHER)):
            for name, found in pool.map(example, places[start : start + TOGETHER]):
                if isinstance(found, Skipped):
                    leave_out(found)
                else:
                    yield name, found


def _batches(examples: Iterator[Named], run: Run, size: int) -> Iterator[list[list[Named]]]:
    """Full rows, in batches; the last one is filled up with empty rows."""
    packer, names, rows = Packer(run.data.budget, run.data.window), {}, []

    def take() -> list[Named]:
        return [(names.pop(key), example) for key, example in packer.take()]

    for key, (name, example) in enumerate(examples):
        names[key] = name
        packer.add(key, example)
        if packer.ready:
            rows.append(take())
        if len(rows) == size:
            yield rows
            rows = []
    while len(packer):
        rows.append(take())
        if len(rows) == size:
            yield rows
            rows = []
    if rows:
        yield rows + [[]] * (size - len(rows))


def main() -> None:
    run, output, left_out = read_run(one_run(CONFIG.value, STAGE.value)), Path(OUTPUT.value), []
    if not isinstance(run.algorithm, PreferenceConfig):
        raise ConfigError(f"config.algorithm.type={type(run.algorithm).__name__}: must be PreferenceConfig")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output={output} is in a folder that does not exist")
    console = Console(stderr=True)
    watch = lambda records: track(records, "reading pairs", console=console, disable=not console.is_terminal)
    written = write_references(output, log_probs(run, make_mesh(run.mesh), left_out.append, watch))
    for skipped in left_out[:20]:
        print(f"left out: {skipped.message}", file=sys.stderr)
    print(f"{output}: {written:,} pairs" + (f"; {len(left_out)} records left out" if left_out else ""))


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file(
        "config", None, "Config of the preference run: a Python file with get_config."
    )
    STAGE = flags.DEFINE_string("stage", None, "Stage that trains on pairs, of a config with stages.")
    OUTPUT = flags.DEFINE_string("output", None, "File to write.")
    flags.mark_flags_as_required(["config", "output"])
    command.run(main)
