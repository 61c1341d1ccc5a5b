"""Base class of objectives: sums over a batch, so that the sums of its parts add up."""

from mllm_jax.types import Array, Batch, Routing

Sums = tuple[dict[str, Array], Routing | None]


class Objective:
    """Base class of the objectives of language models."""

    def weights(self, batch: Batch) -> Array:
        """Returns f32[...] weights. Their sum over the whole batch divides the sums of `sums`."""
        raise NotImplementedError

    def sums(self, params, batch: Batch, key=None, frozen=None, rewards=None) -> Sums:
        """Returns {"loss": differentiated sum, f32[], and other sums for the metrics}, and the Routing or None.

        Args:
          key: key of adapter dropout. None: no dropout.
          frozen: frozen models of the algorithm, see `Algorithm.frozen`.
          rewards: f32[2], `TrainState.rewards`.
        """
        raise NotImplementedError

    def remembered(self, rewards, means: dict[str, Array], weight) -> Array:
        """Returns `rewards` of the next state. means: means over a batch. weight: their divisor, f32[]."""
        return rewards
