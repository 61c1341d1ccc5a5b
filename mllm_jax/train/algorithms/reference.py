"""Computes the log-probabilities of a reference model once, so that a preference run need not hold that model.

    python -m mllm_jax.train.algorithms.reference --config CONFIG --output reference.jsonl
    python -m mllm_jax.train --config CONFIG --workdir DIR --config.algorithm.reference=reference.jsonl

The reference is the model that the run begins with, config.init. The file has a line for each record with a chosen and
a rejected answer: its id, the two log-probabilities, and a content hash, by which the run detects that the record, the
tokenizer, the size of the images or the weights of the tokens have changed. It runs as one process.
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

TOGETHER = 64  # records that are read concurrently
Named = tuple[str, Example]


def log_probs(
    run: Run,
    mesh: Mesh,
    leave_out: Callable[[Skipped], None],
    watch: Callable[[Sequence], Any] = lambda records: records,
) -> Iterator[tuple[str, Reference]]:
    """Yields the id of every training record, and the log-probabilities of its two answers under the initial weights.

    Args:
      leave_out: called with each record that cannot be used.
      watch: wraps the sequence of batches of records, to show progress.
    """
    params, rules = first_params(run, mesh), run.model.runtime.rules

    @jax.jit
    def answers(params, batch: Batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return answer_log_probs(run.model, params, batch, run.train.loss_chunk)[0]

    size = run.data.batch // run.train.grad_accum_steps
    for rows in _batches(_examples(run, leave_out, watch), run, size):
        batch = collate([[example for _, example in row] for row in rows], run.data.budget, **run.model.layout)
        log_probabilities = np.asarray(answers(params, jax.device_put(batch, batch_shardings(batch, mesh, rules))))
        for row, row_log_probs in zip(rows, log_probabilities):
            for pair, (name, example) in enumerate(row):
                chosen, rejected = row_log_probs[2 * pair : 2 * pair + 2].tolist()
                yield name, Reference(content_hash(example), (chosen, rejected))


def _examples(run: Run, leave_out: Callable, watch: Callable) -> Iterator[Named]:
    data = run.data
    source = data.source("train")
    sources = source.sources if isinstance(source, Mixture) else [source]
    processor = algorithm_of(run).processor()
    read = Process(processor, data.budget, data.fail_on_bad_record, Pairs(run.algorithm.diff_token_weight))
    indices = [(part, index) for part in sources for index in range(len(part))]

    def example(index_in_source: tuple[Any, int]) -> tuple[str, Example | Skipped]:
        record = SkipBadRecords(index_in_source[0], data.fail_on_bad_record)[index_in_source[1]]
        return ("", record) if isinstance(record, Skipped) else (record["id"], read(record))

    with ThreadPoolExecutor(max(data.workers, 1)) as pool:
        for start in watch(range(0, len(indices), TOGETHER)):
            for name, result in pool.map(example, indices[start : start + TOGETHER]):
                if isinstance(result, Skipped):
                    leave_out(result)
                else:
                    yield name, result


def _batches(examples: Iterator[Named], run: Run, size: int) -> Iterator[list[list[Named]]]:
    """Yields packed rows in batches of `size`. Empty rows fill the last batch."""
    packer, names, rows = Packer(run.data.budget, run.data.window), {}, []

    def take_row() -> list[Named]:
        return [(names.pop(key), example) for key, example in packer.take()]

    for key, (name, example) in enumerate(examples):
        names[key] = name
        packer.add(key, example)
        if packer.ready:
            rows.append(take_row())
        if len(rows) == size:
            yield rows
            rows = []
    while len(packer):
        rows.append(take_row())
        if len(rows) == size:
            yield rows
            rows = []
    if rows:
        yield rows + [[]] * (size - len(rows))


def main() -> None:
    run, output, left_out = read_run(one_run(CONFIG.value, STAGE.value)), Path(OUTPUT.value), []
    if not isinstance(run.algorithm, PreferenceConfig):
        raise ConfigError(f"config.algorithm.type={type(run.algorithm).__name__}: must be PreferenceConfig.")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output={output}: its folder does not exist. Create {output.parent}.")
    console = Console(stderr=True)
    watch = lambda records: track(records, "reading pairs", console=console, disable=not console.is_terminal)
    num_pairs = write_references(output, log_probs(run, make_mesh(run.mesh), left_out.append, watch))
    for skipped in left_out[:20]:
        print(f"left out: {skipped.message}", file=sys.stderr)
    print(f"{output}: {num_pairs:,} pairs" + (f"; {len(left_out)} records left out" if left_out else ""))


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file(
        "config", None, "Config of the preference run: a Python file with get_config."
    )
    STAGE = flags.DEFINE_string("stage", None, "Stage that trains on pairs, if the config has stages.")
    OUTPUT = flags.DEFINE_string("output", None, "File to write.")
    flags.mark_flags_as_required(["config", "output"])
    command.run(main)
