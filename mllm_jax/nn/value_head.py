"""A number for every token: the reward of a reward model, or the value of PPO's critic."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from mllm_jax.sharding.weights import partitioned

NAME = "value_head"  # of the part in a model's parameters


class ValueHead(nn.Module):
    """Hidden states [... D] -> f32[...], in fp32; 0 at first, so that nothing is preferred yet."""

    @nn.compact
    def __call__(self, hidden):
        w = self.param("w", partitioned(nn.initializers.zeros, "embed"), (hidden.shape[-1],))
        b = self.param("b", partitioned(nn.initializers.zeros), ())
        return jnp.einsum("...D,D->...", hidden.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST) + b
