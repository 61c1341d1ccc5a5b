"""Attention equals torch's on segments, grouped heads, caches and in chunks; kernels compile for their platforms."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mllm_jax.nn import attention, flash
from mllm_jax.nn.attention import attend
from mllm_jax.nn.kernels import kernel_for
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
@pytest.mark.parametrize("scores", [2**18, 20], ids=["whole", "blocks"])
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


@pytest.mark.parametrize("scores", [2**18, 20], ids=["whole", "blocks"])
def test_reading_a_cache(monkeypatch, scores):
    monkeypatch.setattr(attention, "SCORES", scores)
    q, k, v = random_inputs(np.random.default_rng(1), queries=2, keys=12)
    filled = np.array([[0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0]])
    out = attend(q, k, v, q_segment=np.ones((2, 2)), kv_segment=filled, causal=True, runtime=Runtime(), offset=5)
    mask = (filled[:, None, :] == 1) & (np.arange(12) <= np.array([5, 6])[:, None])
    np.testing.assert_allclose(out, torch_attention(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("scores", [2**18, 20], ids=["whole", "blocks"])
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


@pytest.mark.parametrize(
    "capability, head_dim, name",
    [("7.5", 64, "xla"), ("8.0", 64, "cudnn"), ("8.9", 192, "xla"), ("9.0", 192, "cudnn"), ("12.0", 64, "cudnn")],
)
def test_gpus_that_cudnn_knows(monkeypatch, capability, head_dim, name):
    """A T4 has 7.5."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    q = jax.ShapeDtypeStruct((1, 128, 4, head_dim), jnp.bfloat16)
    assert kernel_for(q, q, "auto") == name
    if name == "xla":
        with pytest.raises(ValueError, match="attention 'cudnn' cannot take .*(8.0|Hopper)"):
            kernel_for(q, q, "cudnn")


def ahead_of_time(platform, mesh=None, **arguments):
    script = pathlib.Path(__file__).with_name("ahead_of_time.py")
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
NEEDS_TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install mllm_jax[tpu]")
NEEDS_GPU = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="needs pip install mllm_jax[cuda]",
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
@SHAPES
def test_cudnn_compiles_for_gpu(shape):
    report = ahead_of_time("gpu", **shape, length=2048)
    fused = [target for target in report["targets"] if target.startswith("__cudnn$fmha")]
    assert len(fused) == 2 and fused[1].endswith("Backward")
