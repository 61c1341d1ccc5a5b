"""Dual encoders: embeddings, logits and gradients of CLIP, SigLIP and SigLIP 2 equal transformers' in fp32."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import torch
import transformers
from reference import assert_parity, perturb, to_torch
from safetensors.numpy import load_file
from tiny_dual_encoders import NAFLEX, SQUARE, inputs_of, tiny

import mllm_jax
from mllm_jax.common.trees import flatten
from mllm_jax.data.pipeline.dual_batches import packed
from mllm_jax.data.pipeline.packing import Budget, TooLarge
from mllm_jax.families import FAMILIES
from mllm_jax.families.towers import vision_only
from mllm_jax.model.vlm import abstract_params, count_params
from mllm_jax.train.losses.contrastive import contrastive_loss
from mllm_jax.weights.table import expand, to_ours

TOWERS = {"clip": "CLIPVision", "siglip": "SiglipVision", "siglip2": "Siglip2Vision"}


@pytest.fixture(scope="module", params=TOWERS)
def pair(request, tmp_path_factory):
    """transformers' model, the same read from its folder, and the compiled function."""
    model, folder = tiny(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    ours = mllm_jax.load_pretrained(folder)
    assert ours.config.family == request.param
    return ours, model, jax.jit(ours.model.apply)


def assert_equal(record_property, family, found, expected):
    for name, theirs in (
        ("image_embeddings", expected.image_embeds),
        ("text_embeddings", expected.text_embeds),
        ("logits", expected.logits_per_image),
    ):
        theirs = theirs.detach().numpy()
        assert np.abs(theirs).max() > 0.1
        assert_parity(record_property, family, getattr(found, name), theirs)


def theirs(model, inputs, **options):
    with torch.no_grad():
        return model(**to_torch(inputs), **options)


def test_embeddings_and_logits(pair, record_property):
    ours, model, apply = pair
    inputs = inputs_of(ours.config.family)
    found = apply({"params": ours.params}, mllm_jax.from_hf_inputs(ours.config, inputs))
    assert_equal(record_property, ours.config.family, found, theirs(model, inputs))


def test_images_of_other_sizes(pair, record_property):
    """Positions are interpolated as transformers interpolates them; NaFlex takes any shapes through one program."""
    ours, model, apply = pair
    kind = ours.config.family
    if kind == "siglip2":
        # None is one patch wide and higher than that: there torch 2.13 skips the resampling along the height.
        cases = [dict(shapes=((1, 24), (5, 4), (4, 4))), dict(shapes=((8, 3), (12, 2), (1, 1)))]
        cases, options = [inputs_of(kind, **case) for case in cases], {}
    else:
        cases = [inputs_of(kind, size=size) for size in ((24, 32), (8, 20))]
        options = dict(interpolate_pos_encoding=True)
    for inputs in cases:
        found = apply({"params": ours.params}, mllm_jax.from_hf_inputs(ours.config, inputs))
        assert_equal(record_property, ours.config.family, found, theirs(model, inputs, **options))
    if kind == "siglip2":
        assert apply._cache_size() == 1


def test_images_or_texts_alone(pair):
    ours, _, apply = pair
    inputs = inputs_of(ours.config.family)
    both = apply({"params": ours.params}, mllm_jax.from_hf_inputs(ours.config, inputs))
    texts = {name: inputs.pop(name) for name in ("input_ids", "attention_mask") if name in inputs}
    for name, arrays in (("image_embeddings", inputs), ("text_embeddings", texts)):
        found = apply({"params": ours.params}, mllm_jax.from_hf_inputs(ours.config, arrays))
        np.testing.assert_allclose(getattr(found, name), getattr(both, name), atol=1e-6)
        assert found.logits is None and (found.image_embeddings is None) != (found.text_embeddings is None)


def test_packed_images(pair):
    """Several images in one patch row have the same embeddings as each in its own row, in order."""
    ours, _, apply = pair
    inputs = inputs_of(ours.config.family)
    expected = apply({"params": ours.params}, mllm_jax.from_hf_inputs(ours.config, inputs)).image_embeddings
    images = {"siglip2": vision_only.images_of_any_size}.get(ours.config.family, vision_only.square_images)
    images = images(ours.config, inputs)
    batch = packed(images[::-1], Budget(0, patch_rows=2, patches_per_row=36), count=2)
    assert (batch.first < 0).any() and (batch.vision.image[:, 0].max(axis=1) == [2, 1]).all()
    found = jax.jit(partial(ours.model.apply, method="encode_image"))({"params": ours.params}, batch)
    np.testing.assert_allclose(found[::-1], expected, atol=1e-5)
    with pytest.raises(TooLarge, match="3 images do not fit 1 rows of 36 patches"):
        packed(images, Budget(0, patch_rows=1, patches_per_row=36), count=2)


def test_gradients_of_every_tensor(pair):
    ours, model, _ = pair
    inputs = inputs_of(ours.config.family, texts=3)
    model.zero_grad()
    loss = model(**to_torch(inputs), return_loss=True).loss
    loss.backward()
    batch = mllm_jax.from_hf_inputs(ours.config, inputs)

    @jax.jit
    def compute(params):
        def loss(params):
            out = ours.model.apply({"params": params}, batch)
            scale = ours.model.apply({"params": params}, method="temperature")
            return contrastive_loss(ours.config.loss, out.image_embeddings, out.text_embeddings, *scale)

        return jax.value_and_grad(loss)(params)

    found, gradients = compute(ours.params)
    np.testing.assert_allclose(found, loss.item(), rtol=1e-5)
    entries = expand(FAMILIES[ours.config.family].weights(ours.config), ours.params)
    gradients = flatten(gradients)
    for name, parameter in model.named_parameters():
        entry = entries[name]
        expected = to_ours(parameter.grad.numpy(), entry)
        own = np.asarray(gradients[entry.path])[entry.index if entry.index else ...]
        if "k_proj.bias" in name:  # adds the same to all scores of a query: no gradient but rounding
            assert np.abs(own).max() < 1e-5
            continue
        if name.endswith("head.attention.in_proj_bias"):
            own, expected = own[[0, 2]], expected[[0, 2]]
        assert np.abs(expected).max() > 0, name
        assert np.linalg.norm(own - expected) <= 1e-3 * np.linalg.norm(expected), name


def test_export(pair, tmp_path):
    """transformers loads what is saved, its logits are those of before, and every tensor is the same to the bit."""
    ours, model, _ = pair
    inputs = inputs_of(ours.config.family)
    mllm_jax.save_pretrained(ours, tmp_path / "ours")
    loaded, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = theirs(model, inputs), theirs(loaded.eval(), inputs)
    np.testing.assert_allclose(after.logits_per_image, before.logits_per_image, atol=1e-5)
    model.save_pretrained(tmp_path / "theirs")
    written, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[name], expected[name]) for name in expected)
    assert mllm_jax.load_pretrained(tmp_path / "ours").config == ours.config


def test_a_text_ends_at_its_highest_token(tmp_path, record_property):
    """Files with the old eos_token_id=2 pool a text at its highest token id, as transformers does."""
    model = tiny("clip", eos_token_id=2)
    model.save_pretrained(tmp_path)
    ours = mllm_jax.load_pretrained(tmp_path)
    inputs = inputs_of("clip")
    batch = mllm_jax.from_hf_inputs(ours.config, inputs)
    found = jax.jit(ours.model.apply)({"params": ours.params}, batch)
    assert_equal(record_property, ours.config.family, found, theirs(model, inputs))
    assert FAMILIES["clip"].to_hf(ours.config)["text_config"]["eos_token_id"] == 2


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_alone(kind, tmp_path, record_property):
    name = TOWERS[kind]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**(NAFLEX if kind == "siglip2" else SQUARE))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}Model")(config).eval().float()
    perturb(model)
    model.save_pretrained(tmp_path / "theirs")
    ours = mllm_jax.load_pretrained(tmp_path / "theirs")
    inputs = inputs_of(kind)
    pixels = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    out = ours.model.apply({"params": ours.params}, mllm_jax.from_hf_inputs(ours.config, pixels))
    found, wanted = np.asarray(out.features), theirs(model, pixels)
    expected = wanted.last_hidden_state.numpy()[:, : found.shape[1]]
    real = pixels.get("pixel_attention_mask", np.ones(expected.shape[:2]))[:, : found.shape[1]] == 1
    assert_parity(record_property, ours.config.family, found[real], expected[real])
    if kind != "clip":
        assert_parity(record_property, ours.config.family, out.pooled, wanted.pooler_output.numpy())
    mllm_jax.save_pretrained(ours, tmp_path / "ours")
    written, published = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    # A tower's own names begin with "vision_model." in published files; transformers 5 leaves that out for CLIP's.
    published = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in published.items()}
    assert written.keys() == published.keys()
    assert all(np.array_equal(written[key], published[key]) for key in written)
    loaded, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = theirs(loaded.eval(), pixels).last_hidden_state.numpy()[:, : found.shape[1]]
    np.testing.assert_allclose(again[real], expected[real], atol=1e-4)


@pytest.mark.parametrize("family", ["siglip_vision_model", "siglip2_vision_model"])
def test_a_tower_with_or_without_its_head(family):
    """A tower with a head has all tensors of transformers' model."""
    family = FAMILIES[family]
    for name in list(family.sizes)[::7]:
        config = family.config(name)
        fields = family.to_hf(config)
        assert family.from_hf(fields) == config
        with torch.device("meta"):
            kind = fields.pop("model_type")
            model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **fields))
        ours = {name: entry.shape for name, entry in expand(family.weights(config), abstract_params(config)).items()}
        theirs = {f"vision_model.{key.removeprefix('vision_model.')}": x for key, x in model.state_dict().items()}
        assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
        headless = family.from_hf(fields | {"vision_use_head": False})
        assert headless.pool is None and headless.encoder == config.encoder
    with pytest.raises(ValueError, match="cannot represent this model: saving pool.heads=3 would load as"):
        family.to_hf(replace(config, pool=replace(config.pool, heads=3)))


COUNTS = {  # parameters, and what the authors or OpenCLIP's table of models say they are, in millions
    "clip b32": (151_277_313, "151.28"),
    "clip b16": (149_620_737, "149.62"),
    "clip l14": (427_616_513, "427.62"),
    "clip l14-336": (427_944_193, "427.94"),
    "clip h14": (986_109_441, "986.11"),
    "clip bigg14": (2_539_567_105, "2539.57"),
    "siglip base-16-224": (203_155_970, "203.16"),
    "siglip large-16-256": (652_150_786, "652.15"),
    "siglip so400m-14-224": (877_360_306, "877.36"),
    "siglip so400m-14-384": (877_960_498, "877.96"),
    "siglip 2-base-16-224": (375_187_970, "375.19"),
    "siglip 2-large-16-256": (881_526_786, "881.53"),
    "siglip 2-so400m-14-384": (1_136_008_498, "1136.01"),
    "siglip 2-giant-16-256": (1_871_393_906, "1871.39"),
    "siglip2 base-16": (375_234_050, "375.23"),
    "siglip2 so400m-16": (1_135_670_962, "1135.67"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    """Names and shapes of all tensors are transformers', and there are as many parameters as published."""
    kind, size = name.split()
    family, (total, stated) = FAMILIES[kind], COUNTS[name]
    config = family.config(size)
    assert sum(count_params(config).values()) == total
    assert f"{total / 1e6:.2f}" == stated
    fields = family.to_hf(config)
    assert family.from_hf(fields) == config
    with torch.device("meta"):
        kind = fields.pop("model_type")
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **fields))
    ours = {name: entry.shape for name, entry in expand(family.weights(config), abstract_params(config)).items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_configs_that_say_little():
    """Published configs leave out default values."""
    tower, text = {"model_type": "siglip_vision_model"}, {"model_type": "siglip_text_model"}
    stated = {"model_type": "siglip", "text_config": text, "vision_config": tower}
    assert FAMILIES["siglip"].from_hf(stated) == FAMILIES["siglip"].config("base-16-224")
    second = stated | {"text_config": text | {"vocab_size": 256000}, "vision_config": tower | {"image_size": 512}}
    assert FAMILIES["siglip"].from_hf(second) == FAMILIES["siglip"].config("2-base-16-512")
    published = {"model_type": "clip", "projection_dim": 512, "text_config": {"eos_token_id": 49407}}
    assert FAMILIES["clip"].from_hf(published) == FAMILIES["clip"].config("b32")


def test_refusals(pair):
    config = pair[0].config
    inputs = inputs_of(config.family)
    refused = [
        (
            {"input_ids": None, "pixel_values": None, "spatial_shapes": None, "pixel_attention_mask": None},
            "needs pixel_",
        ),
        ({"attention_mask": np.ones((1, 1))}, "must be .texts T."),
        ({"image_sizes": np.ones((1, 2))}, "unknown inputs .'image_sizes'"),
        ({"pixel_values": inputs["pixel_values"][0]}, "pixel_values"),
    ]
    if config.family != "clip":
        refused += [({"attention_mask": np.array([[1] * 12, [1] * 11 + [0]])}, "read its padding")]
    if config.family == "siglip2":
        refused += [
            ({"spatial_shapes": None}, "spatial_shapes: is missing"),
            ({"spatial_shapes": np.ones((3, 2), int)}, "as many"),
        ]
    for change, message in refused:
        with pytest.raises(ValueError, match=message):
            mllm_jax.from_hf_inputs(config, inputs | change)


def test_refused_configs():
    with pytest.raises(ValueError, match="vision_config.vision_use_head=false: must be true"):
        FAMILIES["siglip"].from_hf({"model_type": "siglip", "vision_config": {"vision_use_head": False}})
    with pytest.raises(ValueError, match="projection_size=96: must be vision_config.hidden_size=768"):
        FAMILIES["siglip"].from_hf({"model_type": "siglip", "text_config": {"projection_size": 96}})
    with pytest.raises(ValueError, match="no size 'b64'. Choose one of b32"):
        FAMILIES["clip"].config("b64")
    with pytest.raises(
        ValueError,
        match="saving image_pool.*mlp=4304 would load as image_pool.*mlp=3072",
    ):
        sizes = FAMILIES["siglip"].sizes
        pool = sizes["so400m-14-224"].image_pool
        FAMILIES["siglip"].to_hf(replace(sizes["base-16-224"], image_pool=pool))
    with pytest.raises(ValueError, match="loss='.*': must be one of softmax, sigmoid"):
        replace(FAMILIES["clip"].config("b32"), loss="hinge")
    with pytest.raises(ValueError, match="must be one of end, highest, last"):
        replace(FAMILIES["clip"].config("b32").text_pool, token="mean")
