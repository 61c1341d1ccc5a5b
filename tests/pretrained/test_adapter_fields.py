"""Every field of PEFT's LoraConfig: applied as PEFT applies it, without consequence, or refused by its name."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

import mllm_jax
from mllm_jax.pretrained.peft import files

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 7))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder of a random model whose head is its embedding, the model as it is read here)."""
    folder = tmp_path_factory.mktemp("base")
    shape = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    config = transformers.Qwen3Config(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=True, **shape)
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder, mllm_jax.load_pretrained(folder)


def theirs(folder):
    return transformers.Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def write_adapter(base, folder, **config):
    """An adapter with random values in all that is trained. Returns PEFT's model."""
    stated = dict(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM") | config
    adapted = peft.get_peft_model(theirs(base), peft.LoraConfig(**stated)).eval()
    trained(adapted)
    adapted.save_pretrained(folder)
    return adapted


def trained(adapted):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def logits_of_theirs(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()


_apply = jax.jit(lambda model, params, batch: model.apply({"params": params}, batch).logits, static_argnums=0)


def logits_of_ours(vlm):
    inputs = {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS)}
    return np.asarray(_apply(vlm.model, vlm.params, mllm_jax.from_hf_inputs(vlm.config, inputs)))


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """The folder of an adapter of plain LoRA."""
    folder = tmp_path_factory.mktemp("plain")
    write_adapter(base[0], folder)
    return folder


def assert_as_peft(base, folder):
    expected = logits_of_theirs(peft.PeftModel.from_pretrained(theirs(base[0]), folder).eval())
    found = logits_of_ours(mllm_jax.load_adapters(base[1], folder))
    assert np.abs(expected - logits_of_theirs(theirs(base[0]))).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


ACCEPTED = {
    "gaussian": dict(init_lora_weights="gaussian"),
    "false": dict(init_lora_weights=False),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "eva": dict(init_lora_weights="eva", eva_config=peft.EvaConfig()),
    "mica": dict(init_lora_weights="mica"),
    "rslora": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"v_proj": 2}, alpha_pattern={r"layers\.1\.mlp\.down_proj": 9, "q_proj": 3}),
    "layers": dict(layers_to_transform=[1], layers_pattern="layers"),
    "excluded": dict(target_modules="all-linear", exclude_modules=["k_proj", "o_proj"]),
    "dropout": dict(lora_dropout=0.3, fan_in_fan_out=True, megatron_config=None),
    "parameters": dict(target_modules=["q_proj"], modules_to_save=["norm", "o_proj"]),
    "tied": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_read_gives_the_logits_of_peft(base, tmp_path, name):
    write_adapter(base[0], tmp_path, **ACCEPTED[name])
    assert_as_peft(base, tmp_path)


REFUSED = {
    "pissa": (dict(init_lora_weights="pissa"), "init_lora_weights='pissa': .* path_initial_model_for_weight_conv"),
    "pissa_niter_2": (dict(init_lora_weights="pissa_niter_2"), "init_lora_weights='pissa_niter_2': "),
    "olora": (dict(init_lora_weights="olora"), "init_lora_weights='olora': "),
    "alora": (dict(alora_invocation_tokens=[5, 6]), r"alora_invocation_tokens=\[5, 6\]: only None is supported"),
    "dora": (dict(use_dora=True), "use_dora=True: only False is supported"),
    "biases": (dict(bias="lora_only"), "bias='lora_only': only 'none' is supported"),
    "replicated": (dict(layer_replication=[(0, 2), (1, 2)]), "layer_replication=.*: only None is supported"),
    "tokens": (dict(trainable_token_indices=[3]), r"trainable_token_indices=.*: only None is supported"),
    "table": (dict(modules_to_save=["embed_tokens"]), "modules_to_save: .* are tied in this model, but differ in"),
    "head": (dict(modules_to_save=["lm_head"]), "modules_to_save: .* Train it with ensure_weight_tying=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_is_refused_by_its_field(base, tmp_path, name):
    config, message = REFUSED[name]
    write_adapter(base[0], tmp_path, **config)
    with pytest.raises(ValueError, match=message):
        mllm_jax.load_adapters(base[1], tmp_path)


def test_what_peft_converts_to_plain_lora_is_read(base, tmp_path):
    """PiSSA's adapter, saved as the error recommends: twice the rank, for the base's original weights."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="pissa")
    adapted = peft.get_peft_model(theirs(base[0]), config).eval()
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "first")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    trained(adapted)
    expected = logits_of_theirs(adapted)
    adapted.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "first")
    found = logits_of_ours(mllm_jax.load_adapters(base[1], tmp_path / "plain"))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_a_tied_table_that_was_trained_is_written_for_peft(base, tmp_path):
    write_adapter(base[0], tmp_path / "theirs", **ACCEPTED["tied"])
    adapted = mllm_jax.load_adapters(base[1], tmp_path / "theirs")
    mllm_jax.save_adapters(adapted, tmp_path / "ours", base=str(base[0]))
    assert_as_peft(base, tmp_path / "ours")


def test_every_field_of_peft_is_known():
    """A release of PEFT that adds a field fails here: find out what it does to a loaded adapter."""
    stated = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert sorted(stated - set(files.PLAIN) - files.APPLIED - files.NOT_NEEDED) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3': only 'LORA' is supported"),
        ({"peft_type": None}, "peft_type=None: only 'LORA'"),
        ({"spectral_gate": 0.5}, "spectral_gate=0.5: the field is unknown"),
        ({"lora_bias": True}, "lora_bias=True: only False"),
        ({"use_qalora": True}, "use_qalora=True: only False"),
        *(({name: {"beta": 1}}, f"{name}=.*: only None") for name in ("kasa_config", "arrow_config", "use_bdlora")),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda': A and B belong to a base model that was"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq': "),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga': "),
        ({"lora_alpha": "six"}, "lora_alpha='six': needs a number"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern='\\(': is not a regular expression"),
        ({"alpha_pattern": {"(" * 9999 + ")" * 9999: 3}}, "is not a regular expression: maximum recursion depth"),
        (
            {"alpha_pattern": {"q_proj{99999999999}": 3}},
            "is not a regular expression: the repetition number is too",
        ),
        (
            {"alpha_pattern": {"(?i)q_proj": 3}},
            "alpha_pattern: PEFT cannot read its patterns: .*global flags",
        ),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj=None: needs a number"),
        ([], "needs an object with the fields of PEFT's LoraConfig"),
        ("{", "adapter_config.json is not JSON"),
    ],
)
def test_other_files_are_refused_by_the_field(base, plain, tmp_path, change, message):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    changed = json.loads(path.read_text()) | change if isinstance(change, dict) else change
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=message):
        mllm_jax.load_adapters(base[1], tmp_path)


def test_a_pattern_that_never_ends_is_refused(base, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SECONDS", 1)
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {"(.|..|...)+!": 3}}))
    with pytest.raises(ValueError, match="alpha_pattern: its patterns take over 1 s to match"):
        mllm_jax.load_adapters(base[1], tmp_path)


def test_null_and_empty_fields_say_nothing(base, plain, tmp_path):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    stated = json.loads(path.read_text())
    empty = {"alpha_pattern": None, "use_dora": None, "trainable_token_indices": [], "of_tomorrow": None, "later": {}}
    path.write_text(json.dumps(stated | empty))
    expected, found = (logits_of_ours(mllm_jax.load_adapters(base[1], folder)) for folder in (plain, tmp_path))
    np.testing.assert_array_equal(found, expected)
