"""Steps on pairs of answers: gradients through chunks, images encoded once, any mesh, every reference, the file."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import VALUES, random_example, random_params, tiny_config

from mllm_jax.data.pipeline.packing import Budget, collate
from mllm_jax.data.pipeline.preference import together
from mllm_jax.model.vlm import VLM
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms.preference import PairObjective
from mllm_jax.train.losses.cross_entropy import token_log_probs
from mllm_jax.train.losses.preference import PreferenceConfig
from mllm_jax.train.step.batches import batch_shardings
from mllm_jax.train.step.context import TrainContext, state_from_params
from mllm_jax.train.step.forward import answer_log_probs
from mllm_jax.train.step.optimizer import OptimConfig
from mllm_jax.train.step.train_step import make_train_step

CONFIG = tiny_config()
BUDGET = Budget(tokens=149, patch_rows=2, patches_per_row=128)
OPTIM = OptimConfig(learning_rate=1e-3, schedule="constant", max_grad_norm=0.0)
MPO = PreferenceConfig(dpo=0.8, bco=0.2, sft=1.0, beta=0.3)
batch_of = partial(collate, merge=2, values=VALUES)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-6))


def random_pair(rng, text, *grids):
    """Two conversations about the same images that differ in their answers: (the pair, each of them alone)."""
    chosen = random_example(rng, text, *grids)
    answer, longer = text // 2, int(rng.integers(1, 4))
    tokens = np.append(chosen.tokens[:-answer], rng.integers(5, 149, answer + longer)).astype(np.int32)
    last = chosen.position[-1] + 1 + np.arange(longer)[:, None]
    rejected = chosen._replace(
        tokens=tokens,
        weight=np.append(chosen.weight, np.ones(longer, np.float32)),
        position=np.concatenate([chosen.position, last.astype(np.int32)]),
        vision_index=np.append(chosen.vision_index, np.full(longer, -1)),
    )
    return together([chosen, rejected])._replace(images=chosen.images), chosen, rejected


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def other():
    return random_params(CONFIG, seed=1)


@pytest.fixture(scope="module")
def rows():
    """Eight rows of pairs, one of them empty."""
    rng = np.random.default_rng(1)
    made = [[random_pair(rng, 20, (4, 6))[0], random_pair(rng, 9)[0]], [random_pair(rng, 17, (3, 4, 4))[0]], []]
    return batch_of(made + [[random_pair(rng, 9 + i, (4, 2 * i + 2))[0]] for i in range(5)], BUDGET)


def test_log_probs_and_their_gradients_equal_those_of_full_logits():
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal((3, 13, 11), np.float32), rng.standard_normal((37, 11), np.float32)
    targets, given = rng.integers(0, 37, (3, 13)).astype(np.int32), rng.standard_normal((3, 13), np.float32)
    weight = (rng.random((3, 13)) < 0.4).astype(np.float32)

    def full(hidden, table):
        logits = 3 * jnp.tanh(jnp.einsum("BTD,VD->BTV", hidden, table, precision="highest") / 3)
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return jnp.where(weight != 0, found, 0)

    ours = lambda hidden, table: token_log_probs(hidden, table, targets, weight, 4, "float32", softcap=3.0)
    close(ours(hidden, table), full(hidden, table), 1e-6)
    some = lambda f: lambda *args: jnp.sum(given * jnp.square(f(*args)))
    for found, expected in zip(
        jax.grad(some(ours), (0, 1))(hidden, table), jax.grad(some(full), (0, 1))(hidden, table)
    ):
        close(found, expected, 1e-6)
    close(jax.grad(some(ours))(hidden, table), jax.grad(some(full))(hidden, table), 1e-6)
    close(jax.grad(some(ours), 1)(hidden, table), jax.grad(some(full), 1)(hidden, table), 1e-6)


def test_full_logits_never_exist():
    shape, vocab, chunk = (2, 640, 16), 5000, 64
    rng = np.random.default_rng(0)
    hidden, table = rng.standard_normal(shape, np.float32), rng.standard_normal((vocab, 16), np.float32)
    targets, weight = np.zeros(shape[:2], np.int32), np.ones(shape[:2], np.float32)
    loss = lambda *args: jnp.sum(jnp.tanh(token_log_probs(*args, targets, weight, chunk, "float32")))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3.5 * shape[0] * chunk * vocab * 4
    head_alone = jax.jit(jax.grad(loss)).lower(hidden, table).compile().cost_analysis()["flops"]
    assert head_alone < 0.8 * compiled.cost_analysis()["flops"]  # a frozen head costs no product


def test_a_pair_equals_its_conversations_alone(params):
    """Logits of both answers, and the images are read once."""
    rng = np.random.default_rng(2)
    pair, chosen, rejected = random_pair(rng, 21, (4, 6), (3, 2, 4))
    apply = jax.jit(lambda batch: VLM(CONFIG).apply({"params": params}, batch).logits)
    packed = batch_of([[random_example(rng, 12, (2, 2)), pair]], BUDGET)
    assert (packed.vision.image > 0).sum() == 4 + sum(len(image.patches) for image in pair.images)
    logits = apply(packed)[0]
    for segment, example in ((2, chosen), (3, rejected)):
        alone = batch_of([[example]], BUDGET)
        close(logits[packed.segment[0] == segment], apply(alone)[0][alone.segment[0] == 1])


def start(params, shape, preference, config=CONFIG, **options):
    """(state, step) on a mesh of that shape."""
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
    context = TrainContext(config, OPTIM, mesh, **options)
    step = make_train_step(context, PairObjective(config, preference, chunk=40))
    state = state_from_params(context, params)
    return state._replace(rewards=state.rewards + jnp.array([0.25, 6])), step


def gradients(state):
    return jax.tree.map(lambda mu: np.asarray(mu) / (1 - OPTIM.b1), state.opt_state[0].mu)


@pytest.fixture(scope="module")
def single(params, other, rows):
    """(state, metrics) after a step of MPO on one device."""
    state, step = start(params, {"fsdp": 1}, MPO)
    return step(state, rows, other)


def test_a_step_equals_the_losses_of_full_logits(params, other, rows, single):
    """Written down once more, pair by pair, from full logits."""

    def answers(params):
        logits = VLM(CONFIG).apply({"params": params}, rows).logits
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.targets[..., None], -1)[..., 0]
        numbers = [(b, s) for b in range(8) for s in range(1, rows.segment[b].max() + 1)]
        sums = [jnp.sum(jnp.where(rows.segment[b] == s, rows.weight[b] * found[b], 0)) for b, s in numbers]
        sizes = [np.sum(rows.weight[b][rows.segment[b] == s]) for b, s in numbers]
        return jnp.stack(sums).reshape(-1, 2), np.stack(sizes).reshape(-1, 2)

    reference = jax.jit(answers)(other)[0]

    def loss(params):
        policy, sizes = answers(params)
        reward, log_sigmoid = 0.3 * (policy - reference), jax.nn.log_sigmoid
        quality = -log_sigmoid(reward[:, 0] - 0.25) - log_sigmoid(0.25 - reward[:, 1])
        losses = -0.8 * log_sigmoid(reward[:, 0] - reward[:, 1]) + 0.2 * quality - policy[:, 0] / sizes[:, 0]
        return jnp.mean(losses), reward

    (value, reward), expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    state, metrics = single
    jax.tree.map(close, gradients(state), jax.tree.map(np.asarray, expected))
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5) and metrics["weight"] == 8
    assert float(metrics["reward_chosen"]) == pytest.approx(float(reward[:, 0].mean()), rel=1e-4)
    assert float(metrics["reward_rejected"]) == pytest.approx(float(reward[:, 1].mean()), rel=1e-4)
    assert float(metrics["accuracy"]) == pytest.approx(float(jnp.mean(reward[:, 0] > reward[:, 1])))
    np.testing.assert_allclose(state.rewards, ((6 * 0.25 + reward.sum()) / 22, 22), rtol=1e-4)


def test_meshes_parts_and_remat_change_nothing(params, other, rows, single):
    config = tiny_config(remat="full")
    state, step = start(params, {"data": 2, "fsdp": 2, "tensor": 2}, MPO, config, grad_accum_steps=2)
    batch = jax.device_put(rows, batch_shardings(rows, state.step.sharding.mesh, config.runtime.rules))
    state, metrics = step(state, batch, jax.device_put(other, jax.tree.map(lambda x: x.sharding, state.params)))
    for name, expected in single[1].items():
        assert float(metrics[name]) == pytest.approx(float(expected), rel=1e-4), name
    jax.tree.map(close, gradients(state), gradients(single[0]))
    np.testing.assert_allclose(state.rewards, single[0].rewards, rtol=1e-5)


def test_numbers_of_a_file_equal_a_frozen_copy(params, other, rows, single):
    objective = PairObjective(CONFIG, replace(MPO, reference="file.jsonl"), chunk=40)
    stored = np.asarray(jax.jit(lambda params: answer_log_probs(CONFIG, params, rows, 40)[0])(other))
    sums = jax.jit(lambda batch: objective.sums(params, batch, None, None, jnp.array([0.25, 6]))[0])
    for name, found in sums(rows._replace(reference=stored)).items():
        assert float(found / 8) == pytest.approx(float(single[1][name]), rel=1e-5), name
    nothing = sums(rows._replace(reference=np.zeros_like(stored)))
    free = replace(objective, preference=replace(MPO, reference="none"))
    np.testing.assert_array_equal(free.reference_of(params, rows, None), np.zeros_like(stored))
    assert abs(float(nothing["loss"] / 8 - single[1]["loss"])) > 0.1
