"""Multi-head latent attention: all heads read one small latent of each token (DeepSeek-V2, arXiv 2405.04434).

The latent is expanded to the keys and values of all heads, or the expansion is moved to the other side of both products
("absorbed"): queries are brought to the latents, and what is read from these back to the heads. The results are equal.
Many queries want the first, few queries before many keys the second, which never makes keys and values at all.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from mllm_jax.common.settings import Config, NonNegativeInt, Positive, PositiveInt
from mllm_jax.nn.attention.attend import attend
from mllm_jax.nn.attention.layer import write_cache
from mllm_jax.nn.einsum import Einsum, Weight
from mllm_jax.nn.norm import RMSNorm
from mllm_jax.nn.precision import einsum
from mllm_jax.nn.rope import YarnRopeScaling, frequencies, rope_table, rotate
from mllm_jax.nn.runtime import Runtime


@dataclass(frozen=True)
class MlaConfig(Config):
    """
    kv_rank: values of a latent.
    nope_dim, rope_dim: values of a query and of a key without and with rotary positions; all heads share the key's
      values with them.
    v_dim: of a value.
    q_rank: rank of the queries' projection, which then has a norm in its middle; 0 = one plain projection.
    """

    heads: PositiveInt
    kv_rank: PositiveInt = 512
    nope_dim: PositiveInt = 128
    rope_dim: PositiveInt = 64
    v_dim: PositiveInt = 128
    q_rank: NonNegativeInt = 0
    rope_theta: Positive = 1e4
    rope_scaling: YarnRopeScaling | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.rope_dim % 2:
            raise ValueError(f"attention.rope_dim={self.rope_dim} must be even: rotary positions turn pairs")

    @property
    def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, values) of what the cache keeps of a token: the latent as `k`, the shared rotary key as `v`."""
        return (1, self.kv_rank), (1, self.rope_dim)

    @property
    def pair_flops(self) -> int:
        """FLOPs of attention, forward, for a query and a key, in the expanded form."""
        return 2 * self.heads * (self.nope_dim + self.rope_dim + self.v_dim)

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return (self.nope_dim + self.rope_dim) ** -0.5 * (self.rope_scaling.score_scale if self.rope_scaling else 1)

    def rope(self, position, segment):
        """Cosines and sines for rotary positions i32[B T 3], of which the first axis counts."""
        del segment  # how long a conversation is does not matter
        if self.rope_scaling is None:
            turns, scale = frequencies(self.rope_theta, self.rope_dim), 1.0
        else:
            turns, scale = self.rope_scaling.frequencies(self.rope_theta, self.rope_dim), self.rope_scaling.table_scale
        axes = np.zeros(self.rope_dim // 2, np.int32)
        return tuple(part * scale for part in rope_table(position, axes, turns.astype(np.float32)))

    def absorbs(self, queries: int, keys: int) -> bool:
        """Returns whether the absorbed form multiplies less."""
        both = self.kv_rank * (self.nope_dim + self.v_dim)
        absorbed = queries * both + queries * keys * (2 * self.kv_rank + self.rope_dim)
        return absorbed < keys * both + queries * keys * (self.nope_dim + self.rope_dim + self.v_dim)

    def build(self, norm_eps: float, window: int, runtime: Runtime, name: str) -> nn.Module:
        """`norm_eps` is that of the layer's norms; those of latents always have 1e-6, as published."""
        if window:
            raise ValueError("latent attention has no windows; decoder.sliding_windows must be ()")
        return Mla(self, runtime, name=name)


class Mla(nn.Module):
    config: MlaConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x, rope, segment, cache, prefix=None):
        """x [B T D] -> ([B T D], the cache with the new tokens).

        Args:
          rope: of `MlaConfig.rope`.
          segment: i32[B T].
          cache: None, or ((latents [L B 1 S Z], rotary keys [L B 1 S H]) of all layers, this layer, segment of all
            slots, index of new ones).
        """
        if prefix is not None:
            raise ValueError("latent attention is causal throughout; decoder.prefix must be False")
        config, dtype, width = self.config, self.runtime.dtype, x.shape[-1]
        q_nope, q_rope = jnp.split(self._queries(x), [config.nope_dim], axis=-1)
        shape = (width, config.kv_rank + config.rope_dim)
        down = Einsum("...D,DZ->...Z", shape, ("embed", "latent"), dtype, name="kv_down")(x)
        latent, k_rope = jnp.split(down[:, :, None], [config.kv_rank], axis=-1)
        latent = RMSNorm(name="kv_norm")(latent)
        q_rope, k_rope = rotate(_halves(q_rope), rope), rotate(_halves(k_rope), rope)
        shape = (config.kv_rank, config.heads, config.nope_dim + config.v_dim)
        up = Weight(shape, ("latent", "heads", "head_dim"), config.kv_rank, name="kv_up")().astype(dtype)
        kept, (latent, k_rope), kv_segment, offset = write_cache(cache, (latent, k_rope), segment)
        form = expanded if cache is None or not config.absorbs(x.shape[1], latent.shape[1]) else absorbed
        out = form(config, self.runtime, (q_nope, q_rope), (latent, k_rope), up, segment, kv_segment, offset)
        shape, axes = (config.heads, config.v_dim, width), ("heads", "head_dim", "embed")
        return Einsum("...NH,NHD->...D", shape, axes, dtype, name="out")(out), kept

    def _queries(self, x):
        """[B T D] -> [B T N H]."""
        config, dtype, width = self.config, self.runtime.dtype, x.shape[-1]
        heads = (config.heads, config.nope_dim + config.rope_dim)
        if not config.q_rank:
            return Einsum("...D,DNH->...NH", (width, *heads), ("embed", "heads", "head_dim"), dtype, name="q")(x)
        axes = ("embed", "q_latent")
        latent = Einsum("...D,DZ->...Z", (width, config.q_rank), axes, dtype, name="q_down")(x)
        latent, axes = RMSNorm(name="q_norm")(latent), ("q_latent", "heads", "head_dim")
        return Einsum("...Z,ZNH->...NH", (config.q_rank, *heads), axes, dtype, name="q_up")(latent)


def _halves(x):
    """Pairs of neighbors, which published weights make, as the pairs (i, i + H/2) that `rotate` turns.

    Queries and keys are put in the same new order, which no product of the two can tell; weights stay as published.
    """
    return rearrange(x, "... (pair two) -> ... (two pair)", two=2)


def expanded(config: MlaConfig, runtime: Runtime, q, kv, up, q_segment, kv_segment, offset):
    """Attention with keys and values of every head.

    Args:
      q: values without and with rotary positions, [B T N H] each.
      kv: latents [B S 1 Z] and rotary keys [B S 1 H].
      up: [Z N H] latents to keys without rotary positions and values.
      q_segment: i32[B T]; kv_segment: i32[B S]; offset: see `attend`.
    Returns:
      [B T N H].
    """
    latent, k_rope = kv
    k, v = jnp.split(einsum("BSZ,ZNH->BSNH", latent[:, :, 0], up), [config.nope_dim], axis=-1)
    k = jnp.concatenate([k, jnp.broadcast_to(k_rope, (*k.shape[:3], config.rope_dim))], axis=-1)
    q, segments = jnp.concatenate(q, axis=-1), dict(q_segment=q_segment, kv_segment=kv_segment)
    return attend(q, k, v, **segments, causal=True, runtime=runtime, offset=offset, scale=config.scale)


def absorbed(config: MlaConfig, runtime: Runtime, q, kv, up, q_segment, kv_segment, offset):
    """Equals `expanded`, computed from the cached latents, which all heads share."""
    del runtime  # there is but one implementation
    (latent, k_rope), (to_k, to_v) = (part[:, :, 0] for part in kv), jnp.split(up, [config.nope_dim], axis=-1)
    q_nope, q_rope = (part * config.scale for part in q)
    scores = einsum("BTNZ,BSZ->BNTS", einsum("BTNH,ZNH->BTNZ", q_nope, to_k), latent, jnp.float32)
    scores += einsum("BTNH,BSH->BNTS", q_rope, k_rope, jnp.float32)
    slots = offset + jnp.arange(q_nope.shape[1])
    seen = (q_segment[:, :, None] == kv_segment[:, None]) & (slots[:, None] >= jnp.arange(latent.shape[1]))
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    return einsum("BTNZ,ZNH->BTNH", einsum("BNTS,BSZ->BTNZ", weights.astype(latent.dtype), latent), to_v)
