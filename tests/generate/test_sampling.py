"""The choice of a token: closed forms of the distributions that temperature, top-k and top-p leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.generate.sampling import Sampling, greedy, make_sampling, sample, truncated

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32)
LOGITS = np.log(PROBABILITIES)


def kept(**settings):
    """The distribution after truncation."""
    settings = {name: jnp.array([value]) for name, value in settings.items()}
    return np.asarray(jax.nn.softmax(truncated(jnp.asarray(LOGITS)[None], **settings), axis=-1))[0]


@pytest.mark.parametrize(
    "settings, tokens",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 0}, [0, 1, 2, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.84}, [1, 3, 4]),
        ({"top_p": 0.9}, [1, 2, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 3, "top_p": 0.6}, [1, 3]),  # of 0.85: 0.47, 0.29, 0.24
    ],
)
def test_truncated_keeps_the_likeliest(settings, tokens):
    expected = np.zeros(5)
    expected[tokens] = PROBABILITIES[tokens] / PROBABILITIES[tokens].sum()
    np.testing.assert_allclose(kept(**settings), expected, atol=1e-6)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"temperature": 1.0}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        ({"temperature": 2.0, "top_k": 2}, np.sqrt([0, 0.4, 0, 0.25, 0]) / np.sqrt([0.4, 0.25]).sum()),
    ],
)
def test_draws_follow_the_distribution(settings, expected):
    rows = 20_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (rows, 5))
    drawn = sample(logits, make_sampling(rows, **settings), jax.random.key(3))
    shares = np.bincount(np.asarray(drawn), minlength=5) / rows
    np.testing.assert_allclose(shares, expected, atol=0.015)  # four standard deviations


def test_rows_have_their_own_settings():
    rows = 3000
    temperature = np.tile([0.0, 1.0, 1.0], rows // 3)
    sampling = make_sampling(rows, temperature, top_k=np.tile([0, 1, 0], rows // 3))
    drawn = np.asarray(sample(jnp.broadcast_to(jnp.asarray(LOGITS), (rows, 5)), sampling, jax.random.key(0)))
    assert set(drawn[0::3]) == set(drawn[1::3]) == {1}
    assert set(drawn[2::3]) == {0, 1, 2, 3, 4}


def test_greedy_takes_the_first_of_equals():
    logits = jnp.array([[1.0, 3.0, 3.0, -2.0], [-jnp.inf, -jnp.inf, -jnp.inf, -5.0], [7.0, 7.0, 7.0, 7.0]])
    assert greedy(logits).tolist() == [1, 3, 0]
    random = np.random.default_rng(0).standard_normal((17, 1001)).astype(np.float32)
    assert greedy(jnp.asarray(random)).tolist() == random.argmax(-1).tolist()
    assert 0 <= int(greedy(jnp.full((1, 4), jnp.nan))[0]) < 4


def test_what_is_off_costs_nothing():
    assert make_sampling(4) == Sampling() == make_sampling(4, 0.0, top_k=5, top_p=0.5)
    assert make_sampling(4, 1.0).top_k is None and make_sampling(4, 1.0).top_p is None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": [1, 1]}, "one per row"),
        ({"temperature": [0, 1, float("inf")]}, "temperature=inf: must be finite and at least 0"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k=1.5: needs an integer"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        make_sampling(3, **settings)
