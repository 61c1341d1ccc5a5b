"""Objectives of a step: sums over a batch, so that those of its parts add up."""

from mllm_jax.types import Array, Batch, Routing

Sums = tuple[dict[str, Array], Routing | None]


class Objective:
    """Base of the objectives of language models."""

    def weights(self, batch: Batch) -> Array:
        """f32[...] weights; the sums of a whole batch are divided by their sum."""
        raise NotImplementedError

    def sums(self, params, batch: Batch, key=None, frozen=None, rewards=None) -> Sums:
        """{"loss": f32[], which is differentiated, and other sums to report}, and the routing.

        Args:
          key: key of adapter dropout. None: no dropout.
          frozen: models that a step takes beside state and batch. rewards: f32[2] of that state.
        """
        raise NotImplementedError

    def remembered(self, rewards, means: dict[str, Array], weight) -> Array:
        """The rewards of the next state, given the means of a batch and the f32[] that its sums were divided by."""
        return rewards
