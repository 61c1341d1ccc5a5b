"""Inspects the data of a run, packed as in training: statistics as tables and as an HTML page."""

import collections
import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Group
from rich.table import Table

from mllm_jax.common.cli import cell
from mllm_jax.common.config import ConfigError
from mllm_jax.common.format import percent, short
from mllm_jax.data.pipeline import loader
from mllm_jax.data.sources.mixture import Mixture
from mllm_jax.data.tools.inspection import Inspection
from mllm_jax.data.tools.inspection_page import write_inspection
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.train.algorithms import algorithm_of
from mllm_jax.train.input.pipeline import loader_of
from mllm_jax.train.runs.config import Run
from mllm_jax.train.runs.data import DataConfig
from mllm_jax.train.runs.data_files import MixtureData

COUNTS = ("left_out", "noted")  # counters in the state of a stream
NAMED = 50  # largest number of left-out records that are listed per reason


class Found(NamedTuple):
    """Results of an inspection."""

    data: DataConfig
    inspection: Inspection
    records: int  # number of records read, including broken ones and those that wait to be packed
    total: int | None  # number of records of the run. None: a mixture, which has no end
    left_out: dict[str, int]  # number of left-out records by reason
    named: dict[str, list[str]]  # messages for the first left-out records, by reason
    noted: dict[str, int]  # number of records read in part, by the omitted content
    sources: list[dict[str, Any]]  # sources of a mixture: name, records, fractions `weight` and `drawn`


def inspect(run: Run, count: int, progress: Callable[[int], None] = lambda num_done: None) -> Found:
    """Packs at least `count` records, or all, as the run does from its start. Reads each record once.

    Args:
      progress: called with the number of records packed or left out.

    Raises:
      ConfigError: the data or the processor cannot be opened, or the model is a dual encoder. BadData: no record is
        usable.
    """
    if not isinstance(run.model, ModelConfig):
        raise ConfigError(
            "config.model.type=DualConfig: its data cannot be inspected. Use a config with a ModelConfig."
        )
    algorithm = algorithm_of(run)
    processor = algorithm.processor()
    is_mixture = isinstance(run.data, MixtureData)
    source = run.data.source()
    total = sum(map(len, source.sources)) if is_mixture else len(source)
    data = dataclasses.replace(
        run.data, epochs=None if is_mixture else 1, fail_on_bad_record=False, max_bad_fraction=1.0
    )
    inspection = Inspection(processor)
    with _CollectMessages(loader.log) as named:
        batches = loader_of(data, processor, algorithm.reading())
        try:
            while True:
                batch, info = next(batches)
                totals = _read(batches.get_state())
                ended = not is_mixture and sum(totals.drawn) >= total
                inspection.add(batch, info, whole=not ended)
                num_done = len(inspection.tokens) + totals.left_out.total()
                progress(num_done)
                if num_done >= count and not ended:
                    break
        except StopIteration as end:
            totals = _read(end.value)
        except loader.BadData as error:
            raise loader.BadData("; ".join([str(error), *itertools.chain(*named.values())][:4])) from error
        finally:
            batches.close()
    left_out, noted = dict(totals.left_out.most_common()), dict(totals.noted.most_common())
    named = {reason: named[reason][:number] for reason, number in left_out.items()}  # without records read ahead
    sources = _sources(run.data, source, totals.drawn) if is_mixture else []
    num_records = None if is_mixture else total
    return Found(data, inspection, int(sum(totals.drawn)), num_records, left_out, named, noted, sources)


class _Read(NamedTuple):
    """Totals over all streams of a loader."""

    drawn: np.ndarray  # i64[sources] number of records
    left_out: collections.Counter[str]  # number of records by reason
    noted: collections.Counter[str]  # number of records by the omitted content


def _read(state: Mapping[str, Any]) -> _Read:
    streams = state["streams"].values()
    counts = (sum((collections.Counter(stream[name]) for stream in streams), collections.Counter()) for name in COUNTS)
    return _Read(np.sum([stream["drawn"] for stream in streams], axis=0), *counts)


class _CollectMessages(logging.Handler):
    """Collects the log messages on left-out records, by reason, instead of printing them."""

    def __init__(self, log: logging.Logger):
        super().__init__()
        self.log, self.messages = log, collections.defaultdict(list)

    def emit(self, record: logging.LogRecord) -> None:
        reason = getattr(record, "reason", None)
        if reason is not None and len(self.messages[reason]) < NAMED:
            self.messages[reason].append(str(record.args[0]))

    def __enter__(self) -> dict[str, list[str]]:
        self.log.addHandler(self)
        self.log.propagate = False
        return self.messages

    def __exit__(self, *_) -> None:
        self.log.removeHandler(self)
        self.log.propagate = True


def _sources(data: MixtureData, mixture: Mixture, drawn: np.ndarray) -> list[dict[str, Any]]:
    weights, sizes = np.array(mixture.weights[0]), map(len, mixture.sources)
    shares = zip(data.sources, sizes, weights / weights.sum(), drawn / max(drawn.sum(), 1))
    return [
        {"name": name, "records": size, "weight": weight, "drawn": fraction} for name, size, weight, fraction in shares
    ]


def facts(found: Found) -> dict[str, str]:
    """Returns the summary, name -> text."""
    seen, data = found.inspection, found.data
    tokens, visual, learned = (sum(values) for values in (seen.tokens, seen.visual, seen.learned))
    fill = {name: np.mean([batch[name] for batch in seen.fill]) for name in seen.fill[0]} if seen.fill else {}
    slots = {"images of a patch row": f"{data.images_per_row}", "fill of images": percent(fill.get("images"))}
    return {
        "records read": f"{found.records:,}{_of_all(found)}",
        "left out": f"{sum(found.left_out.values()):,}",
        "conversations packed": f"{len(seen.tokens):,}",
        "images": f"{seen.sizes.total():,}",
        "tokens of a row": f"{data.budget.tokens:,}",
        "patches of a row": f"{data.budget.patch_rows} × {data.patches_per_row:,}" if data.budget.patch_rows else "–",
        "fill of tokens": percent(fill.get("tokens")),
        "fill of patches": percent(fill.get("patches")) if data.budget.patch_rows else "–",
        **(slots if "images" in fill else {}),
        "visual tokens": percent(visual / max(tokens, 1)),
        "learned tokens": percent(learned / max(tokens, 1)),
    }


def _of_all(found: Found) -> str:
    if found.total is None:
        return ""
    return ", all of them" if found.records >= found.total else f" of {found.total:,}"


def tables(found: Found) -> Group:
    """Returns all statistics, without images, as tables for the terminal."""
    seen = found.inspection
    summary = _table("", "")
    for name, text in facts(found).items():
        summary.add_row(name, cell(text))
    lengths = _table("of a conversation", "least", "median", "mean", "95 %", "most")
    columns = {"tokens": seen.tokens, "visual": seen.visual, "learned": seen.learned, "images": seen.images}
    for name, values in columns.items():
        if values:
            statistics = (np.min(values), np.median(values), np.mean(values), np.percentile(values, 95), np.max(values))
            lengths.add_row(name, *(short(float(value)) for value in statistics))
    parts = [summary, lengths]
    if found.sources:
        sources = _table("source", "records", "weight", "drawn")
        for source in found.sources:
            shares = percent(source["weight"]), percent(source["drawn"])
            sources.add_row(cell(source["name"]), f"{source['records']:,}", *shares)
        parts.append(sources)
    if len(seen.kinds) > 1:
        kinds = _table("kind", "conversations")
        for kind, number in seen.kinds.most_common():
            kinds.add_row(cell(kind or "other"), f"{number:,}")
        parts.append(kinds)
    if found.left_out:
        parts.append(_left_out(found.left_out, found.named))
    if found.noted:
        noted = _table("read in part", "records")
        for note, number in found.noted.items():
            noted.add_row(cell(note), f"{number:,}")
        parts.append(noted)
    return Group(*(part for table in parts for part in (table, "")))


def _left_out(left_out: Mapping[str, int], named: Mapping[str, Sequence[str]]) -> Table:
    table = _table("left out", "records", "as")
    table.columns[2].justify = "left"
    for reason, number in left_out.items():
        table.add_row(reason, f"{number:,}", cell(next(iter(named.get(reason, ())), "")))
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", show_header=any(names))
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    return table


def write_page(path: str | os.PathLike, title: str, found: Found) -> Path:
    """Writes the HTML page and returns its path."""
    selection = (
        "All records"
        if found.records == found.total
        else f"The first {found.records:,} records in the order of training"
    )
    return write_inspection(
        path,
        found.inspection,
        title=title,
        lead=f"{selection}, packed as training packs them.",
        facts=facts(found),
        sources=found.sources,
        left_out=found.left_out,
        named=[line for reason in found.left_out for line in found.named.get(reason, ())],
        noted=found.noted,
    )
