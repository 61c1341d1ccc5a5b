"""The formulas of PPO and of reward models against loops over tokens in float64: values, gradients, signs, clipping."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.train.algorithms.ppo_step import minibatches
from mllm_jax.train.losses.ppo import PpoConfig, advantages, policy_loss, token_rewards, value_loss, whitened
from mllm_jax.train.losses.reward import pairwise_loss

RNG = np.random.default_rng(0)
B, T = 5, 11
START, SIZE = np.array([0, 3, 2, 10, 4]), np.array([11, 5, 1, 1, 0])  # of the answers; one fills its row, one is none
REAL = (np.arange(T) >= START[:, None]) & (np.arange(T) < (START + SIZE)[:, None])
LOG_PROBS, REFERENCE, VALUES, REWARDS = RNG.normal(size=(4, B, T))
SCORE = RNG.normal(size=B)
f32 = lambda *arrays: (jnp.asarray(x, jnp.float32) for x in arrays)
answers = [(b, range(START[b], START[b] + SIZE[b])) for b in range(B)]


# Most of a test is compilation.
estimated, normed, shaped = map(jax.jit, (advantages, whitened, token_rewards))


def with_gradient(loss, *inputs):
    """(what a loss returns for numbers of its first input, the gradient of its sum by these)."""

    def summed(x, *rest):
        found = loss(x, *rest)
        return jnp.sum(found[0] if isinstance(found, tuple) else found), found

    grads, found = jax.jit(jax.grad(summed, has_aux=True))(*f32(*inputs))
    return found, np.asarray(grads)


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def differences(f, x, step=1e-5):
    """Gradient of the sum of f[...] by x[...], elementwise, in float64."""
    return (f(x + step) - f(x - step)) / (2 * step)


def test_token_rewards():
    expected = np.zeros((B, T))
    for b, places in answers:
        for t in places:
            expected[b, t] = -0.3 * (LOG_PROBS[b, t] - REFERENCE[b, t]) + (SCORE[b] if t == places[-1] else 0)
    close(shaped(*f32(SCORE, LOG_PROBS, REFERENCE), REAL, 0.3), expected)


@pytest.mark.parametrize("gamma, lam", ((1.0, 1.0), (0.9, 0.7), (1.0, 0.0), (0.5, 1.0)))
def test_advantages_are_sums_of_discounted_surprises(gamma, lam):
    """Equals the double sum of the definition; with lambda 1, the discounted return minus the value."""
    expected = np.zeros((B, T))
    for b, places in answers:
        value = lambda t, b=b, places=places: VALUES[b, t] if t in places else 0.0
        for t in places:
            delta = [REWARDS[b, s] + gamma * value(s + 1) - value(s) for s in range(t, places[-1] + 1)]
            expected[b, t] = sum((gamma * lam) ** k * d for k, d in enumerate(delta))
    found = estimated(*f32(REWARDS, VALUES), REAL, gamma, lam)
    close(found, expected)
    if lam == 1:
        returns = [
            [sum(gamma ** (s - t) * REWARDS[b, s] for s in places if s >= t) for t in places] for b, places in answers
        ]
        close((found + VALUES)[REAL], np.concatenate(returns))
    other = np.where(REAL, VALUES, 1e6)  # what is no answer's changes nothing
    close(estimated(*f32(np.where(REAL, REWARDS, -1e6), other), REAL, gamma, lam), expected)


def test_whitened():
    found = np.asarray(normed(jnp.float32(3 + 2 * VALUES), REAL))
    assert abs(found[REAL].mean()) < 1e-6 and found[REAL].std() == pytest.approx(1, abs=1e-5) and not found[~REAL].any()
    own = (VALUES - VALUES[REAL].mean()) / VALUES[REAL].std()
    close(found[REAL], own[REAL])
    assert not np.asarray(normed(jnp.float32(VALUES), np.zeros((B, T), bool))).any()


def test_policy_loss_and_its_gradient():
    advantage, moved = RNG.normal(size=(B, T)), LOG_PROBS + RNG.uniform(-0.6, 0.6, (B, T))

    def closed(now):
        ratio = np.exp(now - LOG_PROBS)
        return -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)

    (loss, clipped), grads = with_gradient(policy_loss, moved, LOG_PROBS, advantage, 0.2)
    close(loss, closed(moved))
    close(grads, differences(closed, moved))
    ratio = np.exp(moved - LOG_PROBS)
    outside = ((ratio > 1.2) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))
    np.testing.assert_array_equal(clipped, outside)
    assert 0 < outside.sum() < outside.size and not grads[outside].any() and grads[~outside].all()
    assert (
        np.sign(grads[~outside]) == -np.sign(advantage[~outside])
    ).all()  # descent raises what was better than expected


def test_value_loss_and_its_gradient():
    returns, moved = RNG.normal(size=(B, T)), VALUES + RNG.uniform(-0.6, 0.6, (B, T))

    def closed(now):
        bounded = np.clip(now, VALUES - 0.2, VALUES + 0.2)
        return 0.5 * np.maximum((now - returns) ** 2, (bounded - returns) ** 2)

    loss, grads = with_gradient(value_loss, moved, VALUES, returns, 0.2)
    close(loss, closed(moved))
    close(grads, differences(closed, moved))
    beyond = (np.abs(moved - VALUES) > 0.2) & (
        (moved - returns) ** 2 < (np.clip(moved, VALUES - 0.2, VALUES + 0.2) - returns) ** 2
    )
    assert 0 < beyond.sum() < beyond.size and not grads[beyond].any()


def test_minibatches_have_every_row_once_an_epoch():
    ppo = PpoConfig(epochs=3, num_mini_batches=2)
    parts = np.asarray(minibatches(8, ppo, jax.random.key(0)))
    assert parts.shape == (6, 4)
    for epoch in parts.reshape(3, 8):
        assert sorted(epoch) == list(range(8))
    assert (parts[:2] != parts[2:4]).any()


def test_pairwise_loss_equals_trl():
    """TRL's loss of reward models, on a model that outputs these rewards; gradients too."""
    torch = pytest.importorskip("torch")
    trainer = pytest.importorskip("trl.trainer.reward_trainer")
    n, given = 6, RNG.normal(size=(6, 2))
    told = torch.tensor(np.concatenate([given[:, 0], given[:, 1]])[:, None], requires_grad=True)
    model = lambda **_: types.SimpleNamespace(logits=told)
    model.training = True
    same = lambda x: x
    nobody = types.SimpleNamespace(
        model=model, args=types.SimpleNamespace(center_rewards_coefficient=0.05), aux_loss_enabled=False,
        accelerator=types.SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same),
        _total_train_tokens=0, _tp_size=1, _metrics={"train": collections.defaultdict(list)},
    )  # fmt: skip
    inputs = dict(input_ids=torch.zeros(2 * n, 1, dtype=torch.long), attention_mask=torch.ones(2 * n, 1))
    expected = trainer.RewardTrainer.compute_loss(nobody, model, inputs)
    expected.backward()
    ours = lambda reward: jnp.mean(pairwise_loss(reward, 0.05))
    value, grads = jax.value_and_grad(ours)(jnp.float32(given))
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    close(grads, told.grad.numpy().reshape(2, n).T, 1e-6)


@pytest.mark.parametrize(
    "wrong",
    (
        {"epochs": 0},
        {"cliprange": 1.0},
        {"gae_lambda": 1.5},
        {"kl_coef": -0.1},
        {"response_length": 0},
        {"reference": "none"},
    ),
)
def test_what_a_config_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PpoConfig(**wrong)
