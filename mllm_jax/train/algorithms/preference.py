"""Preference training on pairs of answers: applies the losses of train/losses/preference.py to packed rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm_jax.common.config import ConfigError
from mllm_jax.data.pipeline.packing import collate
from mllm_jax.data.pipeline.preference import Pairs
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.nn.lora import split_adapters
from mllm_jax.train.algorithms.base import Algorithm
from mllm_jax.train.algorithms.stored_references import read_references
from mllm_jax.train.checkpoint.fingerprint import verify_frozen_weights
from mllm_jax.train.checkpoint.restore import first_params
from mllm_jax.train.losses.algorithm_config import BASE, FIRST, NONE
from mllm_jax.train.losses.cross_entropy import CHUNK, sum_segments
from mllm_jax.train.losses.preference import PreferenceConfig, in_pairs, preference_loss, running_mean
from mllm_jax.train.step.forward import answer_log_probs
from mllm_jax.train.step.objective import Objective, Sums
from mllm_jax.types import Array, Batch

FILE = "reference.json"  # in the folder of a run with a frozen reference: fingerprint of its weights


@dataclass(frozen=True)
class PairObjective(Objective):
    """The preference loss of pairs in segments 2k - 1 (chosen) and 2k (rejected) of a row.

    Sums over pairs: loss, reward_chosen, reward_rejected, and accuracy (pairs whose chosen answer has the larger
    reward). The shift of BCO is the mean reward of all previous batches, so the parts of a batch stay independent.
    """

    config: ModelConfig
    preference: PreferenceConfig
    chunk: int = CHUNK

    def weights(self, batch: Batch) -> Array:
        has_answer = sum_segments(batch.weight != 0, batch.segment) > 0
        return jnp.all(in_pairs(has_answer), axis=-1).astype(jnp.float32)

    def sums(self, params, batch: Batch, key=None, frozen=None, rewards=None) -> Sums:
        policy, routing = answer_log_probs(self.config, params, batch, self.chunk, key)
        real, size = self.weights(batch) > 0, in_pairs(sum_segments(batch.weight, batch.segment))
        size = jnp.where(real[..., None], size, 1)
        reference = jax.lax.stop_gradient(in_pairs(self.reference_of(params, batch, frozen)))
        loss, reward = preference_loss(self.preference, in_pairs(policy), reference, size, rewards[0])
        total = lambda x: jnp.sum(jnp.where(real, x, 0))
        sums = dict(
            loss=total(loss),
            reward_chosen=total(reward[..., 0]),
            reward_rejected=total(reward[..., 1]),
            accuracy=total(reward[..., 0] > reward[..., 1]),
        )
        return sums, routing

    def remembered(self, rewards, means: dict[str, Array], weight) -> Array:
        return running_mean(rewards, (means["reward_chosen"] + means["reward_rejected"]) / 2, 2 * weight)

    def reference_of(self, params, batch: Batch, frozen: Any) -> Array:
        """Returns f32[B T] log-probabilities of the reference, see `answer_log_probs`. frozen: its parameters."""
        kind = self.preference.reference
        if kind == NONE:
            return jnp.zeros(batch.tokens.shape)
        if kind not in (BASE, FIRST):
            return batch.reference
        reference_params = split_adapters(params)[0] if kind == BASE else frozen
        return answer_log_probs(self.config, reference_params, batch, self.chunk)[0]


class Preference(Algorithm):
    """Trains on pairs of answers, see `PreferenceConfig`."""

    def reading(self) -> Pairs:
        stored = read_references(self.config.reference) if self.config.stored else None
        return Pairs(self.config.diff_token_weight, stored)

    def padding(self) -> Batch:
        return collate([[]], self.run.data.budget, **self.run.model.layout, references=self.config.stored)

    def objective(self) -> PairObjective:
        return PairObjective(self.run.model, self.config, self.run.train.loss_chunk)

    def frozen(self, mesh: Mesh, workdir: Path, resumed: bool) -> tuple:
        if self.config.reference != FIRST:
            return ()
        run = self.run
        params = first_params(run, mesh)
        verify_frozen_weights(Path(workdir) / FILE, resumed, ("reference", run.first_weights, params))
        return (params,)

    def check_plannable(self) -> None:
        if self.config.reference == FIRST:
            raise ConfigError(
                f"config.algorithm.reference={FIRST!r}: a step with a frozen reference cannot be planned. Plan with "
                "algorithm.reference='none', and add the bytes of the weights and a forward pass."
            )
