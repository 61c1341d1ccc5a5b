"""Attention equals torch's on segments, grouped heads, caches and in chunks; kernels compile for their platforms."""

import importlib.util
import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from paths import HELPERS

from mllm_jax.nn.attention import attend as attend_module
from mllm_jax.nn.attention import flash
from mllm_jax.nn.attention.attend import attend
from mllm_jax.nn.attention.kernels import kernel_for
from mllm_jax.nn.attention.masks import AttentionSpec, mask_bounds
from mllm_jax.nn.runtime import Runtime

PLAIN = AttentionSpec(causal=True, scale=1.0)


def random_inputs(rng, rows=2, queries=9, keys=9, heads=6, kv_heads=2, head_dim=8):
    q = rng.standard_normal((rows, queries, heads, head_dim)).astype(np.float32)
    k, v = rng.standard_normal((2, rows, keys, kv_heads, head_dim)).astype(np.float32)
    return q, k, v


def torch_attention(q, k, v, mask):
    q, k, v = (torch.from_numpy(np.asarray(x)).transpose(1, 2) for x in (q, k, v))
    mask = torch.from_numpy(np.array(mask))[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).numpy()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scores", [2**18, 20], ids=["whole", "blocks"])
def test_segments_and_groups(monkeypatch, causal, scores):
    monkeypatch.setattr(attend_module, "SCORES", scores)
    monkeypatch.setattr(flash, "BLOCK", 4)
    rng = np.random.default_rng(0)
    q, k, v = random_inputs(rng)
    segment = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 3, 3, 4]])
    mask = segment[:, :, None] == segment[:, None, :]
    if causal:
        mask &= np.tril(np.ones((9, 9), bool))

    real = segment > 0

    def ours(q, k, v):
        out = attend(q, k, v, q_segment=segment, kv_segment=segment, causal=causal, runtime=Runtime())
        return out[real]

    np.testing.assert_allclose(ours(q, k, v), torch_attention(q, k, v, mask)[real], atol=1e-5)
    tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in tensors), attn_mask=torch.from_numpy(mask)[:, None], enable_gqa=True
    )
    out.transpose(1, 2)[torch.from_numpy(real)].square().sum().backward()
    gradients = jax.grad(lambda *x: jnp.sum(ours(*x) ** 2), argnums=(0, 1, 2))(q, k, v)
    for got, want in zip(gradients, tensors):
        np.testing.assert_allclose(got, want.grad.numpy(), atol=1e-4)


@pytest.mark.parametrize("scores", [2**18, 20], ids=["whole", "blocks"])
def test_reading_a_cache(monkeypatch, scores):
    monkeypatch.setattr(attend_module, "SCORES", scores)
    q, k, v = random_inputs(np.random.default_rng(1), queries=2, keys=12)
    filled = np.array([[0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0]])
    out = attend(q, k, v, q_segment=np.ones((2, 2)), kv_segment=filled, causal=True, runtime=Runtime(), offset=5)
    mask = (filled[:, None, :] == 1) & (np.arange(12) <= np.array([5, 6])[:, None])
    np.testing.assert_allclose(out, torch_attention(q, k, v, mask), atol=1e-5)


PACKED = np.array([[1] * 9 + [2] * 7 + [3] * 2 + [0] * 3, [0] * 4 + [1] * 17])
IN_PREFIX = np.array([[1] * 6 + [0] * 3 + [1] * 7 + [1] + [0] * 4, [0] * 4 + [1] * 10 + [0] * 7], bool)


def torch_scored(q, k, v, mask, scale, softcap):
    """Reference attention of [B T N H] tensors, with the options that torch's own function lacks."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = torch.where(mask[:, None], scores, -torch.inf).softmax(dim=-1)
    return torch.einsum("bnts,bsnh->btnh", weights, v)


def mask_of(window, prefix):
    """Mask by a loop over all pairs; padding attends to itself."""
    rows, length = PACKED.shape
    mask = np.zeros((rows, length, length), bool)
    for b, t, s in np.ndindex(mask.shape):
        behind = s <= t and (not window or t - s < window)
        both = prefix and IN_PREFIX[b, t] and IN_PREFIX[b, s]
        mask[b, t, s] = t == s or (PACKED[b, t] == PACKED[b, s] > 0 and (behind or both))
    return mask


KINDS = [dict(window=5), dict(window=3, prefix=True), dict(prefix=True), dict(softcap=2.0, scale=0.9), dict(window=1)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("scores", [2**18, 20], ids=["whole", "blocks"])
def test_windows_prefixes_and_caps(monkeypatch, kind, scores):
    monkeypatch.setattr(attend_module, "SCORES", scores)
    monkeypatch.setattr(flash, "BLOCK", 4)
    q, k, v = random_inputs(np.random.default_rng(5), queries=21, keys=21)
    real, seen = PACKED > 0, kind.get("prefix", False)
    options = kind | {"prefix": IN_PREFIX if seen else None}

    @jax.jit
    def ours(q, k, v):
        out = attend(q, k, v, q_segment=PACKED, kv_segment=PACKED, causal=True, runtime=Runtime(), **options)
        out = jnp.where(real[..., None, None], out, 0)
        return jnp.sum(out**2), out

    gradients, out = jax.grad(ours, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    tensors = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    mask = torch.from_numpy(mask_of(kind.get("window"), seen))
    expected = torch_scored(*tensors, mask, kind.get("scale", 8**-0.5), kind.get("softcap"))
    expected = expected * torch.from_numpy(real)[..., None, None]
    np.testing.assert_allclose(out, expected.detach(), atol=1e-5)
    expected.square().sum().backward()
    for got, want in zip(gradients, tensors):
        np.testing.assert_allclose(got, want.grad.numpy(), atol=1e-4)


def test_blocks_outside_a_window_are_left_out(monkeypatch):
    monkeypatch.setattr(flash, "BLOCK", 8)
    segment, block = np.ones((1, 64), np.int32), np.zeros((1, 64, 1, 1), np.float32)
    query, key = mask_bounds(AttentionSpec(causal=True, scale=1.0, window=8), segment, segment)
    first, last = flash._bounds(flash._queries(block, query, 1, 1.0), flash._keys(block, block, key), 1)
    assert (last - first).tolist() == [1] + [2] * 7


@pytest.mark.parametrize("scores", [2**18, 20], ids=["whole", "blocks"])
def test_a_window_counts_tokens_not_the_padding_between_them(monkeypatch, scores):
    """New tokens in a cache follow the padding of the prompt; the window counts as if there were no padding."""
    monkeypatch.setattr(attend_module, "SCORES", scores)
    monkeypatch.setattr(flash, "BLOCK", 4)
    q, k, v = random_inputs(np.random.default_rng(1), queries=2, keys=12)
    filled = np.array([[0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0]])
    ones = np.ones((2, 2))
    out = attend(
        q, k, v, q_segment=ones, kv_segment=filled, causal=True, runtime=Runtime(), offset=jnp.int32(9), window=3
    )
    mask = np.zeros((2, 2, 12), bool)
    for (row, query), seen in {(0, 0): [5, 6, 9], (0, 1): [6, 9, 10], (1, 0): [1, 2, 9], (1, 1): [2, 9, 10]}.items():
        mask[row, query, seen] = True
    np.testing.assert_allclose(out, torch_attention(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize(
    "name, kind, message",
    [("splash", {"prefix": np.ones((2, 128), bool)}, "prefix"), ("cudnn", {"softcap": 2.0}, "has no softcap")],
)
def test_what_a_kernel_cannot_see(name, kind, message):
    q, k, v = random_inputs(np.random.default_rng(3), queries=128, keys=128)
    segment, runtime = np.ones((2, 128), np.int32), Runtime(attention=name)
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, q_segment=segment, kv_segment=segment, causal=True, runtime=runtime, **kind)
    with pytest.raises(ValueError, match="needs causal attention"):
        attend(q, k, v, q_segment=segment, kv_segment=segment, causal=False, runtime=Runtime(), window=3)


@pytest.mark.parametrize("scores", [2**18, 20], ids=["whole", "blocks"])
def test_nothing_but_padding_is_finite(monkeypatch, scores):
    monkeypatch.setattr(attend_module, "SCORES", scores)
    q, k, v = random_inputs(np.random.default_rng(2))
    zeros = np.zeros((2, 9), np.int32)

    def total(*x):
        return jnp.sum(attend(*x, q_segment=zeros, kv_segment=zeros, causal=True, runtime=Runtime()))

    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(x).all() for x in (value, *gradients))


@pytest.mark.parametrize(
    "name, message", [("splash", "multiples of 128"), ("cudnn", "bfloat16"), ("flash", "must be one of")]
)
def test_what_a_kernel_cannot_take(name, message):
    q, k, v = random_inputs(np.random.default_rng(3))
    segment = np.ones((2, 9), np.int32)
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, q_segment=segment, kv_segment=segment, causal=True, runtime=Runtime(attention=name))


@pytest.mark.parametrize(
    "capability, head_dim, name",
    [("7.5", 64, "xla"), ("8.0", 64, "cudnn"), ("8.9", 192, "xla"), ("9.0", 192, "cudnn"), ("12.0", 64, "cudnn")],
)
def test_gpus_that_cudnn_knows(monkeypatch, capability, head_dim, name):
    """A T4 has 7.5."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    q = jax.ShapeDtypeStruct((1, 128, 4, head_dim), jnp.bfloat16)
    assert kernel_for(q, q, PLAIN, "auto") == name
    if name == "xla":
        with pytest.raises(ValueError, match="runtime.attention='cudnn': cannot compute .*(8.0|Hopper)"):
            kernel_for(q, q, PLAIN, "cudnn")


def ahead_of_time(platform, mesh=None, **arguments):
    script = HELPERS / "ahead_of_time.py"
    arguments = json.dumps({"mesh": mesh or {"fsdp": 2, "tensor": 2}, "rows": 4} | arguments)
    run = subprocess.run([sys.executable, script, platform, arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


DECODER = {"heads": 16, "kv_heads": 4, "head_dim": 128, "causal": True}
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        DECODER,
        {"heads": 16, "kv_heads": 16, "head_dim": 192, "value_dim": 128, "causal": True},
        *({"heads": 16, "kv_heads": 16, "head_dim": size, "causal": False} for size in (72, 64)),
    ],
    ids=["decoder", "latent", "so400m", "large"],
)
NEEDS_TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install -e '.[tpu]'")
NEEDS_GPU = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="needs pip install -e '.[cuda]'",
)


@NEEDS_TPU
@SHAPES
def test_splash_compiles_for_tpu(shape):
    length = 4096
    report = ahead_of_time("tpu", **shape, length=length)
    assert report["targets"].count("tpu_custom_call") >= 3  # forward, and backward for queries and for keys
    assert report["collectives"] == []
    scores = 2 * (shape["heads"] // 2) * length * length * 2  # of the rows and heads of one device, in bf16
    assert report["temporary"] < scores


@NEEDS_TPU
def test_windows_and_caps_compile_for_tpu():
    report = ahead_of_time("tpu", **DECODER | {"head_dim": 256, "window": 1024, "softcap": 50.0}, length=4096)
    assert report["targets"].count("tpu_custom_call") >= 3


@NEEDS_TPU
def test_tokens_on_several_tpus():
    """Ulysses keeps the platform's kernel; a ring needs no more memory than a few parts; two slices are one mesh."""
    mesh, length = {"fsdp": 2, "context": 2}, 8192
    report = ahead_of_time("tpu", mesh, **DECODER, length=length)
    assert report["targets"].count("tpu_custom_call") >= 3 and "all-to-all" in report["collectives"]
    report = ahead_of_time("tpu", mesh, **DECODER, length=length, context="ring")
    assert report["collectives"] == ["collective-permute"]
    queries = 2 * (length // 2) * DECODER["heads"] * DECODER["head_dim"] * 4  # of one device, in fp32
    assert report["temporary"] < 4 * queries
    report = ahead_of_time("tpu", {"data": 2, "fsdp": 4}, **DECODER, rows=8, length=256, slices=2)
    assert report["slices"] == [0, 1]


@NEEDS_GPU
def test_windows_compile_for_gpu():
    report = ahead_of_time("gpu", **DECODER | {"window": 512}, length=2048)
    assert sum(target.startswith("__cudnn$fmha") for target in report["targets"]) == 2


@NEEDS_GPU
@SHAPES
def test_cudnn_compiles_for_gpu(shape):
    report = ahead_of_time("gpu", **shape, length=2048)
    fused = [target for target in report["targets"] if target.startswith("__cudnn$fmha")]
    assert len(fused) == 2 and fused[1].endswith("Backward")
