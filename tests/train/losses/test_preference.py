"""Losses of pairs against closed forms in float64, their gradients too, and against TRL's trainer."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.train.losses.preference import PreferenceConfig, bco, dpo, ipo, preference_loss, running_mean, sft

RNG = np.random.default_rng(0)
POLICY, REFERENCE = RNG.uniform(-40, -2, (2, 13, 2))
SIZE = RNG.integers(1, 30, (13, 2)).astype(float)
RATIO = POLICY - REFERENCE
log_sigmoid = lambda x: -np.logaddexp(0, -x)


def check(ours, closed, *inputs):
    """Values, and gradients of the first input against central differences, which float64 gives to 1e-9."""
    found = ours(*(jnp.asarray(x, jnp.float32) for x in inputs))
    np.testing.assert_allclose(found, closed(*inputs), rtol=2e-5, atol=2e-5)
    grads = jax.grad(lambda x: jnp.sum(ours(x, *map(jnp.float32, inputs[1:]))))(jnp.float32(inputs[0]))
    step = 1e-5 * np.eye(2)
    difference = [(closed(inputs[0] + e, *inputs[1:]) - closed(inputs[0] - e, *inputs[1:])) / 2e-5 for e in step]
    np.testing.assert_allclose(grads, np.stack(difference, -1), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("smoothing, margin", ((0.0, 0.0), (0.2, 0.0), (0.1, 1.5)))
def test_dpo(smoothing, margin):
    def closed(ratio):
        x = 0.3 * (ratio[:, 0] - ratio[:, 1]) - margin
        return -(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)

    check(lambda ratio: dpo(ratio, 0.3, smoothing, margin), closed, RATIO)


def test_ipo():
    check(lambda ratio: ipo(ratio, 0.4), lambda ratio: (ratio[:, 0] - ratio[:, 1] - 1.25) ** 2, RATIO / SIZE)


def test_bco():
    closed = lambda ratio: -log_sigmoid(0.2 * ratio[:, 0] - 0.7) - log_sigmoid(0.7 - 0.2 * ratio[:, 1])
    check(lambda ratio: bco(ratio, 0.2, 0.7), closed, RATIO)
    assert jax.grad(lambda shift: jnp.sum(bco(jnp.asarray(RATIO), 0.2, shift)))(0.7) == 0


def test_sft():
    check(sft, lambda policy, size: -policy[:, 0] / size[:, 0], POLICY, SIZE)


def test_sums_of_losses():
    """MPO with its published weights; DDPO's average over weights; SimPO without a reference."""
    mpo = PreferenceConfig(dpo=0.8, bco=0.2, sft=1.0, beta=0.1)

    def closed(policy):
        ratio = policy - REFERENCE
        x, r = 0.1 * (ratio[:, 0] - ratio[:, 1]), 0.1 * ratio - 0.3
        quality = -log_sigmoid(r[:, 0]) - log_sigmoid(-r[:, 1])
        return -0.8 * log_sigmoid(x) + 0.2 * quality - policy[:, 0] / SIZE[:, 0]

    check(
        lambda policy: preference_loss(mpo, policy, jnp.float32(REFERENCE), jnp.float32(SIZE), 0.3)[0], closed, POLICY
    )
    dense = PreferenceConfig(dpo=1.0, beta=0.5, length_normalize=True)
    check(
        lambda policy: preference_loss(dense, policy, jnp.float32(REFERENCE), jnp.float32(SIZE), 0.0)[0],
        lambda policy: -log_sigmoid(0.5 * np.subtract(*((policy - REFERENCE) / SIZE).T)),
        POLICY,
    )
    simpo = PreferenceConfig(dpo=1.0, beta=2.0, simpo_gamma=1.0, length_normalize=True, reference="none")
    check(
        lambda policy: preference_loss(simpo, policy, 0.0, jnp.float32(SIZE), 0.0)[0],
        lambda policy: -log_sigmoid(2.0 * np.subtract(*(policy / SIZE).T) - 1.0),
        POLICY,
    )
    _, reward = preference_loss(mpo, POLICY, REFERENCE, SIZE, 0.3)
    np.testing.assert_allclose(reward, 0.1 * RATIO, rtol=1e-5)
    assert not jax.grad(lambda x: jnp.sum(preference_loss(mpo, x, REFERENCE, SIZE, 0.3)[1]))(jnp.float32(POLICY)).any()


def test_the_reference_has_no_gradient():
    loss = lambda reference: jnp.sum(preference_loss(PreferenceConfig(dpo=1.0), POLICY, reference, SIZE, 0.0)[0])
    assert not jax.grad(loss)(jnp.float32(REFERENCE)).any()


def test_running_mean():
    numbers = RNG.normal(size=50)
    mean = jnp.zeros(2)
    for part in np.split(numbers, (3, 3, 20)):
        mean = running_mean(mean, part.mean() if len(part) else 0.0, len(part))
    np.testing.assert_allclose(mean, (numbers.mean(), 50), rtol=1e-5)
    assert running_mean(jnp.zeros(2), 0.0, 0).tolist() == [0, 0]


@pytest.mark.parametrize(
    "wrong", ({"dpo": -1.0}, {"beta": 0.0}, {"label_smoothing": 0.5}, {"reference": ""}, {"dpo": 0.0})
)
def test_what_a_config_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PreferenceConfig(**{"dpo": 1.0} | wrong)


@pytest.mark.parametrize(
    "ours, theirs",
    (
        (PreferenceConfig(dpo=1.0), dict(loss_types=["sigmoid"])),
        (PreferenceConfig(dpo=1.0, length_normalize=True), dict(loss_types=["sigmoid_norm"])),
        (PreferenceConfig(ipo=1.0, length_normalize=True), dict(loss_types=["ipo"])),
        (PreferenceConfig(bco=1.0), dict(loss_types=["bco_pair"])),
        (PreferenceConfig(dpo=0.8, bco=0.2, sft=1.0), dict(loss_types=["sigmoid", "bco_pair", "sft"])),
    ),
    ids=("dpo", "average", "ipo", "bco", "mpo"),
)
def test_equals_trl(ours, theirs):
    """TRL's loss, on a model that outputs these log-probabilities; its BCO has no shift."""
    torch = pytest.importorskip("torch")
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    n, length = 6, 4
    tokens = RNG.uniform(-3, -0.1, (2 * n, length))
    given = torch.tensor(tokens, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(REFERENCE[:n] / 4)
    mask = torch.ones(2 * n, length + 1, dtype=torch.long)
    mask[:, 0] = 0  # the prompt
    model = lambda **_: types.SimpleNamespace(
        log_probs=given, entropy=torch.zeros(2 * n, length), mean_logits=torch.zeros(2 * n, length),
        is_top1=torch.zeros(2 * n, length, dtype=torch.bool),
    )  # fmt: skip
    model.training = True
    same = lambda x: x
    nobody = types.SimpleNamespace(
        model=model, beta=ours.beta, label_smoothing=0.0, f_divergence_type="reverse_kl", ld_alpha=None,
        precompute_ref_logps=True, use_weighting=False, aux_loss_enabled=False, _total_train_tokens=0, _tp_size=1,
        accelerator=types.SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        _metrics={"train": collections.defaultdict(list)},
        loss_weights=[w for w in (ours.dpo, ours.ipo, ours.bco, ours.sft) if w], **theirs,
    )  # fmt: skip
    inputs = dict(
        input_ids=torch.zeros(2 * n, length + 1, dtype=torch.long), attention_mask=torch.ones(2 * n, length + 1),
        completion_mask=mask, ref_chosen_logps=reference[:, 0], ref_rejected_logps=reference[:, 1],
    )  # fmt: skip
    expected = trainer.DPOTrainer._compute_loss(nobody, model, inputs, False)
    expected.backward()

    def loss(tokens):
        policy = jnp.stack([tokens[:n].sum(1), tokens[n:].sum(1)], axis=-1)
        size = jnp.full((n, 2), float(length))
        return jnp.mean(preference_loss(ours, policy, reference.numpy(), size, 0.0)[0])

    value, grads = jax.value_and_grad(loss)(jnp.float32(tokens))
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(grads, given.grad, rtol=1e-4, atol=1e-7)
