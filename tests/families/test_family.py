"""The interface of a family: one class is all that a new one needs, and its errors are the same in all."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_models import MODELS, class_of, tiny

import mllm_jax
from mllm_jax.common.fields import count, layers, read
from mllm_jax.common.trees import differences
from mllm_jax.families import FAMILIES
from mllm_jax.families.base import DecoderFamily, Family
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.vlm import abstract_params, init_params
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.weights.table import expand

EXPERTS = {"qwen3_moe", "deepseek_v2", "deepseek_v3"}  # theirs lie in one tensor in memory; test_adapters.py has them


class Toy(DecoderFamily):
    """A new decoder family as a contributor writes it."""

    name = "Toy"
    architectures = {"toy": "ToyForCausalLM"}
    decoders = {"tiny": DecoderConfig(50, 16, 2, AttentionConfig(2, 1, 8, rope_sections=(4, 0, 0)), 24, family="toy")}

    def decoder_from_hf(self, text: dict) -> DecoderConfig:
        text = read(text, {"width": count(), "layers": layers()})
        return replace(self.decoders["tiny"], width=text["width"], layers=text["layers"])

    def decoder_to_hf(self, decoder: DecoderConfig) -> dict:
        return {"width": decoder.width, "layers": decoder.layers}


def test_a_new_family_is_one_class_and_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", Toy())
    config = FAMILIES["toy"].config("tiny")
    params = init_params(config, jax.random.key(0))
    mllm_jax.save_pretrained(mllm_jax.Pretrained(config, config.build(), params), tmp_path)
    loaded = mllm_jax.load_pretrained(tmp_path)
    assert replace(loaded.config, runtime=config.runtime) == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert mllm_jax.from_hf_inputs(config, {"input_ids": [[5, 6]]}).tokens.tolist() == [[5, 6]]


def test_what_a_family_must_implement():
    with pytest.raises(TypeError, match="abstract"):
        type("Empty", (Family,), {})()
    with pytest.raises(NotImplementedError, match="Toy reads no images"):
        Toy().visuals(Toy().config("tiny"), {})


def test_errors_name_the_sizes_and_the_fields():
    config = Toy().config("tiny")
    with pytest.raises(ValueError, match="^Toy has no size '7b'. Choose one of tiny.$"):
        Toy().config("7b")
    latent = FAMILIES["deepseek_v2"].config("v2-lite").decoder.attention
    with pytest.raises(ValueError) as caught:
        Toy().to_hf(replace(config, decoder=replace(config.decoder, attention=latent, mlp=32)))
    assert str(caught.value) == (
        "Toy's config.json cannot represent this model: saving decoder.attention=MlaConfig, decoder.mlp=32 would load "
        "as decoder.attention=AttentionConfig, decoder.mlp=24. Change these fields: decoder.attention, decoder.mlp."
    )


def test_every_family_states_what_it_is():
    for model_type, family in FAMILIES.items():
        assert model_type in family.architectures and family.sizes, model_type
        assert all(config.family in family.architectures for config in family.sizes.values())
        with pytest.raises(ValueError, match="has no size 'x'. Choose one of "):
            family.config("x")


def test_differences_between_configs():
    config = FAMILIES["gemma"].config("2b")
    other = replace(config, decoder=replace(config.decoder, layers=3, family="gemma2"), pool=1)
    assert list(differences(config, other)) == [("decoder.layers", 18, 3), ("pool", None, 1)]
    assert list(differences(config, config)) == []


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in EXPERTS])
def test_names_of_modules_are_those_in_memory(kind):
    """Adapters carry the names of transformers' modules."""
    model = tiny(kind)
    assert isinstance(model, class_of(kind))
    family, known = FAMILIES[kind], {name for name, _ in model.named_modules()}
    config = family.from_hf(model.config.to_dict())
    names = [name for name in expand(family.weights(config), abstract_params(config)) if name.endswith(".weight")]
    unknown = {family.module_name(name.removesuffix(".weight")) for name in names} - known
    assert unknown <= {name for name in unknown if name.endswith("mlp.weights_in")}  # in memory two layers
    assert names
