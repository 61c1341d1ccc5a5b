"""Vision towers: features equal transformers', positions torch's, windows those of a plain loop; published sizes."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from einops import rearrange
from flax.core import meta
from reference import assert_gradients, assert_parity, perturb
from safetensors.numpy import load_file
from transformers.models.internvl import InternVLVisionConfig, InternVLVisionModel

import mllm_jax
from mllm_jax.common.trees import flatten, unflatten
from mllm_jax.data.pipeline.hf_inputs import without_text
from mllm_jax.data.pipeline.packing import Budget, collate
from mllm_jax.families import FAMILIES
from mllm_jax.families.shared.hf_images import cut
from mllm_jax.families.towers import dinov2
from mllm_jax.families.towers.in_vlms import CLIP, EVA, INTERN, NAFLEX, SIGLIP, TOWERS, tower_for, tower_of
from mllm_jax.model.encoders.positions import resample
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.encoders.windows import window_segments
from mllm_jax.model.vlm import ModelConfig, abstract_params, count_params, example_image
from mllm_jax.nn.runtime import Runtime
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.types import ImagePatches
from mllm_jax.weights.table import expand, to_ours

SMALL = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4
)
INTERN_6B = dict(attention_bias=False, use_qk_norm=True, norm_type="rms_norm")
# (tower, transformers' config and model, what the config says beside SMALL, sizes of images in pixels)
KINDS = {
    "clip": (CLIP, transformers.CLIPVisionConfig, transformers.CLIPVisionModel, {}, [(16, 16)]),
    "siglip": (SIGLIP, transformers.SiglipVisionConfig, transformers.SiglipVisionModel, {}, [(16, 16), (20, 28)]),
    "eva": (EVA, transformers.Blip2VisionConfig, transformers.Blip2VisionModel, {}, [(16, 16), (24, 8)]),
    "intern": (INTERN, InternVLVisionConfig, InternVLVisionModel, dict(attention_bias=True), [(16, 16), (12, 20)]),
    "intern_6b": (INTERN, InternVLVisionConfig, InternVLVisionModel, INTERN_6B, [(16, 16)]),
}


def random_model(config, model, seed=0):
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = model(config).eval().float()
    perturb(model)
    return model


def convert(encoder, rows, tensors):
    """Tensors of transformers' model -> our parameters, in memory."""
    abstract = abstract_params(ModelConfig(encoder))
    leaves = {path: np.full(leaf.shape, np.nan, np.float32) for path, leaf in flatten(abstract).items()}
    for name, entry in expand(rows, abstract).items():
        leaves[entry.path][entry.index if entry.index else ...] = to_ours(tensors[name].numpy(), entry)
    return unflatten(leaves)


def features_of(encoder, params, images, budget=None):
    """Features of images in one batch row, one by one."""
    example = without_text(tuple(images))
    sizes = [len(image.patches) for image in images]
    budget = budget or Budget(1, len(images), max(sizes))
    batch = collate([[example]], budget, merge=1, values=encoder.patch_values)
    out = jax.jit(ModelConfig(encoder).build().apply)({"params": params}, batch).features
    numbers = batch.vision.image.reshape(-1)
    return [np.asarray(out[0])[numbers == number] for number in range(1, len(images) + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_features(kind):
    tower, config, model, said, sizes = KINDS[kind]
    config = config(**SMALL | said)
    reference = random_model(config, model)
    encoder = tower.from_hf(config.to_dict())
    params = convert(encoder, tower.rows(encoder, ""), reference.state_dict())
    assert all(np.isfinite(leaf).all() for leaf in flatten(params).values())
    pixels = [np.random.default_rng(i).standard_normal((3, *size), np.float32) for i, size in enumerate(sizes)]
    got = features_of(encoder, params, [cut(x, 4, encoder.num_prefix_tokens) for x in pixels])
    layers = features_of(replace(encoder, features=(-2, 0)), params, [cut(pixels[0], 4, encoder.num_prefix_tokens)])[0]
    for i, (x, features) in enumerate(zip(pixels, got)):
        interpolate = {} if tower is INTERN or i == 0 else dict(interpolate_pos_encoding=True)
        with torch.no_grad():
            out = reference(torch.from_numpy(x)[None], output_hidden_states=True, **interpolate)
        expected = out.last_hidden_state if tower is not CLIP else reference.post_layernorm(out.last_hidden_state)
        np.testing.assert_allclose(features, expected[0].detach().numpy(), atol=1e-4, rtol=1e-4)
        if i == 0:
            joined = torch.cat([out.hidden_states[-2], out.hidden_states[1]], -1)[0]
            np.testing.assert_allclose(layers, joined.numpy(), atol=1e-4, rtol=1e-4)


def test_features_of_naflex():
    """Images of several sizes in one batch, padded in transformers, packed here."""
    small = {name: value for name, value in SMALL.items() if name != "image_size"}
    config = transformers.Siglip2VisionConfig(**small, num_patches=25, vision_use_head=False)
    reference = random_model(config, transformers.Siglip2VisionModel)
    encoder = NAFLEX.from_hf(config.to_dict())
    params = convert(encoder, NAFLEX.rows(encoder, ""), reference.state_dict())
    shapes, rng = [(5, 5), (3, 7), (8, 2)], np.random.default_rng(0)
    pixels = [rng.standard_normal((3, 4 * h, 4 * w), np.float32) for h, w in shapes]
    flat = [rearrange(x, "c (h y) (w x) -> (h w) (y x c)", y=4, x=4) for x in pixels]
    padded = np.stack([np.pad(x, ((0, 25 - len(x)), (0, 0))) for x in flat])
    mask = np.stack([np.arange(25) < len(x) for x in flat]).astype(np.int64)
    with torch.no_grad():
        out = reference(*map(torch.from_numpy, (padded, mask, np.array(shapes)))).last_hidden_state.numpy()
    for mine, theirs, keep in zip(features_of(encoder, params, [cut(x, 4, 0) for x in pixels]), out, mask == 1):
        np.testing.assert_allclose(mine, theirs[keep], atol=1e-4, rtol=1e-4)


DINOV2 = {
    "plain": (transformers.Dinov2Config, transformers.Dinov2Model, dict(use_mask_token=False)),
    "gated": (transformers.Dinov2Config, transformers.Dinov2Model, dict(use_swiglu_ffn=True)),
    "registers": (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel, {}),
}


@pytest.mark.parametrize("kind", DINOV2)
def test_dinov2_in_and_out(kind, tmp_path, record_property):
    """Features of images of the size of the table and of others, and gradients; every tensor comes back bit-equal."""
    config, model, said = DINOV2[kind]
    small = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    reference = random_model(config(**small | dict(num_hidden_layers=2, mlp_ratio=2) | said), model)
    reference.save_pretrained(tmp_path / "theirs")
    tower = mllm_jax.load_pretrained(tmp_path / "theirs")

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradients_of(params, batch):
        features = tower.model.apply({"params": params}, batch).features
        return jnp.sum(jnp.sin(features)), features

    for size in ((16, 16), (32, 8), (4, 64)):  # of as many patches, for one compilation
        pixels = np.random.default_rng(0).standard_normal((2, 3, *size), np.float32)
        batch = mllm_jax.from_hf_inputs(tower.config, {"pixel_values": pixels})
        gradients, features = gradients_of(tower.params, batch)
        output = reference(torch.from_numpy(pixels)).last_hidden_state
        expected = output.detach().numpy()
        assert features.shape == expected.shape
        assert_parity(record_property, tower.config.family, features, expected)
    mllm_jax.save_pretrained(tower, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensor, ours[name])
    again, loading = model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.from_numpy(pixels)).last_hidden_state.numpy(), expected, atol=1e-5)

    torch.sin(output).sum().backward()
    assert_gradients(tower, reference, gradients, tmp_path / "gradients", unused="mask_token")


INTERPOLATION = {
    "bilinear_aligned": dict(mode="bilinear", align_corners=True),
    "bilinear_antialias": dict(mode="bilinear", antialias=True),
    "bicubic": dict(mode="bicubic"),
    "bicubic_antialias": dict(mode="bicubic", antialias=True),
}


@pytest.mark.parametrize("kind", INTERPOLATION)
def test_positions_are_resampled_as_torch_does(kind):
    """Many sizes at once, in one compiled function; the table's own size is read bit by bit."""
    side, grids = 7, [(7, 7), (3, 5), (14, 9), (7, 1), (1, 20), (2, 2), (8, 7)]
    table = np.random.default_rng(0).standard_normal((side, side, 8), np.float32)
    coords = [np.stack(np.mgrid[:1, :h, :w], -1).reshape(-1, 3) for h, w in grids]
    sizes = np.repeat(np.array(grids), [len(c) for c in coords], axis=0)
    got = np.asarray(jax.jit(resample, static_argnums=3)(table, np.concatenate(coords), sizes, kind))
    for (h, w), mine in zip(grids, np.split(got, np.cumsum([len(c) for c in coords])[:-1])):
        source = torch.from_numpy(table).permute(2, 0, 1)[None]
        theirs = torch.nn.functional.interpolate(source, size=(h, w), **INTERPOLATION[kind])[0].permute(1, 2, 0)
        np.testing.assert_allclose(mine.reshape(h, w, 8), theirs.numpy(), atol=1e-5)
    np.testing.assert_array_equal(got[: side**2].reshape(table.shape), table)


def test_windows_are_those_of_a_loop_over_images():
    side, merge, grids = 4, 2, [(8, 8), (6, 10), (2, 14), (12, 4), (2, 2)]
    example = without_text(tuple(ImagePatches(np.zeros((h * w, 1), np.float32), (h, w)) for h, w in grids))
    vision = collate([[example]], Budget(1, 2, 160), merge=merge, values=1).vision
    got = np.asarray(
        jax.jit(window_segments, static_argnums=3)(*(x[0] for x in (vision.image, vision.coords, vision.grid)), side)
    )
    for image, coords, mine in zip(vision.image[0], vision.coords[0], got):
        windows = {}
        for number, (_, y, x), segment in zip(image, coords, mine):
            windows.setdefault((number, y // side, x // side) if number else 0, set()).add(segment)
        assert all(len(segments) == 1 for segments in windows.values())
        numbers = [segments.pop() for key, segments in windows.items() if key]
        assert len(set(numbers)) == len(numbers) and min(numbers) > 0
        assert windows.get(0, {0}) == {0}


def test_layers_after_the_features_are_kept_and_do_not_run():
    config = VitConfig(32, 4, 2, 64, patch_size=4, features=(-2,), last_norm=True)
    image = example_image(config.patch_values, 4)
    apply = lambda config, params: config.build(Runtime(), name=None).apply({"params": params}, image).value
    params = jax.eval_shape(config.build(Runtime(), name=None).init, jax.random.key(0), image)["params"]
    params = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size)).reshape(x.shape), meta.unbox(params))
    jitted = jax.jit(apply, static_argnums=0)
    both = jitted(replace(config, features=(-2, -1)), params)
    np.testing.assert_allclose(jitted(config, params), both[..., :32], rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(apply(config, params)))))(params)
    sizes = jnp.abs(gradient["layers"]["mlp"]["up"]["w"]).sum(axis=(1, 2))
    assert (sizes[:3] > 0).all() and sizes[3] == 0
    loops = [e for e in jax.make_jaxpr(partial(apply, config))(params).eqns if e.primitive.name == "scan"]
    assert [loop.params["length"] for loop in loops] == [3]


EVERYTHING = VitConfig(
    width=64, layers=3, heads=4, mlp=48, patch_size=4, temporal_patch_size=1, position_grid=5, patch_bias=False,
    resampling="bicubic_antialias", class_token=True, registers=2, mask_token=True, window=4, whole=(1,), qk_norm=True,
    norm="rms", gated=True, activation="silu", layer_scale=0.5, first_norm=True, last_norm=True, features=(0, -1),
    deepstack_layers=(1,),
)  # fmt: skip


def run(runtime, mesh):
    """Features, taps and gradients of a tower with every field in use, for images and padding in four rows."""
    rng = np.random.default_rng(0)
    grids = [[(5, 5), (2, 9)], [(2, 3)], [(6, 4), (4, 4)], []]
    rows = [tuple(cut(rng.standard_normal((3, 4 * h, 4 * w), np.float32), 4, 3) for h, w in row) for row in grids]
    examples = [[without_text(row)] for row in rows]
    vision = collate(examples, Budget(1, 2, 30), merge=1, values=EVERYTHING.patch_values).vision
    boxed = jax.eval_shape(EVERYTHING.build(Runtime(), name=None).init, jax.random.key(0), vision)["params"]
    leaves = jax.tree.leaves(meta.unbox(boxed))
    weights = [rng.standard_normal(leaf.shape, np.float32) * 0.3 for leaf in leaves]
    params = jax.tree.unflatten(jax.tree.structure(meta.unbox(boxed)), weights)
    vit, real = EVERYTHING.build(runtime, name=None), (vision.image > 0)[..., None]

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params, vision):
        out = jax.tree.map(lambda x: x * real, vit.apply({"params": params}, vision))
        return sum(jnp.sum(jnp.sin(x)) for x in out), out

    with jax.set_mesh(make_mesh(mesh)) if mesh else nullcontext():
        (_, out), gradients = jax.tree.map(np.asarray, loss(params, vision))
    return out, flatten(gradients)


@pytest.fixture(scope="module")
def plain():
    return run(Runtime(), None)


@pytest.mark.parametrize(
    "runtime, mesh",
    [(Runtime(scan=False, remat="full"), None), (Runtime(), {"data": 2, "context": 2, "tensor": 2})],
    ids=["unrolled", "mesh"],
)
def test_runtime_and_mesh_change_nothing(plain, runtime, mesh):
    (expected, gradients), (features, found) = plain, run(runtime, mesh)
    assert expected.value.shape == (4, 2, 30, 128) and np.abs(expected.value).max() > 0.5
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), features, expected)
    for path, gradient in gradients.items():
        assert np.abs(gradient).max() > 0 or path in ("mask_token", "last_norm/scale"), path
        assert np.linalg.norm(found[path] - gradient) <= 1e-4 * np.linalg.norm(gradient), path


# Counted in transformers' models on torch's meta device.
PUBLISHED = {
    "clip_vision_model": {
        "b32": 87_456_000,
        "b16": 85_799_424,
        "l14": 303_179_776,
        "l14-336": 303_507_456,
        "h14": 630_766_080,
        "bigg14": 1_842_777_344,
    },
    "siglip_vision_model": {
        "base-16-224": 85_797_120,
        "base-16-256": 85_843_200,
        "base-16-384": 86_088_960,
        "base-16-512": 86_433_024,
        "base-32-256": 87_465_216,
        "large-16-256": 303_361_024,
        "large-16-384": 303_688_704,
        "large-16-512": 304_147_456,
        "so400m-14-224": 412_442_352,
        "so400m-14-384": 412_987_248,
        "so400m-16-256": 412_649_712,
        "so400m-16-384": 413_018_352,
        "so400m-16-512": 413_534_448,
        "giant-16-256": 1_134_838_272,
        "giant-16-384": 1_135_329_792,
    },
    "siglip2_vision_model": {
        "base-16": 85_843_200,
        "so400m-16": 412_649_712,
    },
    "internvl_vision": {
        "300m": 304_012_288,
        "6b": 5_536_496_000,
        "6b-224": 5_902_793_600,
    },
    "blip_2_vision_model": {
        "g14": 985_952_256,
    },
    "dinov2": {
        "small": 22_056_576,
        "small-registers": 22_058_112,
        "base": 86_580_480,
        "base-registers": 86_583_552,
        "large": 304_368_640,
        "large-registers": 304_372_736,
        "giant": 1_136_480_768,
        "giant-registers": 1_136_486_912,
    },
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_sizes_have_published_counts(kind):
    sizes = dinov2.SIZES if kind == "dinov2" else TOWERS[kind].sizes
    assert {name: sum(count_params(ModelConfig(encoder)).values()) for name, encoder in sizes.items()} == PUBLISHED[
        kind
    ]


def test_a_config_says_which_tower_it_is():
    for tower in TOWERS.values():
        for encoder in tower.sizes.values():
            assert tower_of(replace(encoder, features=(-2,))) is tower is tower_for(tower.to_hf(encoder))
            assert tower.from_hf(tower.to_hf(encoder)) == encoder
    for name in dinov2.SIZES:
        config = FAMILIES["dinov2"].config(name)
        assert FAMILIES["dinov2"].from_hf(FAMILIES["dinov2"].to_hf(config)) == config
    with pytest.raises(ValueError, match="saving encoder.window=8 would load as encoder.window=0"):
        CLIP.to_hf(replace(CLIP.base, window=8))
    with pytest.raises(ValueError, match="no kind of vision tower"):
        tower_of(replace(CLIP.base, window=8))
    with pytest.raises(ValueError, match="'vit': not supported. Did you mean '.*Supported: .*clip_vision_model"):
        tower_for({"model_type": "vit"})
    with pytest.raises(ValueError, match="image_size=.448, 224.: must be one number"):
        INTERN.from_hf({"image_size": [448, 224]})
    with pytest.raises(ValueError, match='hidden_act="mish": must be "gelu"'):
        CLIP.from_hf({"hidden_act": "mish"})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(heads=5), "not a multiple of encoder.heads=5"),
        (dict(resampling="nearest"), "VitConfig.resampling='nearest': must be one of bilinear_aligned"),
        (dict(features=(-4,)), "encoder.features=.* only 3 layers"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        VitConfig(**dict(width=64, layers=3, heads=4, mlp=96) | change)
