"""Finds the number of steps of a run that lasts `config.data.epochs`, with `config.optim.steps=0`.

Conversations are packed, so their number does not determine the number of steps. The schedule needs it before the run
begins, so the run first packs a sample of its records as it will train on them. Checkpoints store the result, so that a
resumed run keeps its schedule.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import NormalDist
from typing import NamedTuple

import jax
import numpy as np

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline import loader as loaders
from mllm_jax.data.pipeline.dual_processor import DualProcessor
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.train.algorithms import algorithm_of
from mllm_jax.train.checkpoint.manager import from_all_processes
from mllm_jax.train.input.pipeline import loader_of
from mllm_jax.train.monitor.processes import meet
from mllm_jax.train.runs.config import Run, updates_of
from mllm_jax.train.step.optimizer import make_schedule

SAMPLE = 4096  # number of records packed to estimate the length, which is exact for smaller data sets
LIFE_SIGN = 10  # seconds between two progress lines
PATIENCE = 3600  # seconds that other processes wait for the first one, which packs the sample
EMPTY = "config.data: there are no records. Set other data."


class StoppedEarly(Exception):
    """The run was asked to stop before it began."""


class DataEnded(ConfigError):
    """The data end before `config.optim.steps`. Every process of the run raises it."""


class Length(NamedTuple):
    """Number of updates in `epochs` passes over the data, estimated from `sampled` of `records`."""

    epochs: int
    updates: int
    sampled: int
    records: int  # number of records in all passes


def find_length(
    run: Run, processor: Processor | DualProcessor, noted: Mapping[str, int] | None, stopped: Callable[[], bool]
) -> Length | None:
    """Returns the length of a run, equal on all processes. None: `optim.steps` sets it.

    The first process packs a sample, and all processes use its result.

    Args:
      noted: a Length as a dict, from a checkpoint of the run. It is used unless `data.epochs` has changed.
      stopped: returns whether the run was asked to stop.
    Raises:
      StoppedEarly: the run was asked to stop. DataEnded: the data end before the first update or within the warmup.
        BadData: too many records are broken, see `make_loader`.
    """
    if run.optim.steps:
        return None
    if noted and noted["epochs"] == run.data.epochs:
        return Length(**noted)
    length = _counted(run, processor, stopped)._asdict() if jax.process_index() == 0 else {}
    meet(PATIENCE)
    length = Length(**from_all_processes(length)[0])
    if not length.updates:
        raise DataEnded(EMPTY)
    if run.optim.warmup > length.updates:
        raise DataEnded(
            f"config.optim.warmup={run.optim.warmup}: longer than the run, which has {_text_of(length)}. Set at most "
            f"{length.updates}, such as {length.updates // 20}."
        )
    return length


def with_length(run: Run, length: Length | None) -> Run:
    """Returns the run with `optim.steps` set to the updates of the length. None: the run itself."""
    if length is None:
        return run
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, steps=length.updates))


def count_updates(
    loader: Iterator, epochs: int, sample: int = SAMPLE, progress: Callable[[int, int], None] = lambda done, of: None
) -> Length:
    """Counts the batches of a new loader of all streams, which makes `epochs` passes.

    After `sample` packed records, the number for the remaining ones is extrapolated in three steps:

    - Batches for the records read so far: the current ones, plus rows for waiting records, filled as the rows so far.
    - Mean for all records: the same number of batches per record.
    - The last stream determines the end. Streams have equally many records, of different lengths: over n times as many
      records, the standard deviation of their batches is sqrt(n) times as large. The end is the expected maximum over
      the streams.

    Example: 4096 of 409,600 records in 100 batches have the mean 10,000. If the packed records per stream deviate by
    10 % of their mean, 64 streams end after 10,000 * (1 + 2.34 * 0.1 * sqrt(4096 / 409,600)) = 10,234 batches.

    Args:
      progress: called after every batch with the number of packed records and their total.
    """
    batches, records, fill = 0, 0, np.zeros(2)
    for batches, (batch, info) in enumerate(loader, 1):
        state = loader.get_state()
        streams, records = state["streams"].values(), epochs * sum(state["data"]["records"])
        drawn = np.array([sum(stream["drawn"]) for stream in streams])
        packed = drawn - [len(stream["waiting"]) for stream in streams]
        fill += info.fill["tokens"], info.fill["patches"] if batch.vision is not None else 0
        progress(packed.sum(), records)
        if sample <= packed.sum() < records:
            waiting = info.waiting / (fill.max() / batches) * len(drawn) / state["data"]["rows"]  # number of batches
            mean = (batches + waiting) / drawn.sum() * records
            end = mean * (1 + _largest(len(drawn)) * _deviation(packed) * math.sqrt(packed.sum() / records))
            return Length(epochs, math.ceil(end), int(packed.sum()), records)
    return Length(epochs, batches, records, records)


def _deviation(packed: np.ndarray) -> float:
    """Returns the standard deviation over the streams relative to the mean."""
    return packed.std(ddof=1) / packed.mean() if len(packed) > 1 else 0.0


def _largest(count: int) -> float:
    """Returns the expected maximum of `count` standard normal numbers (Blom's approximation)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def _counted(run: Run, processor: Processor | DualProcessor, stopped: Callable[[], bool]) -> Length:
    began = last_line = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last_line
        if stopped():
            _print("asked to stop: nothing is trained yet, and the same command begins anew")
            raise StoppedEarly
        if time.monotonic() - last_line > LIFE_SIGN:
            last_line = time.monotonic()
            _print(
                f"packed {done:,} of {min(total, SAMPLE):,} records to find the length of the run, "
                f"{last_line - began:.0f} s"
            )

    _print(f"packing {SAMPLE:,} records, or all, to find the length of config.data.epochs={run.data.epochs}")
    loader = loader_of(run.data, processor, algorithm_of(run).reading())
    try:
        with _quiet(loaders.log):  # training will report the records that are left out
            length = count_updates(loader, run.data.epochs, progress=progress)
    finally:
        loader.close()
    _print(f"the run has {_text_of(length)}, found in {time.monotonic() - began:.0f} s")
    return length


def check_end(run: Run, step: int) -> None:
    """Raises DataEnded if a run that ended at `step` has fewer than `optim.steps` steps."""
    data, optim = run.data, updates_of(run)
    if step >= run.optim.steps:
        return
    if not step:
        raise DataEnded(EMPTY)
    schedule = make_schedule(dataclasses.replace(optim, learning_rate=1.0))
    rate = float(schedule(step * (optim.steps // run.optim.steps) - 1))
    epochs = 2 * math.ceil(run.optim.steps * data.epochs / step)  # doubled, because the last batches were not full
    raise DataEnded(
        f"config.data.epochs={data.epochs}: the data ended at step {step} of config.optim.steps={run.optim.steps}, "
        f"where the learning rate is {rate:.0%} of its peak. The step is saved. Set config.data.epochs={epochs} to "
        "continue to the last step, or config.optim.steps=0 and another --workdir for a schedule that ends with the "
        "data."
    )


def _text_of(length: Length) -> str:
    prefix, method = "", f"counted, {length.records:,} records"
    if length.sampled < length.records:
        prefix, method = "about ", f"estimated by {length.sampled:,} of {length.records:,} records"
    return f"{prefix}{length.updates:,} updates (config.data.epochs={length.epochs}, {method})"


def _print(text: str) -> None:
    print(text, flush=True)


@contextmanager
def _quiet(log: logging.Logger) -> Iterator[None]:
    """Silences a logger."""
    reject = lambda record: False
    log.addFilter(reject)
    try:
        yield
    finally:
        log.removeFilter(reject)
