"""Contrastive losses: the plain formulas' values and gradients, on one device and around a ring of eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import to_torch
from tiny_dual_encoders import inputs_of, tiny

import mllm_jax
from mllm_jax.common.trees import flatten
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms.contrastive import make_contrastive_step
from mllm_jax.train.losses import contrastive
from mllm_jax.train.losses.contrastive import contrastive_loss
from mllm_jax.train.step.batches import pair_shardings
from mllm_jax.train.step.context import TrainContext, state_from_params
from mllm_jax.train.step.optimizer import OptimConfig

RULES = Runtime().within("encoder").rules
MESHES = {"one device": None, "fsdp": {"fsdp": 8}, "mixed": {"data": 2, "context": 2, "tensor": 2}}


def plain(kind, images, texts, scale, bias):
    """The formulas as printed in the papers, with the full matrix."""
    logits = scale * images @ texts.T + bias
    if kind == "softmax":
        found = [jax.nn.log_softmax(logits, axis)[jnp.arange(len(logits)), jnp.arange(len(logits))] for axis in (0, 1)]
        return -jnp.mean(found[0] + found[1]) / 2
    signs = 2 * jnp.eye(len(logits)) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / len(logits)


def embeddings(n, width=16):
    both = jax.random.normal(jax.random.key(0), (2, n, width))
    both = both.at[1].add(both[0])  # texts that resemble their images
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
    for name, ours, theirs in zip(("images", "texts", "scale", "bias"), d_found, d_expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()), err_msg=name)
        assert np.abs(theirs).max() > 1e-4 or (kind, name) == ("softmax", "bias")


@pytest.mark.parametrize("kind", contrastive.KINDS)
def test_padding_changes_nothing(kind, monkeypatch):
    """Loss and gradients are those of the real pairs; devices and blocks that have none are among them."""
    monkeypatch.setattr(contrastive, "BLOCK", 2)
    real = np.isin(np.arange(32), [0, 1, 5, 13, 14, 20, 31])
    args = (*embeddings(32), jnp.float32(10.0), jnp.float32(-3.0))
    kept = (*(x[real] for x in args[:2]), *args[2:])
    expected, wanted = jax.value_and_grad(lambda args: plain(kind, *args))(kept)
    compute = jax.jit(jax.value_and_grad(lambda args: contrastive_loss(kind, *args, rules=RULES, real=real)))
    with jax.set_mesh(make_mesh({"fsdp": 8})):
        value, found = compute(args)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(found[:2], wanted[:2]):
        np.testing.assert_allclose(ours[real], theirs, atol=1e-5)
        assert not np.any(ours[~real])
    np.testing.assert_allclose(found[2:], wanted[2:], atol=1e-5)
    none = contrastive_loss(kind, *args, real=np.zeros(32, bool))
    assert none == 0


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
    assert ours < 3 * matrix / 8**2  # a few blocks of a device's images with one device's texts


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
    with pytest.raises(ValueError, match="must be one of sigmoid, softmax"):
        contrastive_loss("cosine", *embeddings(4), 1.0)
    with pytest.raises(ValueError, match="Pass one text per image"):
        contrastive_loss("softmax", embeddings(4)[0], embeddings(5)[0], 1.0)


def pairs(kind, folder):
    """A tiny model, eight images with their texts, and transformers' loss of them."""
    model = tiny(kind)
    model.save_pretrained(folder)
    ours = mllm_jax.load_pretrained(folder)
    inputs = inputs_of(kind, 8, 8, shapes=((4, 6), (3, 5), (2, 2), (1, 7), (6, 4), (5, 4), (4, 4), (2, 9)))
    return ours, mllm_jax.from_hf_inputs(ours.config, inputs), model(**to_torch(inputs), return_loss=True).loss.item()


def run(ours, batch, optim, mesh, steps, tx=None):
    """The state after a number of steps, and the loss of each."""
    context = TrainContext(ours.config, optim, mesh, optimizer=tx)
    state = state_from_params(context, jax.tree.map(jnp.copy, ours.params))
    step, losses = make_contrastive_step(context), []
    batch = jax.device_put(batch, pair_shardings(batch, mesh, ours.config.runtime.rules))
    for _ in range(steps):
        state, metrics = step(state, batch)
        assert metrics["finite"] == 1
        losses.append(float(metrics["loss"]))
    return state, losses


def test_steps_on_any_mesh(tmp_path, record_property):
    """SigLIP 2 on images of eight sizes: the first loss is transformers', the next ones are lower, and those of eight
    devices equal those of one."""
    ours, batch, expected = pairs("siglip2", tmp_path)
    optim = OptimConfig(learning_rate=1e-3, schedule="constant", freeze=("^encoder/patch_embed",))
    _, alone = run(ours, batch, optim, make_mesh({"fsdp": 1}, jax.devices()[:1]), 3)
    state, losses = run(ours, batch, optim, make_mesh({"data": 2, "fsdp": 4}), 3)
    np.testing.assert_allclose(alone[0], expected, rtol=1e-5)
    record_property("trains", "siglip2")
    np.testing.assert_allclose(losses, alone, rtol=1e-4)
    assert losses[0] > losses[1] > losses[2] and state.step == 3
    frozen, trained = (
        np.abs(np.asarray(flatten(state.params)[path]) - np.asarray(flatten(ours.params)[path])).max()
        for path in ("encoder/patch_embed/w", "text/embed")
    )
    assert frozen == 0 < trained
    assert len(state.params["text"]["embed"].sharding.device_set) == 8


def test_a_scale_stays_below_100(tmp_path, record_property):
    """CLIP on eight devices, by a rule that adds 5 to every parameter."""
    ours, batch, expected = pairs("clip", tmp_path)
    tx = optax.stateless(lambda updates, _: jax.tree.map(lambda x: jnp.full_like(x, 5), updates))
    state, losses = run(ours, batch, OptimConfig(), make_mesh({"fsdp": 8}), 1, tx)
    np.testing.assert_allclose(losses, [expected], rtol=1e-5)
    record_property("trains", "clip")
    np.testing.assert_allclose(jnp.exp(state.params["log_scale"]), 100, rtol=1e-5)
