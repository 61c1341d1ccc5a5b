"""What a step minimizes: sums over a batch, so that the parts of one add up."""

from mllm_jax.types import Array, Batch, Routing

Sums = tuple[dict[str, Array], Routing | None]


class Objective:
    """Base of the objectives of language models."""

    def weights(self, batch: Batch) -> Array:
        """f32[...] whose sum is what the sums of a whole batch are divided by."""
        raise NotImplementedError

    def sums(self, params, batch: Batch, key=None, frozen=None, rewards=None) -> Sums:
        """{"loss": f32[], which is differentiated, and others to be reported}, and what the routers did.

        Args:
          key: of the dropout of adapters; None = none.
          frozen: what a step was given beside state and batch. rewards: f32[2] of that state.
        """
        raise NotImplementedError

    def remembered(self, rewards, means: dict[str, Array], weight) -> Array:
        """The rewards of the next state, given the means of a batch and the f32[] that its sums were divided by."""
        return rewards
