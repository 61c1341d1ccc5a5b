"""How often a reward model prefers the chosen answer of held-out pairs, by kind of question, while it is trained."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.reward import Judged
from mllm_jax.train.algorithms.reward import pairwise_loss, scores
from mllm_jax.train.evaluators.generation import Spread, batches, placed, shares
from mllm_jax.train.monitor.processes import compiled_together
from mllm_jax.train.runs.config import Run
from mllm_jax.train.step.train_step import batch_shardings
from mllm_jax.types import Batch


class Judging:
    """`judging(params)` looks at the same held-out pairs every time, in batches of the shape of training."""

    def __init__(self, run: Run, processor: Processor, mesh: Mesh, source: Any):
        self.source, self.reading = Spread(source, run.train.heldout), Judged(run.train.reward.prompt)
        self.data, self.processor, self.centre = run.data, processor, run.train.reward.centre
        self.rows = run.data.batch // run.train.accumulate
        self.mesh, self.rules = mesh, run.model.runtime.rules

        def step(params, batch: Batch):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return scores(run.model, params, batch)[0]

        self._step = compiled_together(jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec())))

    def __call__(self, params: Any, after_batch: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """{"loss": mean of a pair, "pairs": number, "preferred": {kind: share of pairs, "all": of all}}.

        Of these the chosen answer has the larger reward.
        """
        right, asked, rewards = collections.Counter(), collections.Counter(), [np.zeros((0, 2), np.float32)]
        for batch, info in batches(self.source, self.processor, self.data, self.rows, self.reading):
            found = np.asarray(self._step(params, placed(batch, batch_shardings(batch, self.mesh, self.rules))))
            for row, kinds in zip(found, info.kinds):
                rewards.append(row[: len(kinds)].reshape(-1, 2))
                for kind, (chosen, rejected) in zip(kinds[::2], rewards[-1]):
                    asked[kind] += 1
                    right[kind] += int(chosen > rejected)
            after_batch()
        loss = np.sum(pairwise_loss(np.concatenate(rewards), self.centre)) / max(asked.total(), 1)
        return {"loss": float(loss), "pairs": asked.total(), "preferred": shares(right, asked)}
