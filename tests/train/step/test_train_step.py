"""The train step: exact under packing, padding, accumulation, meshes; compiled once; frozen is free; NaN is skipped."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import VALUES, random_example, tiny_config
from jax.sharding import PartitionSpec

from mllm_jax.data.pipeline.packing import Budget, collate
from mllm_jax.model.vlm import VLM, init_params
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms.supervised import CrossEntropy
from mllm_jax.train.step.batches import batch_shardings
from mllm_jax.train.step.context import TrainContext, init_state, state_from_params
from mllm_jax.train.step.forward import loss_sum
from mllm_jax.train.step.optimizer import OptimConfig, split
from mllm_jax.train.step.train_step import make_eval_step, make_train_step

CONFIG = tiny_config()
BUDGET = Budget(tokens=149, patch_rows=2, patches_per_row=256)
OPTIM = OptimConfig(learning_rate=1e-3, schedule="constant", max_grad_norm=0.0)
batch_of = partial(collate, merge=2, values=VALUES)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, jax.jit(partial(init_params, CONFIG))(jax.random.key(0)))


def start(params, shape, optim=OPTIM, config=CONFIG, weighting="token", **options):
    """(state, step) on a mesh of that shape."""
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
    context = TrainContext(config, optim, mesh, **options)
    step = make_train_step(context, CrossEntropy(config, weighting, chunk=40))
    return state_from_params(context, params), step


@pytest.fixture(scope="module")
def single(params):
    """(a function that makes a fresh state, the step) on one device."""
    _, step = start(params, {"fsdp": 1})
    return lambda: start(params, {"fsdp": 1})[0], step


@pytest.fixture(scope="module")
def eight_rows():
    """Eight rows of very unlike conversations, one of them empty."""
    rng = np.random.default_rng(1)
    rows = [
        [random_example(rng, 20, (4, 6)), random_example(rng, 31)],
        [random_example(rng, 17, (3, 4, 4), (2, 2))],
        [],
    ]
    rows += [[random_example(rng, 9 + i, (2 * i + 2, 4), answer=i) for _ in range(2)] for i in range(5)]
    return batch_of(rows, BUDGET)


def gradients(state):
    """Gradients of the first step, from Adam's first moments."""
    return jax.tree.map(lambda mu: np.asarray(mu) / (1 - OPTIM.b1), state.opt_state[0].mu)


def assert_close(a, b, tolerance=1e-5):
    """Relative to the largest value of each tensor."""
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-6))
    jax.tree.map(compare, a, b)


def test_packed_equals_one_by_one(params):
    rng = np.random.default_rng(0)
    a, b, c, d = (
        random_example(rng, 20, (4, 6), (2, 2)),
        random_example(rng, 13),
        random_example(rng, 18, (2, 4, 4), (6, 4)),
        random_example(rng, 7, (2, 8), answer=2),
    )
    run = jax.jit(jax.value_and_grad(lambda params, batch: loss_sum(CONFIG, params, batch, chunk=11)[0]))
    budget = Budget(67, 2, 64)
    loss, grads = run(params, batch_of([[a, b], [d, c]], budget))
    alone = [run(params, batch_of([[], [x]], budget)) for x in (a, b, c)]
    tight = Budget(len(d.tokens), 1, 16)
    alone.append(run(params, batch_of([[d]], tight)))  # without any padding
    losses, parts = zip(*alone)
    assert float(loss) == pytest.approx(float(sum(losses)), rel=1e-5)
    assert_close(grads, jax.tree.map(lambda *x: sum(x), *parts))


def test_one_compilation_for_any_mix(single):
    """Batches of no image, one huge one, forty small ones, videos beside images, and empty rows."""
    fresh, step = single
    rng, state = np.random.default_rng(0), fresh()
    make = partial(random_example, rng)
    rows = [
        lambda: [],
        lambda: [make(149)],
        lambda: [make(9) for _ in range(16)],
        lambda: [make(30, (16, 16))],
        lambda: [make(20, *((2, 2),) * 40)],
        lambda: [make(20, (2, 2), (4, 4, 4), (8, 4), (2, 6, 2))],
        lambda: [make(5, (32, 4)), make(5, (4, 32)), make(12), make(8, (5, 2, 2))],
    ]
    batches = [[row() for _ in range(8)] for row in rows]
    batches += [[rows[i]() for i in rng.integers(0, len(rows), 8)] for _ in range(13)]
    for i, conversations in enumerate(batches):
        batch = batch_of(conversations, BUDGET)
        state, metrics = step(state, batch)
        metrics = {name: float(x) for name, x in metrics.items()}
        assert metrics["finite"] == 1 and np.isfinite(metrics["grad_norm"])
        assert (metrics["loss"] == 0) == (not any(conversations))
        assert metrics["tokens"] == sum(len(e.tokens) for row in conversations for e in row)
        assert metrics["targets"] == metrics["weight"] == batch.weight.sum()
        images = [p for row in conversations for e in row for p in e.images]
        assert metrics["images"] == len(images) and metrics["patches"] == sum(len(p.patches) for p in images)
        assert int(state.step) == i + 1
    assert len(batches) == 20 and step._cache_size() == 1


def test_accumulation_equals_the_large_batch(params, single, eight_rows):
    fresh, step = single
    batch = eight_rows._replace(weight=eight_rows.weight * np.linspace(0.1, 3, 149, dtype=np.float32))
    state, metrics = step(fresh(), batch)
    split_state, split_step = start(params, {"fsdp": 1}, grad_accum_steps=4)
    split_state, split_metrics = split_step(split_state, batch)
    assert_close(gradients(split_state), gradients(state))
    for name in metrics:
        assert float(split_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
    with pytest.raises(ValueError, match="grad_accum_steps=3: must divide the 8 rows"):
        state, step = start(params, {"fsdp": 1}, grad_accum_steps=3)
        step(state, batch)


@pytest.mark.parametrize("shape", ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}), ids=("2x2x2", "fsdp8"))
def test_eight_devices_equal_one(params, single, eight_rows, shape):
    fresh, step = single
    expected, expected_metrics = step(fresh(), eight_rows)
    state, step = start(params, shape)
    mesh = state.step.sharding.mesh
    batch = jax.device_put(eight_rows, batch_shardings(eight_rows, mesh, CONFIG.runtime.rules))
    layout = jax.tree.map(lambda x: x.sharding, state)
    state, metrics = step(state, batch)
    assert jax.tree.map(lambda x: x.sharding, state) == layout
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(expected_metrics[name]), rel=1e-5), name
    assert_close(gradients(state), gradients(expected))


def test_moments_live_with_their_parameters(params):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    context = TrainContext(CONFIG, OPTIM, mesh)
    state = init_state(context, jax.random.key(0))
    assert_close(state.params, params, 1e-6)  # on any mesh the same
    layout = context.state_shardings
    assert jax.tree.map(lambda x: x.sharding, state) == layout
    assert layout.opt_state[0].mu == layout.opt_state[0].nu == layout.params
    assert layout.params["decoder"]["layers"]["mlp"]["up"]["w"].spec == PartitionSpec(None, "fsdp", "tensor")


def test_batches_are_spread_over_the_mesh(eight_rows):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    layout = batch_shardings(eight_rows, mesh, CONFIG.runtime.rules)
    rows = ("data", "fsdp")
    assert layout.tokens.spec == PartitionSpec(rows, None)
    assert layout.vision.patches.spec == PartitionSpec(rows, "tensor", None, None)
    odd = batch_of([[]] * 4, Budget(8, 3, 8))  # three rows of patches stay together
    assert batch_shardings(odd, mesh, CONFIG.runtime.rules).vision.image.spec == PartitionSpec(rows, None, None)
    with pytest.raises(ValueError, match="batch.tokens.* 6 is not divisible"):
        batch_shardings(batch_of([[]] * 6, Budget(8)), mesh, CONFIG.runtime.rules)
    mesh = make_mesh({"fsdp": 2, "context": 4})
    assert batch_shardings(batch_of([[]] * 4, Budget(8)), mesh, CONFIG.runtime.rules).tokens.spec[1] == "context"
    with pytest.raises(ValueError, match="batch.tokens: its axis 'length' of size 149 is not divisible by context=4"):
        batch_shardings(eight_rows, mesh, CONFIG.runtime.rules)


def test_a_non_finite_step_changes_nothing_but_counters(single, eight_rows):
    fresh, step = single
    state, _ = step(fresh(), eight_rows)
    before = jax.tree.map(np.asarray, state)
    broken = eight_rows._replace(weight=np.where(eight_rows.weight > 0, np.float32(np.nan), 0))
    for times in (1, 2):
        state, metrics = step(state, broken)
        assert metrics["finite"] == 0 and not np.isfinite(metrics["loss"])
        assert (int(state.step), int(state.bad), int(state.skipped)) == (1 + times, times, times)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (before.params, before.opt_state))
    state, metrics = step(state, eight_rows)
    assert metrics["finite"] == 1 and (int(state.step), int(state.bad), int(state.skipped)) == (4, 0, 2)
    assert not np.array_equal(state.params["decoder"]["embed"], before.params["decoder"]["embed"])


def test_frozen_parts_stay_and_cost_less(params, single, eight_rows):
    optim = OptimConfig(learning_rate=1e-2, max_grad_norm=0.5, freeze=("^encoder/", "^decoder/"), warmup=4)
    state, step = start(params, {"fsdp": 1}, optim)
    assert len(jax.tree.leaves(state.opt_state[0].mu)) == len(jax.tree.leaves(params["connector"]))
    fresh, full = single
    cost = lambda step, state: step.lower(state, eight_rows).cost_analysis()["flops"]
    assert cost(step, state) < 0.75 * cost(full, fresh())
    state, metrics = step(state, eight_rows)
    trained, frozen = split(state.params, optim.freeze)
    before, kept = split(params, optim.freeze)
    jax.tree.map(np.testing.assert_array_equal, frozen, kept)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), trained, before)))
    assert metrics["learning_rate"] == pytest.approx(1e-2 / 4)
    clipped = np.sqrt(sum(np.sum(np.square(mu / (1 - optim.b1))) for mu in jax.tree.leaves(state.opt_state[0].mu)))
    assert float(metrics["grad_norm"]) > 0.5 and clipped == pytest.approx(0.5, rel=1e-4)


def test_evaluation_counts_wrong_answers_of_each_conversation(params, eight_rows):
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    result = make_eval_step(CONFIG, mesh, loss_chunk=13)(params, eight_rows)
    logits = np.asarray(jax.jit(VLM(CONFIG).apply)({"params": params}, eight_rows).logits)
    counts = eight_rows.weight > 0
    wrong = (logits.argmax(-1) != eight_rows.targets) & counts
    for row in range(8):
        for segment in range(1, 4):
            own = eight_rows.segment[row] == segment
            assert result["answered"][row, segment - 1] == (counts[row] & own).sum()
            assert result["wrong"][row, segment - 1] == (wrong[row] & own).sum()
    assert result["answered"].sum() == counts.sum() and 0 < wrong.sum()
    log_softmax = jax.nn.log_softmax(jnp.asarray(logits))
    losses = -np.take_along_axis(np.asarray(log_softmax), eight_rows.targets[..., None], -1)[..., 0]
    assert float(result["loss_sum"]) == pytest.approx((losses * eight_rows.weight).sum(), rel=1e-5)
    assert result["weight"] == eight_rows.weight.sum()


def test_learns_in_bfloat16():
    """Everything that a real run turns on: tied embeddings, bf16, remat, square-root weights, a mesh."""
    config = tiny_config(tie=True, dtype="bfloat16", remat="full")
    params = jax.jit(partial(init_params, config))(jax.random.key(1))
    optim = OptimConfig(learning_rate=3e-3, schedule="linear", steps=60, weight_decay=0.01, warmup=3)
    state, step = start(params, {"fsdp": 4, "tensor": 2}, optim, config, weighting="sqrt")
    rng = np.random.default_rng(2)
    rows = batch_of([[random_example(rng, 9 + i, (2, 2 * i + 2), answer=i + 1)] for i in range(8)], Budget(40, 2, 32))
    batch = jax.device_put(rows, batch_shardings(rows, state.step.sharding.mesh, config.runtime.rules))
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 4 and losses[-1] < 0.5, losses
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state.params, state.opt_state[0].mu)))
    assert float(metrics["weight"]) < rows.weight.sum()
