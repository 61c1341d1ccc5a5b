"""Exact match on held-out conversations, by kind of question, while a model is trained.

One forward pass answers what greedy decoding would say: it repeats the true answer exactly, token by token, if and only
if every token of the answer is the likeliest one given the truth before it.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mllm_jax.data.pipeline.loader import Info, make_loader
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.workers import Reading
from mllm_jax.train.monitor.processes import compiled_together
from mllm_jax.train.runs.config import Run
from mllm_jax.train.runs.data import DataConfig
from mllm_jax.train.step.train_step import batch_shardings, make_eval_step


class Spread:
    """`count` records of a source, evenly spread over it; all where it has fewer."""

    def __init__(self, source: Any, count: int):
        self.source, self.count = source, min(count, len(source))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.source[index * len(self.source) // self.count]


class HeldOut:
    """`heldout(params)` evaluates on the same conversations every time, in batches of the shape of training."""

    def __init__(self, run: Run, processor: Processor, mesh: Mesh, source: Any):
        self.source = Spread(source, run.train.heldout)
        self.data, self.processor = run.data, processor
        self.rows = run.data.batch // run.train.accumulate
        self.mesh, self.rules = mesh, run.model.runtime.rules
        self._step = compiled_together(make_eval_step(run.model, mesh, loss_chunk=run.train.loss_chunk))

    def __call__(self, params: Any, after_batch: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """{"loss": mean per token, "conversations": number, "exact_match": {kind: share of right ones, "all": of all}}.

        With experts also {"expert_load": how often each was chosen, by layer and MODALITIES, nested lists [Lm][3][E]}.
        A conversation is right where every target is; in one of several turns, given the true turns before.
        """
        right, asked = collections.Counter(), collections.Counter()
        loss, weight, load = 0.0, 0.0, 0
        for batch, info in batches(self.source, self.processor, self.data, self.rows):
            found = jax.device_get(self._step(params, placed(batch, batch_shardings(batch, self.mesh, self.rules))))
            loss, weight = loss + float(found["loss_sum"]), weight + float(found["weight"])
            load += found.get("load", 0)
            for row, kinds in enumerate(info.kinds):
                for column, kind in enumerate(kinds):
                    asked[kind] += 1
                    right[kind] += int(found["wrong"][row, column] == 0)
            after_batch()
        known = {"loss": loss / max(weight, 1e-9), "conversations": asked.total(), "exact_match": shares(right, asked)}
        return known | ({"expert_load": load.tolist()} if np.ndim(load) else {})


def placed(batch: Any, layout: Any) -> Any:
    """A batch on the devices: every process has made the whole of it, and puts its devices' part there."""
    place = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return jax.tree.map(place, batch, layout)


def shares(right: Mapping[str, int], asked: Mapping[str, int]) -> dict[str, float]:
    """Share of right answers of every kind and, as "all", of all."""
    by_kind = {kind or "other": right[kind] / asked[kind] for kind in sorted(asked)}
    return {"all": sum(right.values()) / max(sum(asked.values()), 1), **by_kind}


def batches(
    source: Any, processor: Any, data: DataConfig, rows: int, reading: Reading | None = None
) -> Iterator[tuple[Any, Info]]:
    """All records of a source once, in batches of the shape of training; `reading`: see `make_loader`."""
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
        max_bad=1.0,
        reading=reading,
    )
    try:
        yield from loader
    finally:
        loader.close()
