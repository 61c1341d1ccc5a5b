"""Base class of evaluators, which measure a run on held-out records during training."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from mllm_jax.data.pipeline.loader import Info, make_loader
from mllm_jax.data.pipeline.workers import Reading
from mllm_jax.train.monitor.processes import compiled_together
from mllm_jax.train.runs.config import Run
from mllm_jax.train.runs.data import DataConfig
from mllm_jax.train.step.batches import batch_shardings


class Evaluator:
    """Evaluates parameters on the same records every time, in batches of the shape of training.

    A subclass defines the step, the initial totals, how a batch is added to them, and the results.
    """

    reading: Reading | None = None  # see `make_loader`

    def __init__(self, run: Run, processor: Any, mesh: Mesh, source: Any):
        self.run, self.processor, self.mesh = run, processor, mesh
        self.source = Spread(source, run.train.num_eval_examples)
        self._step = compiled_together(self.make_step())

    def __call__(self, params: Any, after_batch: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Returns the results by name, such as {"loss": 1.5}. after_batch: called after each batch."""
        totals = self.no_records()
        rows = self.run.data.batch // self.run.train.grad_accum_steps
        for batch, info in batches(self.source, self.processor, self.run.data, rows, self.reading):
            self.add(totals, jax.device_get(self._step(params, placed(batch, self.shardings(batch)))), batch, info)
            after_batch()
        return self.results(totals)

    def shardings(self, batch: Any) -> Any:
        """Returns the NamedSharding of every array of a batch."""
        return batch_shardings(batch, self.mesh, self.run.model.runtime.rules)

    def make_step(self) -> Callable[[Any, Any], Any]:
        """Returns a jitted `step(params, batch)`, whose replicated results `add` receives."""
        raise NotImplementedError

    def no_records(self) -> Any:
        """Returns the initial totals, which `add` updates in place."""
        raise NotImplementedError

    def add(self, totals: Any, found: Any, batch: Any, info: Info) -> None:
        """Adds a batch to the totals. found: results of its step, on the host."""
        raise NotImplementedError

    def results(self, totals: Any) -> dict[str, Any]:
        """Returns the results by name."""
        raise NotImplementedError


class Spread:
    """Selects `count` records at even distances from a source, or all if it has fewer."""

    def __init__(self, source: Any, count: int):
        self.source, self.count = source, min(count, len(source))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.source[index * len(self.source) // self.count]


def placed(batch: Any, layout: Any) -> Any:
    """Puts a batch, which every process has in full, on the devices. Each process transfers its own shards."""
    place = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return jax.tree.map(place, batch, layout)


def shares(right: Mapping[str, int], asked: Mapping[str, int]) -> dict[str, float]:
    """Returns the fraction of right answers per kind and, as "all", over all kinds."""
    by_kind = {kind or "other": right[kind] / asked[kind] for kind in sorted(asked)}
    return {"all": sum(right.values()) / max(sum(asked.values()), 1), **by_kind}


def batches(
    source: Any, processor: Any, data: DataConfig, rows: int, reading: Reading | None = None
) -> Iterator[tuple[Any, Info]]:
    """Yields all records of a source once, in batches of the shape of training. reading: see `make_loader`."""
    loader = make_loader(
        source,
        processor,
        data.budget,
        rows,
        shuffle=False,
        epochs=1,
        window=data.window,
        workers=data.workers,
        prefetch=1,
        max_bad_fraction=1.0,
        reading=reading,
    )
    try:
        yield from loader
    finally:
        loader.close()
