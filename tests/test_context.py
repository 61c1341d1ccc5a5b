"""Context parallelism: attention over tokens that lie on several devices, in a ring and by all-to-all, equals one's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.nn import flash
from mllm_jax.nn.attention import attend
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding import make_mesh

HEADS, HEAD_DIM, LENGTH = 4, 8, 40


def rows_of_segments(lengths, total=LENGTH):
    """i32[rows total]: conversations of the given lengths one after another, then padding."""
    rows = [np.repeat(np.arange(len(row)) + 1, row) for row in lengths]
    return np.stack([np.pad(row, (0, total - len(row))) for row in rows]).astype(np.int32)


SEGMENTS = {
    "packed": rows_of_segments([[3, 11, 1, 20], [40], [17, 17], [5]]),
    "odd": np.random.default_rng(0).integers(0, 4, (4, LENGTH)).astype(np.int32),
}


def random_inputs(kv_heads, value_dim=HEAD_DIM, rows=4, length=LENGTH):
    rng = np.random.default_rng(kv_heads)
    shapes = (HEADS, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, value_dim), (HEADS, value_dim)
    return [rng.standard_normal((rows, length, *shape)).astype(np.float32) for shape in shapes]


def value_and_gradients(q, k, v, target, segment, causal, runtime):
    """Attention, and the gradients of its product with `target`, both where there is no padding."""

    def loss(q, k, v):
        out = attend(q, k, v, q_segment=segment, kv_segment=segment, causal=causal, runtime=runtime)
        out = jnp.where((segment > 0)[..., None, None], out, 0)
        return jnp.sum(out * target), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def assert_close(got, wanted, tolerance=1e-5):
    """Relative to the largest value of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("exchange", ["ring", "ulysses"])
def test_tokens_on_four_devices(monkeypatch, exchange, kv_heads, segment, causal):
    monkeypatch.setattr(flash, "BLOCK", 3)
    args = (*random_inputs(kv_heads), SEGMENTS[segment])
    alone = jax.jit(partial(value_and_gradients, causal=causal, runtime=Runtime(attention="xla")))(*args)
    with jax.set_mesh(make_mesh({"fsdp": 2, "context": 4})):
        spread = jax.jit(partial(value_and_gradients, causal=causal, runtime=Runtime(context=exchange)))
        assert_close(spread(*args), alone)
