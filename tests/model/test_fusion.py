"""Fusion of vision into the decoder: DeepStack's sum and gradient, and a scan that saves no mask of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.model.fusion import deepstack, splice
from mllm_jax.types import TokenBlend

B, T, M, D, TAPS, LAYERS = 2, 7, 5, 4, 2, 3
INDEX = np.array([[-1, 3, 0, 1, -1, 4, 2], [-1] * 6 + [0]], np.int32)


@pytest.fixture(scope="module")
def arrays():
    draw = np.random.default_rng(0).standard_normal
    return draw((B, T, D), np.float32), draw((TAPS, B, M, D), np.float32)


def scanned(x, deep):
    """Layers that square what they read, each with its tap."""
    layer = lambda x, number: (deepstack(jnp.square(x), deep, INDEX, number), None)
    return jnp.sum(jax.lax.scan(layer, x, jnp.arange(LAYERS))[0])


def one_by_one(x, deep):
    """The same by scattering; layers without a tap get nothing."""
    for number in range(LAYERS):
        x = jnp.square(x)
        for row, position in zip(*np.nonzero(INDEX >= 0)) if number < TAPS else ():
            x = x.at[row, position].add(deep[number, row, INDEX[row, position]])
    return jnp.sum(x)


def test_taps_reach_the_first_layers_and_gradients_the_taps(arrays):
    for found, wanted in zip(*(jax.value_and_grad(run, (0, 1))(*arrays) for run in (scanned, one_by_one))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


def test_a_scan_saves_neither_masks_nor_features(arrays):
    """Each layer saves only the array that squaring needs."""
    forward = jax.make_jaxpr(jax.grad(scanned, (0, 1)))(*arrays).eqns
    (scan,) = (step for step in forward if step.primitive.name == "scan" and not step.params["reverse"])
    saved = [out.aval for out in scan.outvars if out.aval.shape[:1] == (LAYERS,) and out.aval.size > LAYERS]
    assert [(x.shape, x.dtype) for x in saved] == [((LAYERS, B, T, D), jnp.float32)]


def test_splice(arrays):
    text, visual = arrays[0], arrays[1][0]
    found = np.asarray(splice(text, visual, INDEX))
    np.testing.assert_array_equal(found[INDEX < 0], text[INDEX < 0])
    np.testing.assert_array_equal(found[0, INDEX[0] >= 0], visual[0, INDEX[0][INDEX[0] >= 0]])


def test_mixes_of_four(arrays):
    """A share of each token; what DeepStack adds is mixed alike."""
    text, deep = arrays
    draw = np.random.default_rng(1)
    mix = TokenBlend(draw.integers(0, M, (B, T, 3)), draw.random((B, T, 4), np.float32))
    every = np.concatenate([np.maximum(INDEX, 0)[..., None], mix.index], axis=-1)
    mixed = np.einsum("btkd,btk->btd", deep[0][np.arange(B)[:, None, None], every], mix.weight)
    seen = INDEX >= 0
    np.testing.assert_allclose(splice(text, deep[0], INDEX, mix)[seen], mixed[seen], rtol=1e-5)
    np.testing.assert_array_equal(splice(text, deep[0], INDEX, mix)[~seen], text[~seen])
    np.testing.assert_allclose(deepstack(text, deep, INDEX, 0, mix)[seen], (text + mixed)[seen], rtol=1e-4, atol=1e-6)
