"""What a step minimises: sums over a batch, so that the parts of one add up. Pairs of answers: preference.py."""

from dataclasses import dataclass

from mllm_jax.model.vlm import VLM, ModelConfig, head_table
from mllm_jax.train.losses.cross_entropy import sample_weights, token_loss
from mllm_jax.types import Array, Batch, Routing

CHUNK = 512  # targets of a row whose logits are held at once


def loss_sum(config: ModelConfig, params, batch: Batch, weighting: str = "token", chunk: int = CHUNK, key=None):
    """(sum of weight * cross-entropy f32[], Routing or None): sums, so that batches add up.

    key: of the dropout of adapters; None = none.
    """
    out, runtime = VLM(config).apply({"params": params}, batch, hidden=True, rngs=dropout(key)), config.runtime
    weight = sample_weights(batch, weighting)
    about = (chunk, runtime.dtype, runtime.rules, config.decoder.logit_softcap)
    loss = token_loss(out.hidden, head_table(params), batch.targets, weight, *about)
    return loss, out.routing


def dropout(key) -> dict[str, Array]:
    """`rngs` of `apply` for a key, or for None where nothing is dropped."""
    return {} if key is None else {"dropout": key}


@dataclass(frozen=True)
class CrossEntropy:
    """The loss of every target.

    weighting: see `sample_weights`. chunk: see `token_loss`.
    """

    config: ModelConfig
    weighting: str = "token"
    chunk: int = CHUNK

    def weights(self, batch: Batch) -> Array:
        """f32[...] whose sum is what the sums of a whole batch are divided by."""
        return sample_weights(batch, self.weighting)

    def sums(self, params, batch: Batch, key, reference=None, rewards=None) -> tuple[dict[str, Array], Routing | None]:
        """{"loss": f32[], which is differentiated, and others to be reported}, and what the routers did.

        Args:
          key: of the dropout of adapters; None = none.
          reference: the parameters that a step was given beside its state. rewards: f32[2] of that state.
        """
        loss, routing = loss_sum(self.config, params, batch, self.weighting, self.chunk, key)
        return {"loss": loss}, routing

    def remembered(self, rewards, means: dict[str, Array], weight) -> Array:
        """The rewards of the next state, given the means of a batch and the f32[] that its sums were divided by."""
        return rewards
