"""Base class of training algorithms: everything that depends on the objective of a run and its data."""

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
    """The algorithm of one run. The defaults train a language model on the `objective` of a subclass.

    To add one, write a file in this folder, its config and loss in `mllm_jax.train.losses`, and a line in ALGORITHMS.
    """

    def __init__(self, run: Run):
        self.run, self.config = run, run.algorithm

    def check_sources(self) -> None:
        """Raises ConfigError if another input of the algorithm than data and `init` is missing or does not fit."""

    def reading(self) -> Reading | None:
        """Returns how the loader reads records. None: as conversations."""
        return None

    def processor(self) -> Any:
        """Returns the processor of the run's model. Raises ConfigError if it does not fit the data settings."""
        return chat_processor(processor_of(self.run), self.run.model, self.run.data)

    def batch_shardings(self, batch: Any, mesh: Mesh) -> Any:
        """Returns a NamedSharding per array of a batch. Raises ValueError if a size does not divide over the mesh."""
        return batch_shardings(batch, mesh, self.run.model.runtime.rules)

    def padding(self) -> Any:
        """Returns a batch of one row without conversations."""
        return collate([[]], self.run.data.budget, **self.run.model.layout)

    def cost(self) -> BatchCost | None:
        """Returns the counter of FLOPs per batch. None: they do not follow from the batch."""
        return BatchCost(self.run, rows_of_language)

    def objective(self) -> Objective | None:
        """Returns the objective that a step minimizes. None: a step is not a single update of a language model."""
        return None

    def frozen(self, mesh: Mesh, workdir: Path, resumed: bool) -> tuple:
        """Returns the frozen models that a step takes after state and batch. Empty: none.

        Checkpoints do not contain them: they are loaded again from their source. Raises ConfigError if it has changed.
        """
        return ()

    def check_plannable(self) -> None:
        """Raises ConfigError if the step cannot be compiled ahead of time."""

    def step(self, context: TrainContext) -> Callable:
        """Returns the jitted `step(state, batch, *frozen) -> (state, metrics)`, see `make_train_step`."""
        return make_train_step(context, self.objective())

    def evaluator(self, mesh: Mesh, processor: Any, source: Any) -> Evaluator:
        """Returns the evaluator of the run on the held-out records of `source`."""
        return AnswerEvaluator(self.run, processor, mesh, source)
