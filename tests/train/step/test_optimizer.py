"""Schedules, patterns, decay and the three update rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from examples import tiny_config
from flax.traverse_util import flatten_dict, unflatten_dict

from mllm_jax.common.trees import join
from mllm_jax.model.vlm import abstract_params
from mllm_jax.train.step.optimizer import OptimConfig, make_optimizer, make_schedule, split

PATHS = """encoder/patch_embed/w encoder/position_embed encoder/layers/norm1/scale encoder/layers/attention/qkv/w
encoder/layers/attention/qkv/b encoder/layers/attention/out/w encoder/layers/mlp/up/w connector/main/norm/bias
connector/main/mlp/up/w decoder/embed decoder/layers/attention/q/w decoder/norm/scale decoder/head/w""".split()


@pytest.fixture(scope="module")
def params():
    """Weights of every sort, under the names and with the shapes that the model gives them."""
    rng, shapes = np.random.default_rng(0), flatten_dict(abstract_params(tiny_config()), sep="/")
    return unflatten_dict({path: rng.standard_normal(shapes[path].shape, np.float32) for path in PATHS}, sep="/")


def update(config, params, grads=None):
    """One update as {path: array}, of trainable weights."""
    tx, _ = make_optimizer(config, params)
    trainable, _ = split(params, config.freeze)
    grads = jax.tree.map(jnp.ones_like, trainable) if grads is None else grads
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), trainable)
    return flatten_dict(updates, sep="/")


def test_schedules():
    rate = lambda **kw: make_schedule(OptimConfig(learning_rate=2.0, steps=10, **kw))(np.arange(12))
    np.testing.assert_allclose(rate(schedule="constant", warmup=4)[:6], [0.5, 1, 1.5, 2, 2, 2])
    np.testing.assert_allclose(
        rate(schedule="linear", final_lr_ratio=0.1), [2 - 0.18 * i for i in range(11)] + [0.2], rtol=1e-5
    )
    np.testing.assert_allclose(
        rate(schedule="step")[np.array([0, 4, 5, 7, 8, 9])], 2 / 10 ** np.array([0, 0, 0.5, 0.5, 1, 1]), rtol=1e-5
    )
    reference = optax.cosine_decay_schedule(2.0, 8, alpha=0.25)
    np.testing.assert_allclose(
        rate(schedule="cosine", warmup=2, final_lr_ratio=0.25)[2:], reference(np.arange(10)), rtol=1e-5
    )


def test_adamw_is_optax_adamw(params):
    """Weight decay applies to matrices alone."""
    config = OptimConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.1, b1=0.8, b2=0.9, eps=1e-6)
    grads = jax.tree.map(lambda x: jnp.sin(100 * x), params)
    matrix = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "w", params)
    tx = optax.adamw(1e-2, 0.8, 0.9, 1e-6, weight_decay=0.1, mask=matrix)
    expected = flatten_dict(tx.update(grads, tx.init(params), params)[0], sep="/")
    for path, x in update(config, params, grads).items():
        np.testing.assert_allclose(x, expected[path], rtol=1e-5, atol=1e-9, err_msg=path)


def test_decay_spares_norms_biases_and_embeddings(params):
    config = OptimConfig(learning_rate=1.0, schedule="constant", weight_decay=0.1)
    zero = jax.tree.map(jnp.zeros_like, params)
    decayed = {path for path, x in update(config, params, zero).items() if np.any(x)}
    assert decayed == {path for path in flatten_dict(params, sep="/") if path.endswith("/w")}
    assert "decoder/embed" not in decayed and "decoder/head/w" in decayed


def test_factors_scale_by_the_first_pattern(params):
    factors = (("^encoder/layers/mlp", 0.5), ("^encoder/", 0.1), ("norm", 0.0))
    plain = update(OptimConfig(learning_rate=1.0), params)
    scaled = update(OptimConfig(learning_rate=1.0, lr_multipliers=factors), params)
    for path, factor in {
        "encoder/layers/mlp/up/w": 0.5,
        "encoder/layers/norm1/scale": 0.1,
        "decoder/norm/scale": 0.0,
        "decoder/embed": 1.0,
    }.items():
        np.testing.assert_allclose(scaled[path], factor * plain[path], rtol=1e-6)


@pytest.mark.parametrize("name", ("adamw", "muon", "adafactor"))
def test_frozen_parts_hold_no_state(params, name):
    freeze = ("^encoder/", "embed$")
    tx, _ = make_optimizer(OptimConfig(name=name, freeze=freeze), params)
    state = tx.init(params)
    trainable, frozen = split(params, freeze)
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(trainable))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths and not any("encoder" in path or "'embed'" in path for path in paths)
    assert set(flatten_dict(frozen)) | set(flatten_dict(trainable)) == set(flatten_dict(params))
    jax.tree.map(np.testing.assert_array_equal, join(trainable, frozen), params)


def test_muon_makes_every_matrix_of_a_layer_orthogonal(params):
    grads = jax.tree.map(lambda x: jnp.sin(100 * x), params)
    config = OptimConfig(name="muon", learning_rate=1.0, schedule="constant")
    updates = update(config, params, grads)
    q = updates["decoder/layers/attention/q/w"]  # [L D N H], read 64, written 4 * 32
    out = updates["encoder/layers/attention/out/w"]  # [L N H D]
    qkv = updates["encoder/layers/attention/qkv/w"]  # [L 3 D N H]
    for matrix in (*q.reshape(3, 64, 128), *out.reshape(3, 64, 64), *qkv[:, 1].reshape(3, 64, 64)):
        singular = np.linalg.svd(matrix / (0.2 * max(matrix.shape) ** 0.5), compute_uv=False)
        assert 0.4 < np.median(singular) < 1.3 and singular.max() < 1.3
    adamw = update(OptimConfig(learning_rate=1.0, schedule="constant"), params, grads)
    for path in ("decoder/embed", "decoder/head/w", "encoder/patch_embed/w", "decoder/norm/scale"):
        assert np.sign(updates[path]).tolist() == np.sign(adamw[path]).tolist()
        assert 0.5 < np.sqrt(np.mean(updates[path] ** 2)) < 2  # not 0.2, as matrices have


def test_adafactor_factors_large_matrices():
    config = tiny_config()
    wide = {"decoder": {"mlp": {"w": jax.ShapeDtypeStruct((4, 256, 512), jnp.float32)}}}
    tx, _ = make_optimizer(OptimConfig(name="adafactor"), wide)
    assert sum(x.size for x in jax.tree.leaves(jax.eval_shape(tx.init, wide))) < 4 * (256 + 512) + 10
    make_optimizer(OptimConfig(name="adafactor"), abstract_params(config))


def test_mistakes_are_named(params):
    with pytest.raises(ValueError, match=r"optim.freeze: 'enocder' matches no weight; .*encoder"):
        make_optimizer(OptimConfig(freeze=("enocder",)), params)
    with pytest.raises(ValueError, match=r"optim.lr_multipliers: 'decoder/layer/' matches no weight; .*decoder/layers"):
        make_optimizer(OptimConfig(lr_multipliers=(("decoder/layer/", 0.1),)), params)
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizer(OptimConfig(freeze=("",)), params)
    with pytest.raises(ValueError, match="one of .*adamw"):
        OptimConfig(name="sgd")
    with pytest.raises(ValueError, match="one of .*cosine"):
        OptimConfig(schedule="steps")
    with pytest.raises(ValueError, match="warmup=20: longer than the run, steps=10"):
        OptimConfig(warmup=20, steps=10)
