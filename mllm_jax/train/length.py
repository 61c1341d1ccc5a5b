"""The length of a run that lasts as long as its data: `config.optim.steps=0` and `config.data.epochs`.

Conversations are packed, so that their number alone does not give the number of updates. The schedule needs it before
the run begins, so the run packs a sample of its records as it will train on them. Checkpoints store the number, so that
a resumed run keeps its schedule.
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

SAMPLE = 4096  # number of records packed to estimate the length, which is exact for smaller sets
LIFE_SIGN = 10  # seconds between two lines on how far it is
PATIENCE = 3600  # seconds that the other processes wait for the first one, which reads the sample
EMPTY = "config.data: there are no records. Name others"


class StoppedEarly(Exception):
    """The run was asked to stop before it began."""


class DataEnded(ConfigError):
    """The data end before the steps that the config asks for. Every process of the run raises it."""


class Length(NamedTuple):
    """Updates that `epochs` passes over the data make; `sampled` of `records` were packed to find it."""

    epochs: int
    updates: int
    sampled: int
    records: int  # of all passes


def find_length(
    run: Run, processor: Processor | DualProcessor, noted: Mapping[str, int] | None, stopped: Callable[[], bool]
) -> Length | None:
    """Returns the length of a run that lasts as long as its data, equal on all processes. None: `optim.steps` sets it.

    The first process packs a sample, and all use its result.

    Args:
      noted: a Length as a dict, from a checkpoint of the run. It is used unless `data.epochs` was changed.
      stopped: returns whether the run was asked to stop.
    Raises:
      StoppedEarly: the run was asked to stop. DataEnded: the data end before the first update or within the warm-up.
        BadData: see loader.
    """
    if run.optim.steps:
        return None
    if noted and noted["epochs"] == run.data.epochs:
        return Length(**noted)
    found = _counted(run, processor, stopped)._asdict() if jax.process_index() == 0 else {}
    meet(PATIENCE)
    found = Length(**from_all_processes(found)[0])
    if not found.updates:
        raise DataEnded(EMPTY)
    if run.optim.warmup > found.updates:
        raise DataEnded(
            f"config.optim.warmup={run.optim.warmup}: longer than the run, which has {_said(found)}. Set at most "
            f"{found.updates}, such as {found.updates // 20}"
        )
    return found


def with_length(run: Run, length: Length | None) -> Run:
    """The run, whose `optim.steps` are the updates that were found."""
    if length is None:
        return run
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, steps=length.updates))


def count_updates(
    loader: Iterator, epochs: int, sample: int = SAMPLE, progress: Callable[[int, int], None] = lambda done, of: None
) -> Length:
    """Counts the batches of a new loader of all streams, which makes `epochs` passes.

    Once `sample` records are packed and more are left, the rest is extrapolated in three steps:

    - The records read so far fill the current batches, and waiting ones will fill rows as full as these.
    - The number of batches per record is the mean over all streams.
    - The run ends with its last stream. Streams have equally many records, but not equally long ones: over n times as
    many
      records the deviation of their batches is sqrt(n) times as large, and the expected largest of S is known.

    Args:
      progress: receives, after every batch, the number of packed records and their total.
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
            waiting = info.waiting / (fill.max() / batches) * len(drawn) / state["data"]["rows"]  # in batches
            mean = (batches + waiting) / drawn.sum() * records
            last = mean * (1 + _largest(len(drawn)) * _deviation(packed) * math.sqrt(packed.sum() / records))
            return Length(epochs, math.ceil(last), int(packed.sum()), records)
    return Length(epochs, batches, records, records)


def _deviation(packed: np.ndarray) -> float:
    """Standard deviation over the streams, as a share of the mean."""
    return packed.std(ddof=1) / packed.mean() if len(packed) > 1 else 0.0


def _largest(count: int) -> float:
    """Expected largest of `count` numbers of a standard normal distribution (Blom's approximation)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def _counted(run: Run, processor: Processor | DualProcessor, stopped: Callable[[], bool]) -> Length:
    began = told = time.monotonic()

    def progress(done: int, of: int) -> None:
        nonlocal told
        if stopped():
            _say("asked to stop: nothing is trained yet, and the same command begins anew")
            raise StoppedEarly
        if time.monotonic() - told > LIFE_SIGN:
            told = time.monotonic()
            _say(f"packed {done:,} of {min(of, SAMPLE):,} records to find the length of the run, {told - began:.0f} s")

    _say(f"packing {SAMPLE:,} records, or all, to find the length of config.data.epochs={run.data.epochs}")
    loader = loader_of(run.data, processor, algorithm_of(run).reading())
    try:
        with _quiet(loaders.log):  # training will report the records that are left out
            found = count_updates(loader, run.data.epochs, progress=progress)
    finally:
        loader.close()
    _say(f"the run has {_said(found)}, found in {time.monotonic() - began:.0f} s")
    return found


def check_end(run: Run, step: int) -> None:
    """Raises DataEnded where a run that has ended at `step` was to take more steps."""
    data, optim = run.data, updates_of(run)
    if step >= run.optim.steps:
        return
    if not step:
        raise DataEnded(EMPTY)
    schedule = make_schedule(dataclasses.replace(optim, learning_rate=1.0))
    rate = float(schedule(step * (optim.steps // run.optim.steps) - 1))
    enough = 2 * math.ceil(run.optim.steps * data.epochs / step)  # twice, as the last batches of the data were not full
    raise DataEnded(
        f"config.data.epochs={data.epochs}: the data ended at step {step} of config.optim.steps={run.optim.steps}, "
        f"where the learning rate is {rate:.0%} of its peak. The step is saved. Set config.data.epochs={enough} to go "
        "on from it to the last, or config.optim.steps=0 and another --workdir for a schedule that ends with the data"
    )


def _said(length: Length) -> str:
    about, how = "", f"counted, {length.records:,} records"
    if length.sampled < length.records:
        about, how = "about ", f"estimated by {length.sampled:,} of {length.records:,} records"
    return f"{about}{length.updates:,} updates (config.data.epochs={length.epochs}, {how})"


def _say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def _quiet(log: logging.Logger) -> Iterator[None]:
    """Silences a log."""
    nothing = lambda record: False
    log.addFilter(nothing)
    try:
        yield
    finally:
        log.removeFilter(nothing)
