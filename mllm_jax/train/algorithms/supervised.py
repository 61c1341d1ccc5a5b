"""Supervised training: cross-entropy of the targets of conversations and documents."""

from dataclasses import dataclass

from mllm_jax.model.vlm import ModelConfig
from mllm_jax.train.algorithms.base import Algorithm
from mllm_jax.train.losses.cross_entropy import CHUNK, sample_weights
from mllm_jax.train.step.forward import loss_sum
from mllm_jax.train.step.objective import Objective, Sums
from mllm_jax.types import Array, Batch


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy of every target.

    weighting: see `sample_weights`. chunk: see `token_loss`.
    """

    config: ModelConfig
    weighting: str = "token"
    chunk: int = CHUNK

    def weights(self, batch: Batch) -> Array:
        return sample_weights(batch, self.weighting)

    def sums(self, params, batch: Batch, key=None, frozen=None, rewards=None) -> Sums:
        loss, routing = loss_sum(self.config, params, batch, self.weighting, self.chunk, key)
        return {"loss": loss}, routing


class Supervised(Algorithm):
    """Trains on the answers of conversations, see `SupervisedConfig`."""

    def objective(self) -> CrossEntropy:
        return CrossEntropy(self.run.model, self.config.weighting, self.run.train.loss_chunk)
