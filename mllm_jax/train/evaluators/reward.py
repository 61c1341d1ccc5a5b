"""Fraction of held-out pairs whose chosen answer has the higher reward, by kind of question."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mllm_jax.data.pipeline.loader import Info
from mllm_jax.data.pipeline.reward import RewardPairs
from mllm_jax.train.evaluators.base import Evaluator, shares
from mllm_jax.train.losses.reward import pairwise_loss
from mllm_jax.train.step.forward import scores
from mllm_jax.types import Batch


class RewardEvaluator(Evaluator):
    """Computes {"loss": mean over pairs, "pairs": number, "preferred": {kind: fraction, "all": fraction}}.

    preferred: fraction of the pairs whose chosen answer has the larger reward.
    """

    @property
    def reading(self) -> RewardPairs:
        return RewardPairs(self.run.algorithm.prompt)

    def make_step(self) -> Callable:
        def step(params, batch: Batch):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return scores(self.run.model, params, batch)[0]

        return jax.jit(step, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def no_records(self) -> dict[str, Any]:
        return {
            "right": collections.Counter(),
            "asked": collections.Counter(),
            "rewards": [np.zeros((0, 2), np.float32)],
        }

    def add(self, totals: dict[str, Any], found: np.ndarray, batch: Batch, info: Info) -> None:
        for row, kinds in zip(found, info.kinds):
            rewards = row[: len(kinds)].reshape(-1, 2)
            totals["rewards"].append(rewards)
            for kind, (chosen, rejected) in zip(kinds[::2], rewards):
                totals["asked"][kind] += 1
                totals["right"][kind] += int(chosen > rejected)

    def results(self, totals: dict[str, Any]) -> dict[str, Any]:
        pairs = totals["asked"].total()
        loss = np.sum(pairwise_loss(np.concatenate(totals["rewards"]), self.run.algorithm.center)) / max(pairs, 1)
        return {"loss": float(loss), "pairs": pairs, "preferred": shares(totals["right"], totals["asked"])}
