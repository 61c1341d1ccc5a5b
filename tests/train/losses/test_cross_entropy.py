"""The chunked loss and its gradients against optax's on full logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from examples import VALUES, random_example
from jax.sharding import NamedSharding, PartitionSpec

from mllm_jax.data.pipeline.packing import Budget, collate
from mllm_jax.sharding.logical_axes import freeze_rules
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.sharding.presets import LOGICAL_AXIS_RULES
from mllm_jax.train.losses.cross_entropy import sample_weights, token_errors, token_loss


def reference(hidden, table, targets, weight):
    logits = jnp.einsum("BTD,VD->BTV", hidden, table, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(weight * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def inputs(rng, rows, length, width, vocab, share):
    return (
        rng.standard_normal((rows, length, width), np.float32),
        rng.standard_normal((vocab, width), np.float32),
        rng.integers(0, vocab, (rows, length)).astype(np.int32),
        (rng.random((rows, length)) < share) * rng.uniform(0.1, 2, (rows, length)).astype(np.float32),
    )


def close(a, b, tolerance=1e-6):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-30))


@pytest.mark.parametrize("share", (1.0, 0.3, 0.02))
@pytest.mark.parametrize("chunk", (1, 4, 7, 13, 100))
def test_equals_optax(chunk, share):
    args = inputs(np.random.default_rng(chunk), 3, 13, 11, 37, share)
    value, grads = jax.value_and_grad(token_loss, (0, 1))(*args, chunk, "float32")
    expected, expected_grads = jax.value_and_grad(reference, (0, 1))(*args)
    close(token_loss(*args, chunk, "float32"), expected)
    close(value, expected)
    jax.tree.map(close, grads, expected_grads)


def test_capped_logits():
    hidden, table, targets, weight = inputs(np.random.default_rng(3), 3, 13, 11, 37, 0.5)

    def capped(hidden, table):
        logits = 2 * jnp.tanh(jnp.einsum("BTD,VD->BTV", hidden, table, precision="highest") / 2)
        return jnp.sum(weight * optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    value, grads = jax.value_and_grad(capped, (0, 1))(hidden, table)
    ours = lambda hidden, table: token_loss(hidden, table, targets, weight, 4, "float32", softcap=2.0)
    jax.tree.map(close, jax.value_and_grad(ours, (0, 1))(hidden, table), (value, grads))
    loss, wrong = token_errors(hidden, table, targets, weight, 4, "float32", softcap=2.0)
    close(loss, value)
    assert np.array_equal(wrong, token_errors(hidden, table, targets, weight, 4, "float32")[1])


def test_each_gradient_alone():
    hidden, table, targets, weight = inputs(np.random.default_rng(0), 2, 9, 8, 21, 0.5)
    expected = jax.grad(reference, (0, 1))(hidden, table, targets, weight)
    close(jax.grad(lambda x: 3 * token_loss(x, table, targets, weight, 4, "float32"))(hidden), 3 * expected[0])
    close(jax.grad(lambda x: 3 * token_loss(hidden, x, targets, weight, 4, "float32"))(table), 3 * expected[1])


def test_logits_far_from_zero():
    hidden, table, targets, weight = inputs(np.random.default_rng(0), 2, 5, 8, 21, 1)
    args = (hidden * 1e4, table, targets, weight)
    value, grads = jax.value_and_grad(token_loss, (0, 1))(*args, 2, "float32")
    close(value, reference(*args))
    assert all(np.isfinite(grad).all() for grad in grads)


def test_no_target_at_all():
    hidden, table, targets, weight = inputs(np.random.default_rng(0), 2, 9, 8, 21, 0)
    value, grads = jax.value_and_grad(token_loss, (0, 1))(hidden, table, targets, weight, 4, "float32")
    assert value == 0 and not any(np.any(grad) for grad in grads)


def test_what_has_no_weight_does_not_matter():
    hidden, table, targets, weight = inputs(np.random.default_rng(1), 2, 9, 8, 21, 0.4)
    loss = jax.value_and_grad(token_loss, (0, 1))
    value, grads = loss(hidden, table, targets, weight, 4, "float32")
    hidden = np.where(weight[..., None] == 0, np.float32(1e9), hidden)
    other, other_grads = loss(hidden, table, targets, weight, 4, "float32")
    assert value == other
    jax.tree.map(np.testing.assert_array_equal, grads, other_grads)


def test_bfloat16_keeps_sums_in_fp32():
    hidden, table, targets, weight = inputs(np.random.default_rng(2), 2, 40, 64, 300, 0.5)
    hidden, table = (0.3 * hidden).astype(jnp.bfloat16), (0.3 * table)
    value, (d_hidden, d_table) = jax.value_and_grad(token_loss, (0, 1))(hidden, table, targets, weight, 16, "bfloat16")
    rounded = np.asarray(table.astype(jnp.bfloat16), np.float32)
    expected, grads = jax.value_and_grad(reference, (0, 1))(hidden.astype(jnp.float32), rounded, targets, weight)
    close(value, expected, 1e-5)
    assert value.dtype == d_table.dtype == jnp.float32 and d_hidden.dtype == jnp.bfloat16
    close(d_hidden.astype(jnp.float32), grads[0], 1e-2)
    close(d_table, grads[1], 1e-2)


def test_full_logits_never_exist():
    rows, length, width, vocab, chunk = 2, 640, 16, 5000, 64
    args = inputs(np.random.default_rng(0), rows, length, width, vocab, 0.5)
    loss = lambda *args: token_loss(*args, chunk, "float32")
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile()
    logits = rows * chunk * vocab * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 3.5 * logits  # all of them would be ten times `logits`


def test_the_table_is_gathered_once_and_its_gradient_added_once():
    """Over `fsdp` and `data`, however many chunks: in the loop no device waits for those that hold other rows."""
    mesh, rules = make_mesh({"data": 2, "fsdp": 4}), freeze_rules(LOGICAL_AXIS_RULES)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    hidden, table, targets, weight = inputs(np.random.default_rng(0), 8, 40, 32, 96, 0.5)
    rows = ("data", "fsdp")
    args = place(hidden, rows), place(table, None, "fsdp"), place(targets, rows), place(weight, rows)
    loss = jax.jit(jax.value_and_grad(lambda *args: token_loss(*args, 8, "float32", rules), (0, 1)))
    with jax.set_mesh(mesh):
        compiled = loss.lower(*args).compile()
    close(compiled(*args)[1][1], jax.grad(reference, 1)(hidden, table, targets, weight))
    computations = re.split(r"\n(?=%|ENTRY)", compiled.as_text())
    collectives = re.compile(r"= (.+) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")
    inside = {text.startswith("ENTRY"): collectives.findall(text) for text in computations if collectives.search(text)}
    assert set(inside) == {True} and sum("f32[96,32]" in shape for shape in inside[True]) == 2


@pytest.mark.parametrize("chunk", (1, 5, 64))
def test_errors(chunk):
    hidden, table, targets, weight = inputs(np.random.default_rng(3), 3, 17, 8, 5, 0.6)
    loss, wrong = token_errors(hidden, table, targets, weight, chunk, "float32")
    close(loss, reference(hidden, table, targets, weight))
    np.testing.assert_array_equal(wrong, ((hidden @ table.T).argmax(-1) != targets) & (weight != 0))


def test_square_root_weighting():
    """A conversation of n equal targets counts as sqrt(n)."""
    rng = np.random.default_rng(0)
    rows = [
        [random_example(rng, 30, answer=16), random_example(rng, 11, (4, 4), answer=9)],
        [],
        [random_example(rng, 5)],
    ]
    batch = collate(rows, Budget(64, 1, 16), merge=2, values=VALUES)
    weight = np.asarray(sample_weights(batch, "sqrt"))
    for row, segment, n in ((0, 1, 16), (0, 2, 9), (2, 1, 2)):
        own = weight[row][batch.segment[row] == segment]
        np.testing.assert_allclose(own[own > 0], np.full(n, n**-0.5), rtol=1e-6)
    assert weight.sum() == pytest.approx(4 + 3 + 2**0.5)
    np.testing.assert_array_equal(sample_weights(batch, "token"), batch.weight)
    with pytest.raises(ValueError, match="must be one of token, sqrt"):
        sample_weights(batch, "square")
