"""Logits and gradients equal transformers' on random tiny weights, in fp32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import assert_parity, batch_of, prompt, published, tiny_qwen3_vl, to_torch

from mllm_jax.common.trees import flatten, unflatten
from mllm_jax.families import FAMILIES
from mllm_jax.model.vlm import VLM, abstract_params
from mllm_jax.nn.runtime import Runtime
from mllm_jax.pretrained.api import from_hf_inputs
from mllm_jax.weights.table import expand, to_ours

FAMILY = FAMILIES["qwen3_vl"]
CASES = {
    "text": [(12,)],
    "one_image": [(3, ("image", 4, 6), 4)],
    "images": [(3, ("image", 4, 6), 2, ("image", 8, 2), ("image", 2, 2), 5)],
    "video": [(2, ("video", 3, 4, 4), 6)],
    "image_and_video": [(3, ("image", 6, 10), 4, ("video", 2, 4, 6), 5, ("image", 2, 4), 1)],
    "batch": [(3, ("image", 4, 6), 4), (17,), (1, ("video", 2, 4, 4), 2, ("image", 12, 4), 9)],
}


def convert(config, tensors):
    """Tensors of transformers' model -> our parameters, in memory."""
    abstract = abstract_params(config)
    stacked = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flatten(abstract).items()}
    for name, entry in expand(FAMILY.weights(config), abstract).items():
        array = to_ours(tensors[name].numpy(), entry)
        stacked[entry.path][entry.index if entry.index else ...] = array
    return unflatten(stacked)


@pytest.fixture(scope="module", params=["untied", "tied", "experts"])
def pair(request):
    config, reference = tiny_qwen3_vl(tie=request.param == "tied", experts=request.param == "experts")
    ours = FAMILY.from_hf(config.to_dict())
    return ours, convert(ours, published(reference.state_dict())), reference


def inputs_of(case, side="right", labels=False):
    rng = np.random.default_rng(7)
    return batch_of([prompt(rng, *row) for row in CASES[case]], side, labels)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_logits(pair, case, side, record_property):
    config, params, reference = pair
    inputs = inputs_of(case, side)
    with torch.no_grad():
        expected = reference(**to_torch(inputs)).logits.numpy()
    out = jax.jit(VLM(config).apply)({"params": params}, from_hf_inputs(config, inputs))
    real = inputs["attention_mask"] == 1
    assert np.abs(expected[real]).max() > 0.5
    assert_parity(record_property, config.family, np.asarray(out.logits)[real], expected[real])


@pytest.mark.parametrize("runtime", [Runtime(), Runtime(scan=False, remat="dots"), Runtime(remat="full")], ids=str)
def test_gradients_of_every_tensor(pair, runtime):
    from dataclasses import replace

    config, params, reference = pair
    config = replace(config, runtime=runtime)
    inputs = inputs_of("batch", labels=True)
    reference.zero_grad()
    reference(**to_torch(inputs)).loss.backward()
    expected = convert(config, published({name: p.grad for name, p in reference.named_parameters()}))
    batch = from_hf_inputs(config, inputs)

    @jax.jit
    def gradients(params):
        def loss(params):
            logits = VLM(config).apply({"params": params}, batch).logits
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch.targets)[..., None], -1)[..., 0]
            return jnp.sum(nll * batch.weight) / jnp.sum(batch.weight)

        return jax.grad(loss)(params)

    for path, got in flatten(gradients(params)).items():
        want = flatten(expected)[path]
        assert np.abs(want).max() > 0, path
        assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want), path


@pytest.mark.parametrize(
    "size, total",
    [
        ("2b", 2127532032),
        ("4b", 4437815808),
        ("8b", 8767123696),
        ("32b", 33357390064),
        ("30b-a3b", 31070754032),
        ("235b-a22b", 235670022896),
    ],
)
def test_published_sizes_have_published_counts(size, total):
    from mllm_jax.model.vlm import count_params

    assert sum(count_params(FAMILY.config(size)).values()) == total


NAMES = {
    "2b": "2B-Instruct",
    "4b": "4B-Instruct",
    "8b": "8B-Instruct",
    "32b": "32B",
    "30b-a3b": "30B-A3B-Instruct",
    "235b-a22b": "235B-A22B-Instruct",
}


@pytest.mark.parametrize("size", NAMES)
def test_published_tensors(shared, size):
    import json

    shapes, name = json.loads((shared / "data/configs/param_shapes.json").read_text()), NAMES[size]
    published = {
        tensor["name"].replace("*", str(n)): tuple(tensor["shape"])
        for tensor in shapes[f"Qwen3-VL-{name}"]["tensors"]
        for n in range(tensor["count"])
    }
    config = FAMILY.config(size)
    ours = {name: entry.shape for name, entry in expand(FAMILY.weights(config), abstract_params(config)).items()}
    assert ours == published


def test_config_round_trip(shared):
    import json

    for size, name in NAMES.items():
        file = "30B-A3B.config" if size == "30b-a3b" else name
        published = json.loads((shared / f"data/configs/Qwen3-VL-{file}.json").read_text())
        assert FAMILY.from_hf(published) == FAMILY.config(size)
        assert FAMILY.from_hf(FAMILY.to_hf(FAMILY.config(size))) == FAMILY.config(size)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": np.zeros(3, int)}, "must be"),
        ({"pixels": np.zeros(3)}, "unknown inputs"),
        ({"image_grid_thw": np.array([[1, 4, 4]])}, "adds up to 16 patches"),
        ({"image_grid_thw": None, "pixel_values": None}, "placeholders more"),
        ({"pixel_values": None}, "only one of them"),
        ({"attention_mask": np.ones((1, 2))}, "attention_mask has shape"),
    ],
)
def test_bad_hf_inputs(pair, change, message):
    with pytest.raises(ValueError, match=message):
        from_hf_inputs(pair[0], inputs_of("one_image") | change)


def test_a_model_that_config_json_cannot_say():
    from dataclasses import replace

    config = FAMILY.config("2b")
    with pytest.raises(
        ValueError, match="Qwen3-VL's config.json cannot represent this model: saving encoder.norm_eps=0.001"
    ):
        FAMILY.to_hf(replace(config, encoder=replace(config.encoder, norm_eps=1e-3)))
