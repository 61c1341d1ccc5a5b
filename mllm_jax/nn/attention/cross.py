"""Attention of some tokens to others, the memory: learned queries to patches, text to images."""

from flax import linen as nn

from mllm_jax.nn.attention.attend import attend
from mllm_jax.nn.einsum import Einsum
from mllm_jax.nn.norm import NORMS
from mllm_jax.nn.runtime import Runtime


class CrossAttention(nn.Module):
    """Attention from tokens to the tokens of a memory that have the same segment number.

    heads, kv_heads, head_dim: sizes, as in `AttentionConfig`.
    bias: whether the four projections have biases.
    qk_norm: norm of nn/norm.py that is applied to each head of queries and keys, with `norm_eps`. "": none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    runtime: Runtime
    bias: bool = False
    qk_norm: str = ""
    norm_eps: float = 1e-6

    @nn.compact
    def __call__(self, x, memory, segment, memory_segment, values=None):
        """Attends from `x` to `memory`.

        Args:
          x: [B T D]; segment: i32[B T].
          memory: [B S E] what keys are made of; memory_segment: i32[B S].
          values: [B S E] what values are made of. None: `memory`.
        Returns:
          [B T D].
        """
        dtype, width = self.runtime.dtype, x.shape[-1]

        def project(name, x, heads, axis):
            shape, axes = (x.shape[-1], heads, self.head_dim), ("embed", axis, "head_dim")
            return Einsum("...D,DNH->...NH", shape, axes, dtype, bias=self.bias, name=name)(x)

        q = project("q", x, self.heads, "heads")
        k = project("k", memory, self.kv_heads, "kv_heads")
        v = project("v", memory if values is None else values, self.kv_heads, "kv_heads")
        if self.qk_norm:
            q, k = (NORMS[self.qk_norm](self.norm_eps, name=f"{name}_norm")(y) for name, y in (("q", q), ("k", k)))
        segments = dict(q_segment=segment, kv_segment=memory_segment)
        out = attend(q, k, v, **segments, causal=False, runtime=self.runtime)
        shape, axes = (self.heads, self.head_dim, width), ("heads", "head_dim", "embed")
        return Einsum("...NH,NHD->...D", shape, axes, dtype, bias=self.bias, name="out")(out)
