"""The base of algorithms: all that depends on what a run learns, and from what."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mllm_jax.data.pipeline.packing import collate
from mllm_jax.data.pipeline.workers import Reading
from mllm_jax.train.checkpoint.restore import processor_of
from mllm_jax.train.evaluators.base import Evaluator
from mllm_jax.train.evaluators.generation import AnswerEvaluator
from mllm_jax.train.input.processors import chat_processor
from mllm_jax.train.monitor.cost import BatchCost
from mllm_jax.train.monitor.flops import rows_of_language
from mllm_jax.train.runs.config import Run
from mllm_jax.train.step.batches import batch_shardings
from mllm_jax.train.step.context import TrainContext
from mllm_jax.train.step.objective import Objective
from mllm_jax.train.step.train_step import make_train_step


class Algorithm:
    """An algorithm of one run. What a subclass does not override is that of a language model with an objective.

    A new one is a file in this folder, with a config and a loss in `mllm_jax.train.losses`, and a line in ALGORITHMS.
    """

    def __init__(self, run: Run):
        self.run, self.config = run, run.algorithm

    def check_sources(self) -> None:
        """Raises ConfigError if an input of the algorithm beside data and `init` is missing or does not fit."""

    def reading(self) -> Reading | None:
        """Reading of records by the loader. None: as conversations."""
        return None

    def processor(self) -> Any:
        """The processor of the run, which fits its model. Raises ConfigError."""
        return chat_processor(processor_of(self.run), self.run.model, self.run.data)

    def batch_shardings(self, batch: Any, mesh: Mesh) -> Any:
        """NamedSharding of every array of a batch. Raises ValueError where the batch does not divide over the mesh."""
        return batch_shardings(batch, mesh, self.run.model.runtime.rules)

    def padding(self) -> Any:
        """A batch of one row without conversations."""
        return collate([[]], self.run.data.budget, **self.run.model.layout)

    def cost(self) -> BatchCost | None:
        """The FLOPs of a batch; None where a batch does not tell them."""
        return BatchCost(self.run, rows_of_language)

    def objective(self) -> Objective | None:
        """The objective that a step minimizes. None: a step is not a single update of a language model."""
        return None

    def frozen(self, mesh: Mesh, workdir: Path, resumed: bool) -> tuple:
        """Frozen models that a step takes beside state and batch. Empty: none.

        Checkpoints leave them out; they are read again from where the run began. Raises ConfigError if these changed.
        """
        return ()

    def check_plannable(self) -> None:
        """Raises ConfigError where a step cannot be compiled ahead of time."""

    def step(self, context: TrainContext) -> Callable:
        """Jitted `step(state, batch, *frozen) -> (state, metrics)`, see `make_train_step`."""
        return make_train_step(context, self.objective())

    def evaluator(self, mesh: Mesh, processor: Any, source: Any) -> Evaluator:
        """Evaluator of the run on the held-out records of `source`."""
        return AnswerEvaluator(self.run, processor, mesh, source)
