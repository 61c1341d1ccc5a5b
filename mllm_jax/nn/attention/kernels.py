"""Platform-specific attention kernels for `attend`: splash on TPU, cuDNN on GPU.

Each takes q [B T N H], k and v [B S K H], query and key bounds, and an AttentionSpec (nn/attention/masks.py). XLA's
partitioner cannot shard a kernel; `over_mesh` does.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.nn.attention.masks import AttentionSpec, KeyBounds, QueryBounds, attention_mask
from mllm_jax.sharding.activations import constrain
from mllm_jax.sharding.logical_axes import divisible_axes

SPLASH_BLOCK = 512
PLANNED = 9.0  # compute capability assumed for absent GPUs, for which a step is only planned


def kernel_for(q, k, spec: AttentionSpec, wanted: str) -> str:
    """Returns the attention implementation for these shapes: the named one, or for "auto" the platform's, else "xla".

    Raises:
      ValueError: the implementation is named but does not support these shapes or this spec.
    """
    if wanted == "auto":
        backend = jax.default_backend()
        name = {"tpu": "splash", "gpu": "cudnn"}.get(backend, "xla")
        return name if name == "xla" or _unsupported(name, q, k, spec) is None else "xla"
    if wanted != "xla" and (reason := _unsupported(wanted, q, k, spec)):
        raise ValueError(f"runtime.attention={wanted!r}: cannot compute q {q.shape} {q.dtype}, k {k.shape}: {reason}")
    return wanted


def _unsupported(name: str, q, k, spec: AttentionSpec) -> str | None:
    """Returns the reason why a kernel cannot compute this attention, or None."""
    if name == "splash" and spec.prefix:
        return "its masks are static, but a prefix depends on the data. Set runtime.attention='xla'."
    if name == "cudnn" and spec.softcap:
        return "cuDNN has no softcap. Set runtime.attention='xla'."
    if name == "splash" and (q.shape[1] % 128 or k.shape[1] % 128):
        return "lengths must be multiples of 128. Round up the budget of tokens or patches."
    if name == "cudnn" and q.dtype not in (jnp.bfloat16, jnp.float16):
        return "cuDNN computes in bfloat16 or float16. Set runtime.dtype='bfloat16'."
    if name == "cudnn" and (q.shape[-1] % 8 or q.shape[-1] > 256 or q.shape[1] % 2 or k.shape[1] % 2):
        return (
            "cuDNN needs even lengths and a head dim that is a multiple of 8, at most 256. Set runtime.attention='xla'."
        )
    if name == "cudnn" and jax.default_backend() == "gpu":
        capability = float(getattr(jax.devices()[0], "compute_capability", PLANNED))
        if capability < 8:
            return f"cuDNN needs compute capability 8.0, this GPU has {capability}. Set runtime.attention='xla'."
        if q.shape[-1] > 128 and capability < 9:
            return "cuDNN needs a Hopper or later GPU for head dims over 128. Set runtime.attention='xla'."
    return None


def over_mesh(kernel, q, k, v, query: QueryBounds, key: KeyBounds, rules, tokens: tuple[str, ...] = ()):
    """Applies `kernel(q, k, v, query, key)` with batch rows and heads sharded over the ambient mesh.

    Heads are sharded if each query head can stay with its key-value head; key-value heads are repeated where necessary.
    `tokens`: mesh axes that also shard T and S.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, query, key)
    rows = divisible_axes("batch", len(q), rules, mesh)
    heads = tuple(axis for axis in divisible_axes("heads", q.shape[2], rules, mesh) if axis not in rows)
    ways = math.prod(mesh.shape[axis] for axis in heads)
    if q.shape[2] % math.lcm(k.shape[2], ways):
        heads, ways = (), 1
    head_spec, row_spec = jax.P(rows, tokens, heads), jax.P(rows, tokens)
    args = (q, *repeat_heads(k, v, ways), query, key)
    in_specs = jax.tree.map(lambda x: head_spec if x.ndim == 4 else row_spec, args)
    sharded = jax.shard_map(kernel, in_specs=in_specs, out_specs=head_spec, check_vma=False)
    return sharded(*jax.tree.map(constrain, args, in_specs))


def repeat_heads(k, v, ways: int):
    """Yields keys and values [B S K H] with each head repeated until `ways` shards divide the heads evenly."""
    copies = math.lcm(k.shape[2], ways) // k.shape[2]
    return (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))


def splash(q, k, v, query: QueryBounds, key: KeyBounds, spec: AttentionSpec):
    """Returns attention by the block-sparse flash kernel of Pallas; head dims 64, 72, 80 and 128 compile unpadded."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, k, v = (rearrange(x, "B T N H -> B N T H") for x in (q, k, v))
    lengths = (q.shape[2], k.shape[2])
    mask = masks.CausalMask(lengths) if spec.causal else masks.FullMask(lengths)
    if spec.window:
        mask = masks.LocalMask(lengths, (spec.window - 1, 0), offset=0)
    block_q, block_kv = (next(b for b in (SPLASH_BLOCK, 256, 128) if length % b == 0) for length in lengths)
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * q.shape[1]),
        attn_logits_soft_cap=spec.softcap or None,
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
    )
    segments = kernels.SegmentIds(query.segment, key.segment)
    out = jax.vmap(kernel)(q * spec.scale, k, v, segment_ids=segments)
    return rearrange(out, "B N T H -> B T N H")


def cudnn(q, k, v, query: QueryBounds, key: KeyBounds, spec: AttentionSpec):
    """Returns attention by cuDNN's fused kernel.

    Its public interface has no segments and no values narrower than keys: segments become a mask of T x S booleans per
    row, and values are padded with zeros.
    """
    mask, causal = attention_mask(query, key)[:, None], spec.causal and not spec.prefix
    width = v.shape[-1]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - width)))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, scale=spec.scale, implementation="cudnn")
    return out[..., :width]


KERNELS = {"splash": splash, "cudnn": cudnn}
