"""Attention equals torch's on segments, grouped heads, caches and in chunks; kernels compile for their platforms."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mllm_jax.nn import attention, flash
from mllm_jax.nn.attention import attend
from mllm_jax.nn.runtime import Runtime


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
@pytest.mark.parametrize("scores", [2**22, 20], ids=["whole", "blocks"])
def test_segments_and_groups(monkeypatch, causal, scores):
    monkeypatch.setattr(attention, "SCORES", scores)
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


@pytest.mark.parametrize("scores", [2**22, 20], ids=["whole", "blocks"])
def test_reading_a_cache(monkeypatch, scores):
    monkeypatch.setattr(attention, "SCORES", scores)
    q, k, v = random_inputs(np.random.default_rng(1), queries=2, keys=12)
    filled = np.array([[0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0]])
    out = attend(q, k, v, q_segment=np.ones((2, 2)), kv_segment=filled, causal=True, runtime=Runtime(), offset=5)
    mask = (filled[:, None, :] == 1) & (np.arange(12) <= np.array([5, 6])[:, None])
    np.testing.assert_allclose(out, torch_attention(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("scores", [2**22, 20], ids=["whole", "blocks"])
def test_nothing_but_padding_is_finite(monkeypatch, scores):
    monkeypatch.setattr(attention, "SCORES", scores)
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


def ahead_of_time(platform, *arguments):
    script = pathlib.Path(__file__).with_name("ahead_of_time.py")
    run = subprocess.run([sys.executable, script, platform, json.dumps(arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


SHAPES = pytest.mark.parametrize(
    "heads, kv_heads, head_dim, causal",
    [(16, 4, 128, True), (16, 16, 72, False), (16, 16, 64, False)],
    ids=["decoder", "so400m", "large"],
)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install mllm_jax[tpu])")
@SHAPES
def test_splash_compiles_for_tpu(heads, kv_heads, head_dim, causal):
    length = 4096
    report = ahead_of_time("tpu", heads, kv_heads, head_dim, causal, length)
    assert report["targets"].count("tpu_custom_call") >= 3  # forward, and backward for queries and for keys
    scores = 2 * (heads // 2) * length * length * 2  # of the rows and heads of one device, in bf16
    assert report["temporary"] < scores


@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="needs the CUDA plugin (pip install mllm_jax[cuda])",
)
@SHAPES
def test_cudnn_compiles_for_gpu(heads, kv_heads, head_dim, causal):
    report = ahead_of_time("gpu", heads, kv_heads, head_dim, causal, 2048)
    fused = [target for target in report["targets"] if target.startswith("__cudnn$fmha")]
    assert len(fused) == 2 and fused[1].endswith("Backward")
