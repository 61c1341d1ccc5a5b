"""Training on pairs of answers: from packed rows to the losses of train/losses/preference.py, and back."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.model.vlm import VLM, ModelConfig, head_table
from mllm_jax.nn.lora import split_adapters
from mllm_jax.train.algorithms.supervised import CHUNK, dropout
from mllm_jax.train.losses.cross_entropy import sum_segments, token_log_probs
from mllm_jax.train.losses.preference import BASE, FIRST, NONE, PreferenceConfig, preference_loss, running_mean
from mllm_jax.types import Array, Batch, Routing


@dataclass(frozen=True)
class PairObjective:
    """What a step minimises, see `mllm_jax.train.algorithms.supervised`: pairs in segments 2k - 1 (chosen) and 2k of
    rows.

    Summed over pairs are loss, reward_chosen, reward_rejected, and accuracy: the chosen one has the larger reward. The
    shift of BCO is the mean reward of the batches before, so that the parts of a batch need not wait for each other.
    """

    config: ModelConfig
    preference: PreferenceConfig
    chunk: int = CHUNK

    def weights(self, batch: Batch) -> Array:
        answered = sum_segments(batch.weight != 0, batch.segment) > 0
        return jnp.all(in_pairs(answered), axis=-1).astype(jnp.float32)

    def sums(self, params, batch: Batch, key, reference, rewards) -> tuple[dict[str, Array], Routing | None]:
        policy, routing = self.log_probs(params, batch, key)
        real, size = self.weights(batch) > 0, in_pairs(sum_segments(batch.weight, batch.segment))
        size = jnp.where(real[..., None], size, 1)
        given = jax.lax.stop_gradient(in_pairs(self.reference_of(params, batch, reference)))
        loss, reward = preference_loss(self.preference, in_pairs(policy), given, size, rewards[0])
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

    def reference_of(self, params, batch: Batch, reference) -> Array:
        """f32[B T] like `log_probs`."""
        kind = self.preference.reference
        if kind == NONE:
            return jnp.zeros(batch.tokens.shape)
        if kind == BASE:
            return self.log_probs(split_adapters(params)[0], batch)[0]
        return self.log_probs(reference, batch)[0] if kind == FIRST else batch.reference

    def log_probs(self, params, batch: Batch, key=None) -> tuple[Array, Routing | None]:
        """f32[B T], in column s - 1 the log-probability of segment s, and what the routers did."""
        config, runtime = self.config, self.config.runtime
        out = VLM(config).apply({"params": params}, batch, hidden=True, rngs=dropout(key))
        about = (self.chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
        found = token_log_probs(out.hidden, head_table(params), batch.targets, batch.weight, *about)
        return sum_segments(batch.weight * found, batch.segment), out.routing


def in_pairs(x):
    """[B T] of segments -> [B T/2 2] of pairs."""
    return rearrange(x[:, : x.shape[1] // 2 * 2], "B (k two) -> B k two", two=2)
