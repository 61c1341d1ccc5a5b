"""Attention kernels of the platforms, behind `attend`: splash on TPU, cuDNN on GPU.

Each takes q [B T N H], k and v [B S K H], what queries see of keys, and an AttentionSpec (nn/attention/masks.py). A
kernel is opaque to XLA's partitioner: `over_mesh` gives each device its part.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from mllm_jax.nn.attention.masks import AttentionSpec, KeyBounds, QueryBounds, attention_mask
from mllm_jax.sharding.activations import constrain
from mllm_jax.sharding.logical_axes import divisible_axes

SPLASH_BLOCK = 512
PLANNED = 9.0  # compute capability of the GPUs that a step is planned for, which are absent


def kernel_for(q, k, spec: AttentionSpec, wanted: str) -> str:
    """The implementation for these shapes: what was asked for by name, or under "auto" the platform's where it can."""
    if wanted == "auto":
        backend = jax.default_backend()
        name = {"tpu": "splash", "gpu": "cudnn"}.get(backend, "xla")
        return name if name == "xla" or _obstacle(name, q, k, spec) is None else "xla"
    if wanted != "xla" and (obstacle := _obstacle(wanted, q, k, spec)):
        raise ValueError(f"attention {wanted!r} cannot take q {q.shape} {q.dtype}, k {k.shape}: {obstacle}")
    return wanted


def _obstacle(name: str, q, k, spec: AttentionSpec) -> str | None:
    if name == "splash" and spec.prefix:
        return "its masks are known beforehand, those of a prefix are not; set runtime.attention='xla'"
    if name == "cudnn" and spec.softcap:
        return "cuDNN caps no scores; set runtime.attention='xla'"
    if name == "splash" and (q.shape[1] % 128 or k.shape[1] % 128):
        return "lengths must be multiples of 128; pad the budget of tokens or patches"
    if name == "cudnn" and q.dtype not in (jnp.bfloat16, jnp.float16):
        return "cuDNN computes in bfloat16 or float16; set runtime.dtype='bfloat16'"
    if name == "cudnn" and (q.shape[-1] % 8 or q.shape[-1] > 256 or q.shape[1] % 2 or k.shape[1] % 2):
        return "cuDNN needs a head dim that is a multiple of 8 and at most 256, and even lengths"
    if name == "cudnn" and jax.default_backend() == "gpu":
        capability = float(getattr(jax.devices()[0], "compute_capability", PLANNED))
        if capability < 8:
            return f"cuDNN's attention needs compute capability 8.0 (Ampere) or more, this GPU has {capability}"
        if q.shape[-1] > 128 and capability < 9:
            return "cuDNN takes head dims over 128 on Hopper and later GPUs only"
    return None


def over_mesh(kernel, q, k, v, query: QueryBounds, key: KeyBounds, rules, tokens: tuple[str, ...] = ()):
    """`kernel(q, k, v, query, key)`, each device with its own rows and heads.

    Heads are split only where those of queries stay with their own of keys and values, which are repeated as need be.
    `tokens` are mesh axes over which T and S are split too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, query, key)
    rows = divisible_axes("batch", len(q), rules, mesh)
    heads = tuple(axis for axis in divisible_axes("heads", q.shape[2], rules, mesh) if axis not in rows)
    split = math.prod(mesh.shape[axis] for axis in heads)
    if q.shape[2] % math.lcm(k.shape[2], split):
        heads, split = (), 1
    of_heads, of_rows = jax.P(rows, tokens, heads), jax.P(rows, tokens)
    args = (q, *repeat_heads(k, v, split), query, key)
    in_specs = jax.tree.map(lambda x: of_heads if x.ndim == 4 else of_rows, args)
    spread = jax.shard_map(kernel, in_specs=in_specs, out_specs=of_heads, check_vma=False)
    return spread(*jax.tree.map(constrain, args, in_specs))


def repeat_heads(k, v, ways: int):
    """Keys and values [B S K H], each head as often as it takes to split them `num_shards` ways."""
    copies = math.lcm(k.shape[2], ways) // k.shape[2]
    return (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))


def splash(q, k, v, query: QueryBounds, key: KeyBounds, spec: AttentionSpec):
    """Block-sparse flash attention of jax.experimental.pallas; head dims 64, 72, 80 and 128 compile unpadded."""
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
    """cuDNN's fused attention. Its public interface has no segments: they become a mask of T x S booleans per row. Nor
    has it values that are narrower than keys: they are filled up with zeros."""
    mask, causal = attention_mask(query, key)[:, None], spec.causal and not spec.prefix
    width = v.shape[-1]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - width)))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, scale=spec.scale, implementation="cudnn")
    return out[..., :width]


KERNELS = {"splash": splash, "cudnn": cudnn}
