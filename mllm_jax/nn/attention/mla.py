"""Multi-head latent attention: all heads read one small latent per token (DeepSeek-V2, arXiv 2405.04434).

Two forms give equal results. "Expanded": the latents are projected to keys and values of every head. "Absorbed": the
queries are projected to the latents' space instead, and the weighted sums of latents to the heads' values, so that keys
and values are never computed. Expanded is cheaper for many queries, absorbed for few queries and many keys.
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
    """Multi-head latent attention (arXiv 2405.04434).

    kv_rank: width of a token's latent.
    nope_dim, rope_dim: widths of a query or key without and with rotary positions. All heads share the rotary key.
    v_dim: width of a value.
    q_rank: rank of the query projection, with a norm between its two matrices. 0: one full matrix.
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
            raise ValueError(f"attention.rope_dim={self.rope_dim}: must be even, as rotary positions rotate pairs.")

    @property
    def cached(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes (heads, values) of a token's `k` and `v` in the cache: the latent and the shared rotary key."""
        return (1, self.kv_rank), (1, self.rope_dim)

    @property
    def pair_flops(self) -> int:
        """FLOPs of attention per pair of query and key, forward only, in the expanded form."""
        return 2 * self.heads * (self.nope_dim + self.rope_dim + self.v_dim)

    @property
    def scale(self) -> float:
        """Factor of the scores, including the one of `rope_scaling`."""
        return (self.nope_dim + self.rope_dim) ** -0.5 * (self.rope_scaling.score_scale if self.rope_scaling else 1)

    def rope(self, position, segment):
        """Returns cosines and sines, each f32[B T rope_dim/2], of the first axis of rotary positions i32[B T 3]."""
        del segment  # no scaling here depends on the length of a conversation
        if self.rope_scaling is None:
            freqs, scale = frequencies(self.rope_theta, self.rope_dim), 1.0
        else:
            freqs, scale = self.rope_scaling.frequencies(self.rope_theta, self.rope_dim), self.rope_scaling.table_scale
        axes = np.zeros(self.rope_dim // 2, np.int32)
        return tuple(part * scale for part in rope_table(position, axes, freqs.astype(np.float32)))

    def absorbs(self, queries: int, keys: int) -> bool:
        """Returns whether the absorbed form needs fewer multiplications."""
        projection = self.kv_rank * (self.nope_dim + self.v_dim)
        absorbed = queries * projection + queries * keys * (2 * self.kv_rank + self.rope_dim)
        return absorbed < keys * projection + queries * keys * (self.nope_dim + self.rope_dim + self.v_dim)

    def build(self, norm_eps: float, window: int, runtime: Runtime, name: str) -> nn.Module:
        """Returns the layer's module. `norm_eps` is not used: norms of latents have 1e-6, as published.

        Raises:
          ValueError: `window` is not 0.
        """
        if window:
            raise ValueError(
                "decoder.sliding_windows: latent attention has no windows. Set decoder.sliding_windows to ()."
            )
        return Mla(self, runtime, name=name)


class Mla(nn.Module):
    config: MlaConfig
    runtime: Runtime

    @nn.compact
    def __call__(self, x, rope, segment, cache, prefix=None):
        """Returns attention [B T D] and the cache's arrays with the new tokens.

        Args:
          x: [B T D].
          rope: cosines and sines from `MlaConfig.rope`.
          segment: i32[B T].
          cache: cache of `write_cache`, with latents [L B 1 S Z] as k and rotary keys [L B 1 S H] as v, or None.
          prefix: must be None.
        """
        if prefix is not None:
            raise ValueError("decoder.prefix=True: latent attention has no prefix. Set decoder.prefix to False.")
        config, dtype, width = self.config, self.runtime.dtype, x.shape[-1]
        q_nope, q_rope = jnp.split(self._queries(x), [config.nope_dim], axis=-1)
        shape = (width, config.kv_rank + config.rope_dim)
        down = Einsum("...D,DZ->...Z", shape, ("embed", "latent"), dtype, name="kv_down")(x)
        latent, k_rope = jnp.split(down[:, :, None], [config.kv_rank], axis=-1)
        latent = RMSNorm(name="kv_norm")(latent)
        q_rope, k_rope = rotate(_halves(q_rope), rope), rotate(_halves(k_rope), rope)
        shape = (config.kv_rank, config.heads, config.nope_dim + config.v_dim)
        up = Weight(shape, ("latent", "heads", "head_dim"), config.kv_rank, name="kv_up")().astype(dtype)
        new_cache, (latent, k_rope), kv_segment, offset = write_cache(cache, (latent, k_rope), segment)
        form = expanded if cache is None or not config.absorbs(x.shape[1], latent.shape[1]) else absorbed
        out = form(config, self.runtime, (q_nope, q_rope), (latent, k_rope), up, segment, kv_segment, offset)
        shape, axes = (config.heads, config.v_dim, width), ("heads", "head_dim", "embed")
        return Einsum("...NH,NHD->...D", shape, axes, dtype, name="out")(out), new_cache

    def _queries(self, x):
        """Returns the queries [B T N H] of x [B T D]."""
        config, dtype, width = self.config, self.runtime.dtype, x.shape[-1]
        heads = (config.heads, config.nope_dim + config.rope_dim)
        if not config.q_rank:
            return Einsum("...D,DNH->...NH", (width, *heads), ("embed", "heads", "head_dim"), dtype, name="q")(x)
        axes = ("embed", "q_latent")
        latent = Einsum("...D,DZ->...Z", (width, config.q_rank), axes, dtype, name="q_down")(x)
        latent, axes = RMSNorm(name="q_norm")(latent), ("q_latent", "heads", "head_dim")
        return Einsum("...Z,ZNH->...NH", (config.q_rank, *heads), axes, dtype, name="q_up")(latent)


def _halves(x):
    """Reorders the rotary pairs (2i, 2i + 1) of published weights into the pairs (i, i + H/2) that `rotate` rotates.

    Products of queries and keys do not change, because both have the same order.
    """
    return rearrange(x, "... (pair two) -> ... (two pair)", two=2)


def expanded(config: MlaConfig, runtime: Runtime, q, kv, up, q_segment, kv_segment, offset):
    """Returns latent attention computed with keys and values of every head.

    Args:
      q: (queries without, queries with rotary positions), each [B T N H].
      kv: (latents [B S 1 Z], rotary keys [B S 1 H]).
      up: [Z N H] projection of latents to keys without rotary positions, and values.
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
    """Returns the result of `expanded`, computed from the cached latents without keys and values of every head."""
    del runtime  # this form has a single implementation
    (latent, k_rope), (to_k, to_v) = (part[:, :, 0] for part in kv), jnp.split(up, [config.nope_dim], axis=-1)
    q_nope, q_rope = (part * config.scale for part in q)
    scores = einsum("BTNZ,BSZ->BNTS", einsum("BTNH,ZNH->BTNZ", q_nope, to_k), latent, jnp.float32)
    scores += einsum("BTNH,BSH->BNTS", q_rope, k_rope, jnp.float32)
    slots = offset + jnp.arange(q_nope.shape[1])
    mask = (q_segment[:, :, None] == kv_segment[:, None]) & (slots[:, None] >= jnp.arange(latent.shape[1]))
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    return einsum("BTNZ,ZNH->BTNH", einsum("BNTS,BSZ->BTNZ", weights.astype(latent.dtype), latent), to_v)
