"""Contrastive losses: the plain formulas' values and gradients, on one device and around a ring of eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding import make_mesh
from mllm_jax.train import contrastive
from mllm_jax.train.contrastive import contrastive_loss

RULES = Runtime().within("encoder").rules
MESHES = {"one device": None, "fsdp": {"fsdp": 8}, "mixed": {"data": 2, "context": 2, "tensor": 2}}


def plain(kind, pictures, texts, scale, bias):
    """The formulas as the papers print them, with the whole matrix."""
    logits = scale * pictures @ texts.T + bias
    if kind == "softmax":
        found = [jax.nn.log_softmax(logits, axis)[jnp.arange(len(logits)), jnp.arange(len(logits))] for axis in (0, 1)]
        return -jnp.mean(found[0] + found[1]) / 2
    signs = 2 * jnp.eye(len(logits)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / len(logits)


def embeddings(n, width=16):
    both = jax.random.normal(jax.random.key(0), (2, n, width))
    both = both.at[1].add(both[0])  # texts that resemble their pictures
    return both / jnp.linalg.norm(both, axis=-1, keepdims=True)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "kind, scale, bias", [("softmax", 14.3, 0.0), ("softmax", 100.0, 0.0), ("sigmoid", 10.0, -10.0)]
)
def test_equals_the_plain_formula(kind, scale, bias, mesh, monkeypatch):
    monkeypatch.setattr(contrastive, "BLOCK", 4)  # several blocks on every device
    args = (*embeddings(48), jnp.float32(scale), jnp.float32(bias))
    expected, d_expected = jax.value_and_grad(lambda args: 3 * plain(kind, *args))(args)
    compute = jax.jit(jax.value_and_grad(lambda args: 3 * contrastive_loss(kind, *args, rules=RULES)))
    if MESHES[mesh] is None:
        found, d_found = compute(args)
    else:
        with jax.set_mesh(make_mesh(MESHES[mesh])):
            found, d_found = compute(args)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, ours, theirs in zip(("pictures", "texts", "scale", "bias"), d_found, d_expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()), err_msg=name)
        assert np.abs(theirs).max() > 1e-4 or (kind, name) == ("softmax", "bias")


@pytest.mark.parametrize("kind", contrastive.KINDS)
def test_no_device_holds_the_matrix(kind):
    """Bytes of the compiled step, forward and backward: of one block of logits, not of n x n."""
    n = 2048
    args = (*embeddings(n), jnp.float32(10.0), jnp.float32(-10.0))
    mesh = make_mesh({"fsdp": 8})
    spread = jax.NamedSharding(mesh, jax.P("fsdp"))
    args = (*(jax.device_put(x, spread) for x in args[:2]), *args[2:])

    def bytes_of(loss):
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(loss)).lower(args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = bytes_of(lambda args: contrastive_loss(kind, *args, rules=RULES))
    rows = bytes_of(lambda args: plain(kind, *args))  # which XLA spreads over devices by rows
    matrix = 4 * n * n
    assert rows > matrix / 8
    assert ours < rows / 3
    assert ours < 3 * matrix / 8**2  # a few blocks of a device's pictures with one device's texts


def test_blocks_bound_a_single_device(monkeypatch):
    args = (*embeddings(1024), jnp.float32(10.0), jnp.float32(-10.0))

    def bytes_with(block):
        monkeypatch.setattr(contrastive, "BLOCK", block)
        loss = lambda args: contrastive_loss("sigmoid", *args)
        compiled = jax.jit(jax.grad(loss)).lower(args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, parts = bytes_with(1024), bytes_with(64)
    assert whole > 4 * 1024**2 and parts < whole / 4


def test_refuses():
    with pytest.raises(ValueError, match="must be one of .'sigmoid', 'softmax'."):
        contrastive_loss("cosine", *embeddings(4), 1.0)
    with pytest.raises(ValueError, match="every picture needs one text"):
        contrastive_loss("softmax", embeddings(4)[0], embeddings(5)[0], 1.0)
