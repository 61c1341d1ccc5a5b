"""Answers in rows, and steps of PPO on them: as conversations written by hand, on any mesh, towards rewards."""

import types
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import VALUES, random_example, random_params, tiny_config

from mllm_jax.data.pipeline.packing import Budget, collate
from mllm_jax.data.pipeline.preference import together
from mllm_jax.generate.decode import generate_ids, sample_ids
from mllm_jax.model.vlm import VLM, ModelConfig
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms.ppo_step import PpoObjective, make_ppo_step
from mllm_jax.train.algorithms.rollout import FrozenModels, experience, written
from mllm_jax.train.losses.ppo import PpoConfig
from mllm_jax.train.step.batches import batch_shardings
from mllm_jax.train.step.context import TrainContext, state_from_params
from mllm_jax.train.step.optimizer import OptimConfig
from mllm_jax.types import Example

SEEING = replace(tiny_config(), value_head=True)
DECODER = replace(SEEING.decoder, layers=1, width=32, mlp=32, attention=replace(SEEING.decoder.attention, heads=2))
CONFIG = ModelConfig(None, decoder=DECODER, value_head=True)  # of text alone: most of a test is compilation
COUNT, ROWS, EMPTY = 6, 8, 2
BUDGET = Budget(tokens=40, patch_rows=1, patches_per_row=32)
OPTIM = OptimConfig(learning_rate=1e-2, schedule="constant", max_grad_norm=0.0)
PPO = PpoConfig(
    reward_model="somewhere", response_length=COUNT, kl_coef=0.1, missing_eos_penalty=-1.0, length_bonus=0.5
)
batch_of = partial(collate, merge=2, values=VALUES)


def text(tokens):
    count = len(tokens)
    position = np.repeat(np.arange(count, dtype=np.int32)[:, None], 3, axis=1)
    return Example(np.array(tokens, np.int32), np.zeros(count, np.float32), position, np.full(count, -1), ())


def with_text(example, tokens, weight=0.0):
    """The conversation, with more of it."""
    more = text(tokens)
    join = lambda name: np.concatenate([getattr(example, name), getattr(more, name)])
    position = np.concatenate([example.position, example.position.max() + 1 + more.position])
    found = example._replace(**{name: join(name) for name in ("tokens", "weight", "vision_index")}, position=position)
    found.weight[len(example.tokens) :] = weight
    return found


def questions(seeing):
    """(prompt, rest) of every row; None where the row is empty."""
    rng = np.random.default_rng(0)
    grids = [[(2, 2 + 2 * (i % 2))] if seeing else [] for i in range(ROWS)]
    asked = [random_example(rng, 5 + i, *shown, answer=0) for i, shown in enumerate(grids)]
    rests = [rng.integers(5, 149, 3 + i % 3).tolist() for i in range(ROWS)]
    return [None if i == EMPTY else pair for i, pair in enumerate(zip(asked, rests))]


def prompts_of(seeing):
    rows = [[] if pair is None else [together([pair[0], text(pair[1])])] for pair in questions(seeing)]
    return batch_of(rows, BUDGET if seeing else BUDGET._replace(patch_rows=0, patches_per_row=0))


def judge_of(config):
    reward, first = (random_params(config, seed=seed) for seed in (1, 2))
    return FrozenModels(reward, jnp.array([7, 8, *range(100, 149)]), first, config)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def judge():
    return judge_of(CONFIG)


@pytest.fixture(scope="module")
def learned(params, judge):
    """(answers with experience, means)."""
    draw = lambda params, judge, prompts, key: experience(CONFIG, PPO, params, judge, prompts, key, 40)
    return jax.jit(draw)(params, judge, prompts_of(seeing=False), jax.random.key(3))


def test_answers_stand_where_a_conversation_has_them():
    asked = questions(seeing=True)
    sizes = [0 if pair is None else 1 + i % COUNT for i, pair in enumerate(asked)]
    tokens = np.random.default_rng(1).integers(5, 149, (ROWS, COUNT)).astype(np.int32)
    own = np.arange(COUNT) < np.array(sizes)[:, None]
    found = jax.jit(written)(prompts_of(seeing=True), tokens, own, own[:, -1])
    answered = [
        [] if pair is None else [with_text(pair[0], row[:size], weight=1.0)]
        for pair, row, size in zip(asked, tokens, sizes)
    ]
    judged = [[with_text(example, pair[1]) for example in row] for row, pair in zip(answered, asked)]
    room = BUDGET._replace(tokens=BUDGET.tokens + COUNT)
    for ours, expected in ((found.policy, batch_of(answered, room)), (found.judged, batch_of(judged, room))):
        real, counts = expected.segment > 0, expected.weight > 0
        for name in ("segment", "weight", "vision_index"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name), err_msg=name)
        for name in ("tokens", "position"):
            np.testing.assert_array_equal(getattr(ours, name)[real], getattr(expected, name)[real], err_msg=name)
        np.testing.assert_array_equal(ours.targets[counts], expected.targets[counts])


def test_experience_equals_full_logits(learned, params, judge):
    """Log-probabilities, values, rewards, the penalty without a stop token, and the advantages of these."""
    batch, about = learned
    full = jax.jit(lambda params, batch: VLM(CONFIG).apply({"params": params}, batch))
    real = np.asarray(batch.weight) > 0
    size = real.sum(axis=1)
    assert size[EMPTY] == 0 and (size > 0).sum() == ROWS - 1
    said = {}
    for name, weights in (("policy", params), ("first", judge.first)):
        out = full(weights, batch)
        found = np.asarray(jax.nn.log_softmax(out.logits))
        said[name] = np.where(real, np.take_along_axis(found, np.asarray(batch.targets)[..., None], -1)[..., 0], 0)
        if name == "policy":
            np.testing.assert_allclose(batch.experience.values[real], out.value[real], atol=1e-4)
    np.testing.assert_allclose(batch.experience.log_probs, said["policy"], atol=1e-4)
    kl = (said["policy"] - said["first"]).sum(axis=1)
    assert float(about["kl"]) == pytest.approx(kl.sum() / (ROWS - 1), abs=1e-3)
    answers = [np.asarray(batch.targets)[b, real[b]] for b in range(ROWS) if size[b]]
    stops = np.asarray(judge.stop)
    ended = np.array([np.isin(answer[-1], stops) for answer in answers])
    assert not any(np.isin(answer[:-1], stops).any() for answer in answers) and 0 < ended.sum() < len(ended)
    assert all(len(answer) == COUNT for answer, whole in zip(answers, ended) if not whole)
    assert float(about["ended"]) == pytest.approx(ended.mean())
    assert float(about["length"]) == pytest.approx(size.sum() / (ROWS - 1))
    judged = [
        with_text(with_text(pair[0], answer), pair[1])
        for pair, answer in zip([pair for pair in questions(seeing=False) if pair], answers)
    ]
    rows = [judged[:EMPTY][i : i + 1] if i < EMPTY else judged[i - 1 : i] if i > EMPTY else [] for i in range(ROWS)]
    values = full(judge.reward, batch_of(rows, Budget(BUDGET.tokens + COUNT))._replace(experience=batch.experience))
    score = [np.asarray(values.value)[b, len(row[0].tokens) - 1] for b, row in enumerate(rows) if row]
    score = np.array(score) - ~ended + 0.5 * size[size > 0] / COUNT
    assert float(about["reward"]) == pytest.approx(score.mean(), abs=1e-3)
    # With gamma and lambda 1, what the critic should have expected at first is the score less all of the KL penalty.
    returns = [np.asarray(batch.experience.returns)[b, real[b]][0] for b in range(ROWS) if size[b]]
    np.testing.assert_allclose(returns, score - PPO.kl_coef * kl[size > 0], atol=1e-3)
    whitened = np.asarray(batch.experience.advantages)
    assert whitened[real].std() == pytest.approx(1, abs=1e-3) and not whitened[~real].any()


@pytest.fixture(scope="module")
def objective():
    """The objective of PPO, as (sums, gradients) of (params, batch)."""

    def sums(params, batch):
        found = PpoObjective(CONFIG, PPO, 40).sums(params, batch)[0]
        return found["loss"], found

    return jax.jit(jax.grad(sums, has_aux=True))


@pytest.mark.parametrize("sign", (1, -1))
def test_what_is_rewarded_becomes_likelier(learned, params, objective, sign):
    """A small step makes answers likelier as they are better, and where advantages are turned round less likely."""
    batch, _ = learned
    before = batch.experience._replace(returns=batch.experience.values)  # the critic has nothing to learn
    own, turned = (batch._replace(experience=before._replace(advantages=s * before.advantages)) for s in (1, sign))
    grads, _ = objective(params, turned)
    moved = jax.tree.map(lambda x, grad: x - 1e-4 * grad, params, grads)
    gained = objective(params, own)[1]["policy_loss"] - objective(moved, own)[1]["policy_loss"]
    assert sign * float(gained) > 1e-3


def test_what_has_gone_too_far_has_no_gradient(learned, params, objective):
    """Every token is beyond the video, the way its advantage wants it, and every value beyond its own."""
    batch, _ = learned
    own = batch.experience
    away = jnp.where(own.advantages > 0, -0.5, 0.5)
    beyond = own._replace(log_probs=own.log_probs + away, values=own.values - 1, returns=own.values + 1)
    grads, sums = objective(params, batch._replace(experience=beyond))
    assert sums["clipped"] == batch.weight.sum() and not any(x.any() for x in jax.tree.leaves(grads))


@pytest.mark.slow
def test_sampling_ends_where_generation_does(params):
    """With one nearly certain token per step, sampling equals greedy generation and ends at a stop token."""
    sharp = params | {"decoder": params["decoder"] | {"head": {"w": 1e4 * params["decoder"]["head"]["w"]}}}
    vlm, prompts = types.SimpleNamespace(config=CONFIG, model=VLM(CONFIG), params=sharp), prompts_of(seeing=False)
    alone = prompts._replace(segment=np.where(prompts.segment == 1, 1, 0))
    stop = int(generate_ids(vlm, alone, COUNT)[0, 2])
    expected = generate_ids(vlm, alone, COUNT, stop=[stop])
    draw = jax.jit(lambda params, key: sample_ids(vlm.model, params, alone, COUNT, jnp.array([stop]), key))
    tokens, own = draw(sharp, jax.random.key(0))
    np.testing.assert_array_equal(np.where(own, tokens, stop), expected)
    for row, mine in zip(expected, np.asarray(own)):
        ends = np.flatnonzero(row == stop)
        size = ends[0] + 1 if len(ends) else COUNT
        assert mine.sum() in (0, size) and mine[: mine.sum()].all()
    assert not own[EMPTY].any() and own[0].sum() <= 3


@pytest.mark.slow
def test_a_step_on_a_mesh():
    """A step makes all updates and counts as one, for a model with images; eight devices equal one."""
    params, judge, batch, found = random_params(SEEING), judge_of(SEEING), prompts_of(seeing=True), []
    for shape in ({"fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
        context = TrainContext(SEEING, OPTIM, mesh)
        state = state_from_params(context, params)
        place = lambda tree, state=state: jax.device_put(tree, jax.tree.map(lambda x: x.sharding, state.params))
        spread = judge.replace(reward=place(judge.reward), first=place(judge.first))
        rows = jax.device_put(batch, batch_shardings(batch, mesh, SEEING.runtime.rules))
        state, metrics = make_ppo_step(context, PPO, chunk=40)(state, rows, spread)
        assert int(state.step) == 1 and int(state.opt_state[0].count) == PPO.updates_per_step and metrics["finite"] == 1
        assert metrics["weight"] == metrics["targets"] and metrics["images"] == ROWS - 1
        found.append({name: float(value) for name, value in metrics.items()})
    assert {"policy_loss", "value_loss", "clipped", "moved", "reward", "kl", "length", "ended"} <= set(found[0])
    for name, expected in found[0].items():
        assert found[1][name] == pytest.approx(expected, rel=2e-3, abs=1e-4), name


@pytest.mark.slow
def test_rewards_rise(params, judge):
    """Rewards of a random reward model rise in two hundred steps from random weights."""
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    ppo = replace(PPO, kl_coef=0.01, missing_eos_penalty=0.0, length_bonus=0.0, epochs=4, cliprange_value=5.0)
    context = TrainContext(CONFIG, OPTIM, mesh)
    state, step = state_from_params(context, params), make_ppo_step(context, ppo, chunk=40)
    prompts, rewards = prompts_of(seeing=False), []
    for _ in range(200):
        state, metrics = step(state, prompts, judge)
        rewards.append(float(metrics["reward"]))
    first, last = np.array(rewards[:20]), np.array(rewards[-20:])
    assert last.mean() > first.mean() + 5 * np.hypot(first.std(), last.std()) / np.sqrt(20)
