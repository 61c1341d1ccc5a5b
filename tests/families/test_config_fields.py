"""Fields of config.json that are absent, null or wrong: read as transformers 5 reads them, or refused by name."""

import copy
import json
import re
import time

import pytest
import tiny_chat
import transformers

import mllm_jax.pretrained.api
from mllm_jax.common.fields import FieldError
from mllm_jax.data.text.json_files import read_json, read_object
from mllm_jax.data.text.tokenizer import Tokenizer
from mllm_jax.families import FAMILIES
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.model.vlm import ModelConfig

SIZES = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
TEXT = SIZES | dict(num_key_value_heads=2, max_position_embeddings=512)
HEADS = TEXT | dict(head_dim=32)
LATENT = SIZES | dict(num_key_value_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
LATENT |= dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, n_group=4, topk_group=2)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
TOWER = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, patch_size=4)
SQUARE = TOWER | dict(image_size=16)
QWEN_TOWER = dict(depth=9, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]))
INTERLEAVED = dict(rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5]))
TINY = {
    "llama": TEXT,
    "mistral": TEXT,
    "qwen2": TEXT,
    "qwen3": HEADS,
    "qwen3_moe": HEADS | EXPERTS,
    "gemma": HEADS,
    "gemma2": HEADS | dict(query_pre_attn_scalar=16),
    "phi3": TEXT | dict(pad_token_id=0),
    "gpt2": dict(vocab_size=200, n_positions=64, n_embd=64, n_layer=2, n_head=4),
    "opt": SIZES | dict(ffn_dim=96, word_embed_proj_dim=64),
    "deepseek_v2": LATENT | dict(topk_method="group_limited_greedy"),
    "deepseek_v3": LATENT,
    "clip_vision_model": SQUARE,
    "siglip_vision_model": SQUARE,
    "siglip2_vision_model": TOWER | dict(num_patches=16),
    "dinov2": SQUARE,
    "dinov2_with_registers": SQUARE,
    "clip": dict(text_config=SIZES, vision_config=SQUARE, projection_dim=24),
    "siglip": dict(text_config=SIZES | dict(hidden_size=48, projection_size=48), vision_config=SQUARE),
    "siglip2": dict(text_config=SIZES | dict(hidden_size=48), vision_config=TOWER | dict(num_patches=16)),
    "llava": dict(
        text_config=TEXT | dict(model_type="llama"), vision_config=SQUARE | dict(model_type="clip_vision_model")
    ),
    "llava_next": dict(
        text_config=TEXT | dict(model_type="mistral"), vision_config=SQUARE | dict(model_type="clip_vision_model")
    ),
    "llava_onevision": dict(
        text_config=TEXT | dict(model_type="qwen2"), vision_config=SQUARE | dict(model_type="siglip_vision_model")
    ),
    "internvl": dict(text_config=TEXT | dict(model_type="qwen2"), vision_config=SQUARE),
    "paligemma": dict(text_config=HEADS | dict(model_type="gemma2"), vision_config=SQUARE, hidden_size=64),
    "qwen2_vl": dict(text_config=TEXT | MROPE, vision_config=QWEN_TOWER | dict(embed_dim=48, hidden_size=64)),
    "qwen2_5_vl": dict(
        text_config=TEXT | MROPE,
        vision_config=QWEN_TOWER | dict(hidden_size=48, out_hidden_size=64, fullatt_block_indexes=[1]),
    ),
    "qwen3_vl": dict(
        text_config=HEADS | INTERLEAVED,
        vision_config=QWEN_TOWER
        | dict(hidden_size=48, out_hidden_size=64, num_position_embeddings=36, deepstack_visual_indexes=[0, 2]),
    ),
    "qwen3_vl_moe": dict(
        text_config=HEADS | EXPERTS | INTERLEAVED,
        vision_config=QWEN_TOWER
        | dict(hidden_size=48, out_hidden_size=64, num_position_embeddings=36, deepstack_visual_indexes=[0, 2]),
    ),
}


def theirs(config: dict):
    """The config that transformers makes of a config.json, as it writes it; or the error where it refuses."""
    stated = copy.deepcopy(config)
    kind = stated.pop("model_type")
    try:
        return transformers.AutoConfig.for_model(kind, **stated).to_dict()
    except Exception as error:
        return error


def ours(config: dict):
    """The config that we make of it, or the error that names what is wrong."""
    try:
        return FAMILIES[config["model_type"]].from_hf(copy.deepcopy(config))
    except ValueError as error:
        return error


def fields_of(config: dict, path=()):
    for name, value in config.items():
        if name == "model_type" and not path:
            continue
        yield (*path, name)
        if isinstance(value, dict):
            yield from fields_of(value, (*path, name))


def changed(config: dict, path, *value):
    config = copy.deepcopy(config)
    *parents, name = path
    place = config
    for parent in parents:
        place = place[parent]
    del place[name]
    if value:
        place[name] = value[0]
    return config


UNREAD = {  # of training, of caches and of what a class can do besides: no part of the model that these files hold
    *("use_cache", "initializer_range", "initializer_factor", "attention_dropout", "layerdrop", "drop_path_rate"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "projection_dropout", "resid_pdrop", "embd_pdrop"),
    *("attn_pdrop", "summary_first_dropout", "dropout", "init_std", "output_router_logits", "router_aux_loss_coef"),
    *("apply_layernorm", "reshape_hidden_states", "image_seq_length", "use_absolute_position_embeddings"),
    *("max_window_layers",),  # nothing without `use_sliding_window`, which is refused or has layers of its own
    *("vision_config.projection_dim", "clip_vision_model.projection_dim", "text_config.projection_dim"),
    *("paligemma.vocab_size", "paligemma.hidden_size", "paligemma.projection_dim"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "reorder_and_upcast_attn"),
}


@pytest.fixture(scope="module", params=TINY)
def whole(request):
    """A config.json as transformers writes it, with every field."""
    made = theirs({"model_type": request.param, **TINY[request.param]})
    assert isinstance(ours(made), ModelConfig | DualConfig)
    return made


def own_fields(whole: dict):
    """Paths of fields, without those of decoders that have a config.json of their own in TINY."""
    shared = whole.get("text_config", {}).get("model_type") in TINY
    return [path for path in fields_of(whole) if not (shared and path[0] == "text_config" and len(path) > 1)]


def unread(whole: dict, path: tuple[str, ...]) -> bool:
    """Returns whether a field does not affect the model, by its name or its path."""
    names = {path[-1], ".".join(path), f"{whole['model_type']}.{path[-1]}"}
    return bool(names & UNREAD)


def test_absent_and_null_are_read_as_transformers_reads_them(whole):
    """Values that transformers fills in give the same model; refusals agree, or are listed here."""
    for path in own_fields(whole):
        for value in ((), (None,)):
            stated = changed(whole, path, *value)
            found, filled = ours(stated), theirs(stated)
            if isinstance(filled, Exception):
                refuses = isinstance(found, FieldError) or path[-1] in str(found)
                as_absent = path[-1] == "tie_word_embeddings"  # null, which transformers refuses
                assert refuses or as_absent or unread(whole, path), (path, value, found)
            elif not isinstance(found, ValueError):
                assert found == ours(filled), (path, value)
            else:
                assert isinstance(found, FieldError) or path[-1] in str(found), (path, value, found)


WRONG = [None, -1, 0, 10**9, 10**400, 1e30, float("nan"), "x", [], [[]], ["x"], {}, {"x": 1}, True]


def test_wrong_values_are_refused_by_name(whole):
    """At once: with one error, or as a model."""
    start = time.process_time()
    for path in fields_of(whole):
        for value in WRONG:
            assert isinstance(ours(changed(whole, path, value)), ModelConfig | DualConfig | ValueError), (path, value)
    assert time.process_time() - start < 10


def test_files_that_transformers_does_not_know():
    """The authors' own layouts: wrong values have one error."""
    for kind, size in (("internvl_chat", "2.5-2b"), ("llava_llama", "1.5-7b"), ("internlm2", "7b")):
        family = FAMILIES[kind]
        whole = json.loads(json.dumps(family.to_hf(family.config(size))))
        for path in fields_of(whole):
            for value in [(), *((value,) for value in WRONG)]:
                try:
                    assert isinstance(family.from_hf(changed(whole, path, *value)), ModelConfig), path
                except ValueError as error:
                    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers=1000000000: must be an integer of at least 1 and of at most 1024.",
        ),
        ({"num_hidden_layers": None}, "num_hidden_layers=null: must be an integer"),
        ({"hidden_size": "64"}, 'hidden_size="64": must be an integer'),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=NaN: must be a number"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, 'rope_scaling.factor="4": must be a number'),
        ({"rope_scaling": {"type": "linear", "stretch": 4}}, "rope_scaling.stretch=4: is unknown"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: is missing. Add it"),
        ({"model_type": ["llama"]}, "model_type=None: not supported"),
    ],
    ids=str,
)
def test_errors_name_file_and_field(tmp_path, change, said):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TEXT, **change}))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json") + ": " + said)):
        mllm_jax.pretrained.api.published_config(tmp_path)


def test_null_is_absent_in_files_of_tokenizers(tmp_path):
    """Nested fields are included; read_object keeps null for files in which null has a meaning."""
    tiny_chat.write_tokenizer(tmp_path)
    plain = Tokenizer.from_folder(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for token in config.get("added_tokens_decoder", {}).values():
        token["single_word"] = None
    path.write_text(json.dumps(config | {"model_max_length": None, "unk_token": None, "sp_model_kwargs": None}))
    again = Tokenizer.from_folder(tmp_path)
    assert again.vocabulary == plain.vocabulary and again.special_tokens() == plain.special_tokens()
    assert "unk_token" not in read_json(path) and read_object(path)["unk_token"] is None
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="tokenizer_config.json: not readable JSON"):
        read_object(path)
