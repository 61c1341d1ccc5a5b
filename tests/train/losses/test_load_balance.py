"""Losses that balance experts, against closed forms and transformers, and their exactness over accumulated parts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from examples import MERGE, VALUES, random_example, random_params, tiny_config
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from mllm_jax.data.pipeline.packing import Budget, collate
from mllm_jax.model.vlm import VLM, ModelConfig
from mllm_jax.nn.moe.layer import MoeConfig
from mllm_jax.nn.moe.router import route, summarize
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms.supervised import CrossEntropy
from mllm_jax.train.losses.load_balance import BalanceConfig, Load, balance_loss, imbalance, totals, z_loss
from mllm_jax.train.step.context import TrainContext, state_from_params
from mllm_jax.train.step.optimizer import OptimConfig
from mllm_jax.train.step.train_step import make_train_step

E, TOP = 8, 2
SOFTMAX = MoeConfig(experts=E, top_k=TOP, mlp=16)
SEGMENT = np.array([[1] * 5 + [2] * 3 + [0] * 2, [1] * 9 + [0], [0] * 10], np.int32)


def batch_of(rows, budget):
    return collate(rows, budget, merge=MERGE, values=VALUES)


@pytest.fixture(scope="module")
def layers():
    """Two layers' random logits, what they choose, and their Routing."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, *SEGMENT.shape, E)).astype(np.float32)
    choose = jax.jit(lambda logits: route(logits, None, SOFTMAX))
    found = [choose(part) for part in logits]
    modality, dropped = np.zeros_like(SEGMENT), np.zeros(3, np.int32)
    sums = jax.jit(lambda x, e, p: summarize(x, e, p, SEGMENT, modality, dropped))
    routing = [sums(x, e, p) for x, (e, _, p) in zip(logits, found)]
    return logits, found, jax.tree.map(lambda *parts: jnp.stack(parts), *routing)


def evenness(experts, probability):
    """E * sum_i f_i P_i over tokens [n k], [n E]."""
    fraction = np.bincount(np.ravel(experts), minlength=E) / np.size(experts)
    return E * fraction @ np.mean(probability, axis=0)


def loss_of(routing, kind):
    batch = batch_of([[]], Budget(10, 0, 0))._replace(segment=SEGMENT)
    return float(balance_loss(routing, SEGMENT, Load.of(routing), totals(batch, batch.weight), kind))


@pytest.mark.parametrize(
    "kind, groups",
    [
        ("global", [SEGMENT > 0]),
        ("micro", [(SEGMENT > 0) & (np.arange(3) == row)[:, None] for row in (0, 1)]),
        ("sequence", [(SEGMENT == n) & (np.arange(3) == row)[:, None] for row, n in ((0, 1), (0, 2), (1, 1))]),
    ],
)
def test_closed_forms(layers, kind, groups):
    _, found, routing = layers
    each = [[evenness(np.asarray(e)[own], np.asarray(p)[own]) for own in groups] for e, _, p in found]
    assert loss_of(routing, kind) == pytest.approx(np.mean(each), rel=1e-5)


def test_one_layer_equals_transformers(layers):
    """Theirs counts f by token, so that it sums to the number of choices."""
    logits, _, routing = layers
    one = jax.tree.map(lambda x: x[:1], routing)
    gate = torch.from_numpy(logits[0].reshape(-1, E))
    theirs = load_balancing_loss_func((gate,), E, TOP, torch.from_numpy(SEGMENT > 0).long())
    assert loss_of(one, "global") == pytest.approx(float(theirs) / TOP, rel=1e-5)


def test_z_loss(layers):
    logits, _, routing = layers
    batch = batch_of([[]], Budget(10, 0, 0))._replace(segment=SEGMENT)
    square = np.square(np.log(np.sum(np.exp(logits), axis=-1)))[:, SEGMENT > 0]
    assert float(z_loss(routing, totals(batch, batch.weight))) == pytest.approx(square.mean(), rel=1e-5)


def test_imbalance(layers):
    _, found, routing = layers
    busiest = [np.bincount(np.asarray(e)[SEGMENT > 0].ravel(), minlength=E).max() for e, _, _ in found]
    assert float(imbalance(Load.of(routing))) == pytest.approx(max(busiest) / (17 * TOP / E), rel=1e-6)


MOE = MoeConfig(experts=E, top_k=TOP, mlp=16, score_func="sigmoid", bias=True)
DECODER = replace(tiny_config().decoder, layers=3, num_dense_layers=1, moe=MOE)
# Of the ways to the experts "dense" has the least to compile; tests/nn/moe/test_moe.py shows that they are equal.
CONFIG = ModelConfig(None, None, DECODER, runtime=Runtime(moe_dispatch="dense"))
BALANCE = BalanceConfig("global", aux_loss_weight=0.5, z_loss_weight=0.1, bias_update_rate=0.01)
BUDGET = Budget(60, 0, 0)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    lengths = [(20, 30), (44,), (12,), (7, 9, 11), (5,), (20, 20), (31,), (33, 8)]
    examples = [[random_example(rng, n) for n in row] for row in lengths]
    return batch_of(examples, BUDGET)


def take_step(params, rows, mesh=None, grad_accum_steps=1, balance=BALANCE, config=CONFIG):
    """(gradients before clipping, metrics, parameters after the step)."""
    mesh = make_mesh(mesh, jax.devices()[: 8 if mesh else 1])
    optim = OptimConfig(b1=0.0, max_grad_norm=0.0, learning_rate=1e-3)
    context = TrainContext(config, optim, mesh, grad_accum_steps=grad_accum_steps, balance=balance)
    state = state_from_params(context, params)
    step = make_train_step(context, CrossEntropy(config))
    state, metrics = step(state, rows)
    moments = next(part.mu for part in state.opt_state if hasattr(part, "mu"))
    return jax.device_get((moments, metrics, state.params))


@pytest.fixture(scope="module")
def whole(params, rows):
    return take_step(params, rows)


def assert_equal_steps(got, want, tolerance=1e-5):
    (grads, metrics, _), (expected, values, _) = got, want
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-6)),
        grads,
        expected,
    )
    for name, value in values.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=tolerance, abs=1e-7), name


def test_four_parts_equal_one_large_batch(params, rows, whole):
    assert_equal_steps(take_step(params, rows, grad_accum_steps=4), whole)


def bias_of(step):
    return step[2]["decoder"]["layers1"]["mlp"]["bias"]


def test_a_mesh_balances_alike(params, rows, whole):
    """Its tokens sorted and exchanged."""
    config = replace(CONFIG, runtime=Runtime(moe_dispatch="dropless"))
    got = take_step(params, rows, {"data": 2, "expert": 4}, config=config)
    assert_equal_steps(got, whole)
    np.testing.assert_array_equal(bias_of(got), bias_of(whole))


def test_the_running_buffer_takes_the_parts_up_to_its_own(params, rows):
    """Two parts, every second row: f of the first is its own, f of the second that of both."""
    running = take_step(params, rows, grad_accum_steps=2, balance=replace(BALANCE, exact=False))
    parts = [jax.tree.map(lambda x, i=i: x[i::2], rows) for i in range(2)]
    routing = [jax.jit(VLM(CONFIG).apply)({"params": params}, part).routing for part in parts]
    loads = [Load.of(part) for part in routing]
    loads[1] = jax.tree.map(jnp.add, *loads)
    all_of_it = totals(rows, rows.weight)
    shares = [balance_loss(r, p.segment, load, all_of_it, "global") for r, p, load in zip(routing, parts, loads)]
    assert float(running[1]["balance"]) == pytest.approx(float(sum(shares)), rel=1e-5)


def test_biases_move_against_the_load_and_have_no_moments(params, rows, whole):
    assert "bias" not in whole[0]["decoder"]["layers1"]["mlp"]
    counts = jax.jit(VLM(CONFIG).apply)({"params": params}, rows).routing.counts.sum(axis=(1, 2))
    expected = BALANCE.bias_update_rate * np.sign(counts.mean(axis=-1, keepdims=True) - counts)
    moved = bias_of(whole) - params["decoder"]["layers1"]["mlp"]["bias"]
    np.testing.assert_allclose(moved, expected, atol=1e-7)
    assert len(np.unique(expected)) > 1


@pytest.mark.slow
def test_the_loss_is_c_times_l(params, rows, whole):
    """The gradient of c * L is c times that of L: two weights of the loss differ by just that."""
    none = take_step(params, rows, balance=replace(BALANCE, aux_loss_weight=0.0))
    double = take_step(params, rows, balance=replace(BALANCE, aux_loss_weight=1.0))
    difference = jax.tree.map(lambda a, b: a - b, double[0], none[0])
    half = jax.tree.map(lambda a, b: 2 * (a - b), whole[0], none[0])
    router = lambda tree: tree["decoder"]["layers1"]["mlp"]["router"]["w"]
    assert np.abs(router(half)).max() > 1e-4
    np.testing.assert_allclose(router(difference), router(half), rtol=0, atol=1e-4 * np.abs(router(half)).max())


def test_an_unknown_loss():
    with pytest.raises(ValueError, match="BalanceConfig.loss='.*': must be one of none, micro, sequence, global"):
        BalanceConfig("batch")
