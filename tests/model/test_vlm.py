"""Changes that must keep a model's output (layout, placement, runtime, padding) and those that must not (pixels)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import VALUES, random_example, random_params, tiny_config

from mllm_jax.common.trees import flatten
from mllm_jax.data.pipeline.packing import Budget, collate
from mllm_jax.model.connectors.mlp import MlpConnectorConfig
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.vlm import VLM, InputRules, abstract_params
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.types import Vision

TINY = tiny_config()
ROW = Budget(48, 2, 64)


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


def logits(params, batch, config=TINY):
    return np.asarray(jax.jit(VLM(config).apply)({"params": params}, batch).logits)


def batch_of(*grids, budget=ROW, seed=0):
    example = random_example(np.random.default_rng(seed), 9, *grids)
    return collate([[example]], budget, merge=2, values=VALUES)


@pytest.mark.parametrize(
    "runtime", [Runtime(scan=False), Runtime(remat="full"), Runtime(scan=False, remat="dots")], ids=str
)
def test_runtime_changes_nothing(params, runtime):
    batch = batch_of((4, 6), (2, 4))
    expected = logits(params, batch)
    np.testing.assert_allclose(logits(params, batch, replace(TINY, runtime=runtime)), expected, atol=1e-5)


def test_bfloat16_is_close(params):
    batch = batch_of((4, 6))
    rough = logits(params, batch, replace(TINY, runtime=Runtime(dtype="bfloat16")))
    exact = logits(params, batch)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()


def test_raw_pixels_equal_normalized_ones(params):
    batch = batch_of((4, 6), (2, 2))
    raw = np.random.default_rng(0).integers(0, 256, batch.vision.patches.shape, np.uint8)
    normal = ((raw / 255 - 0.5) / 0.5).astype(np.float32)
    as_raw, as_normal = (batch._replace(vision=batch.vision._replace(patches=p)) for p in (raw, normal))
    np.testing.assert_allclose(logits(params, as_raw), logits(params, as_normal), atol=1e-5)


def test_pixels_reach_the_answer(params):
    batch = batch_of((4, 6))
    other = batch._replace(vision=batch.vision._replace(patches=batch.vision.patches[..., ::-1].copy()))
    assert np.abs(logits(params, batch) - logits(params, other)).max() > 1e-2


def test_where_a_image_lies_changes_nothing(params):
    """More rows, longer rows and other places of images: the same logits."""
    grids = ((4, 6), (2, 4), (6, 2))
    expected = logits(params, batch_of(*grids, budget=Budget(48, 1, 48)))
    for budget in (Budget(48, 2, 36), Budget(48, 4, 24), Budget(48, 3, 100)):
        np.testing.assert_allclose(logits(params, batch_of(*grids, budget=budget)), expected, atol=1e-5)


def test_a_batch_without_images_needs_no_vision(params):
    empty = batch_of()
    np.testing.assert_allclose(logits(params, empty), logits(params, empty._replace(vision=None)), atol=1e-6)


def test_padding_of_patches_changes_nothing(params):
    batch = batch_of((4, 6))
    padding = (batch.vision.image == 0)[..., None]
    noise = np.random.default_rng(3).integers(1, 256, batch.vision.patches.shape).astype(batch.vision.patches.dtype)
    noisy = batch._replace(vision=batch.vision._replace(patches=np.where(padding, noise, batch.vision.patches)))
    np.testing.assert_array_equal(logits(params, batch), logits(params, noisy))


def test_an_ambient_mesh_changes_nothing(params):
    """Others are in tests/train/step/test_train_step.py and tests/plan/test_certify.py, with gradients."""
    rng = np.random.default_rng(5)
    rows = [[random_example(rng, 9, (4, 6), (2, 2)), random_example(rng, 5)] for _ in range(8)]
    batch = collate(rows, ROW, merge=2, values=VALUES)
    expected = logits(params, batch)
    with jax.set_mesh(make_mesh({"tensor": 2, "data": 4})):
        np.testing.assert_allclose(logits(params, batch), expected, atol=1e-5)


CONNECTORS = [PatchMergerConfig(), PatchMergerConfig(merge=1)]


@pytest.mark.parametrize("connector", CONNECTORS, ids=str)
def test_connector(connector):
    """Shape; what stands in padding changes no real token; a gradient reaches every weight."""
    config = replace(TINY, connector=connector)
    params = random_params(config)
    image = np.array([[[1] * 16 + [2] * 8 + [0] * 8, [3] * 4 + [0] * 28]], np.int32)
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((1, 2, 32, VALUES)).astype(np.float32)
    coords = np.repeat(np.arange(32, dtype=np.int32)[None, None, :, None], 2, axis=1) * np.array([0, 1, 0])
    grid = np.full((1, 2, 32, 2), 32, np.int32)

    @jax.jit
    def encode(params, patches):
        vision = Vision(patches, image, coords.astype(np.int32), grid)
        return VLM(config).apply({"params": params}, vision, method="encode")

    tokens = encode(params, patches)
    count = 64 // connector.patches_per_token
    assert tokens.embeddings.shape == (1, count, config.decoder.width)
    assert tokens.deep.shape == (len(config.encoder.deepstack_layers), 1, count, config.decoder.width)
    noisy = encode(params, np.where((image == 0)[..., None], 7.0, patches))
    real = image.reshape(1, count, -1)[..., 0] > 0
    np.testing.assert_array_equal(noisy.embeddings[real], tokens.embeddings[real])
    np.testing.assert_array_equal(noisy.deep[:, real], tokens.deep[:, real])
    weights = rng.standard_normal((count, config.decoder.width)).astype(np.float32)

    def loss(params):
        tokens = encode(params, patches)
        return jnp.sum(jnp.square(tokens.embeddings) * weights) + jnp.sum(jnp.square(tokens.deep) * weights)

    for path, gradient in flatten(jax.jit(jax.grad(loss))(params)["connector"]).items():
        assert np.abs(gradient).max() > 0, path


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 5}, "multiple of attention.kv_heads"),
        ({"rope_sections": (1, 2, 3)}, "must sum to head_dim / 2"),
    ],
)
def test_bad_attention(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY.decoder.attention, **change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"connector": None}, "needs a connector"),
        (
            {"inputs": InputRules(pinpoints=((32, 32),))},
            "pinpoints=.*: rows of tiles end with a newline, which PatchMergerConfig.* does not have",
        ),
        (
            {"connector": MlpConnectorConfig()},
            "encoder.deepstack_layers=.* the model has MlpConnectorConfig.*encoder.deepstack_layers=..",
        ),
        (
            {"decoder": replace(TINY.decoder, layers=1)},
            "encoder.deepstack_layers=.0, 1.: .* as many decoder layers.* decoder.layers=1",
        ),
    ],
)
def test_a_connector_that_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        abstract_params(replace(TINY, **change))


def test_bad_runtime_and_mesh():
    with pytest.raises(ValueError, match="Runtime.dtype"):
        Runtime(dtype="float16")
    with pytest.raises(ValueError, match="Runtime.remat"):
        Runtime(remat="some")
    with pytest.raises(ValueError, match="does not cover 8 devices"):
        make_mesh({"data": 3})
    with pytest.raises(ValueError, match="unknown mesh axes"):
        make_mesh({"model": 8})
