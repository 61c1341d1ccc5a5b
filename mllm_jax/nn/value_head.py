"""Scalar per token: the reward of a reward model, or the value of PPO's critic."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.sharding.weights import partitioned

NAME = "value_head"  # key of the head in a model's parameters


class ValueHead(nn.Module):
    """Maps hidden states [... D] to f32[...], computed in fp32. Initialized to 0, so that all answers score equally."""

    @nn.compact
    def __call__(self, hidden):
        w = self.param("w", partitioned(nn.initializers.zeros, "embed"), (hidden.shape[-1],))
        b = self.param("b", partitioned(nn.initializers.zeros), ())
        return jnp.einsum("...D,D->...", hidden.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST) + b
