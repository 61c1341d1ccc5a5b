"""Decoders of many families are one: logits, gradients, greedy tokens and files equal transformers' in fp32."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from reference import as_internlm2, assert_export, assert_step
from tiny_decoders import CASES, SMALL, tiny
from tiny_text_families import LENGTHS, inputs_of
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

import mllm_jax
from mllm_jax.families import FAMILIES
from mllm_jax.families.decoders import (
    by_model_type,
    deepseek,
    gemma2,
    gpt2,
    internlm2,
    llama,
    mistral,
    phi3,
    qwen2,
    qwen3,
)
from mllm_jax.model.vlm import ModelConfig, abstract_params, count_params
from mllm_jax.train.runs.config import Run, read_run, run_config
from mllm_jax.train.runs.data import ScenesData
from mllm_jax.weights.table import expand

NEW = 12
PUBLISHED = {
    "llama 7b": 6_738_415_616,
    "llama 13b": 13_015_864_320,
    "llama 33b": 32_528_943_616,
    "llama 65b": 65_285_660_672,
    "llama 2-7b": 6_738_415_616,
    "llama 2-13b": 13_015_864_320,
    "llama 2-70b": 68_976_648_192,
    "llama vicuna-7b": 6_738_415_616,
    "llama vicuna-13b": 13_015_864_320,
    "llama yi-34b": 34_388_917_248,
    "llama 3-8b": 8_030_261_248,
    "llama 3-70b": 70_553_706_496,
    "llama 3.1-8b": 8_030_261_248,
    "llama 3.1-70b": 70_553_706_496,
    "llama 3.1-405b": 405_853_388_800,
    "llama 3.2-1b": 1_235_814_400,
    "llama 3.2-3b": 3_212_749_824,
    "mistral 7b-v0.1": 7_241_732_096,
    "mistral 7b-v0.2": 7_241_732_096,
    "mistral 7b-v0.3": 7_248_023_552,
    "mistral nemo-12b": 12_247_782_400,
    "qwen2 1.5-72b": 72_287_920_128,
    "qwen2 1.5-110b": 111_209_914_368,
    "qwen2 0.5b": 494_032_768,
    "qwen2 1.5b": 1_543_714_304,
    "qwen2 7b": 7_615_616_512,
    "qwen2 72b": 72_706_203_648,
    "qwen2 2.5-0.5b": 494_032_768,
    "qwen2 2.5-1.5b": 1_543_714_304,
    "qwen2 2.5-3b": 3_085_938_688,
    "qwen2 2.5-7b": 7_615_616_512,
    "qwen2 2.5-14b": 14_770_033_664,
    "qwen2 2.5-32b": 32_763_876_352,
    "qwen2 2.5-72b": 72_706_203_648,
    "gemma 2b": 2_506_172_416,
    "gemma 7b": 8_537_680_896,
    "gemma2 2b": 2_614_341_888,
    "gemma2 9b": 9_241_705_984,
    "gemma2 27b": 27_227_128_320,
    "phi3 3-mini-4k": 3_821_079_552,
    "phi3 3-medium-4k": 13_960_238_080,
    "phi3 4": 14_659_507_200,
    "gpt2 124m": 124_439_808,
    "gpt2 355m": 354_823_168,
    "gpt2 774m": 774_030_080,
    "gpt2 1.5b": 1_557_611_200,
    "opt 125m": 125_239_296,
    "opt 1.3b": 1_315_758_080,
    "opt 2.7b": 2_651_596_800,
    "opt 6.7b": 6_658_473_984,
    "opt 13b": 12_853_473_280,
    "opt 30b": 29_974_540_288,
    "opt 66b": 65_719_701_504,
    "internlm2 1.8b": 1_889_110_016,
    "internlm2 7b": 7_737_708_544,
    "internlm2 20b": 19_861_149_696,
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """transformers' model, and the same read from its folder."""
    model = tiny(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return mllm_jax.load_pretrained(folder), model


def forward(model, **inputs):
    """Logits of transformers, with positions that count the tokens of a row as ours do."""
    positions = torch.clamp(torch.cumsum(inputs["attention_mask"], dim=1) - 1, min=0)
    return model(position_ids=positions, **inputs)


def test_logits_and_gradients(pair, tmp_path, record_property):
    assert_step(record_property, *pair, [inputs_of("right"), inputs_of("left")], tmp_path, forward)


def test_greedy_tokens(pair):
    vlm, model = pair
    inputs = {name: value for name, value in inputs_of("left").items() if name != "labels"}
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        expected = model.generate(**tensors, max_new_tokens=NEW, do_sample=False, pad_token_id=0).numpy()
    expected = expected[:, max(LENGTHS) :]
    assert len(np.unique(expected)) > 5
    for side in ("left", "right"):
        batch = mllm_jax.from_hf_inputs(vlm.config, {k: v for k, v in inputs_of(side).items() if k != "labels"})
        np.testing.assert_array_equal(mllm_jax.generate_ids(vlm, batch, NEW), expected)


def test_transformers_loads_what_is_saved(pair, tmp_path):
    assert_export(*pair, inputs_of(), tmp_path, forward)


def test_internlm2_is_llama_rearranged(tmp_path):
    """Transformers has no InternLM2: its files give the parameters, and so the logits, of the Llama they are of."""
    model = tiny("llama_dynamic")
    model.save_pretrained(tmp_path / "llama")
    tensors = as_internlm2(model.state_dict(), model.config)
    (tmp_path / "internlm2").mkdir()
    safetensors.torch.save_file(tensors, tmp_path / "internlm2" / "model.safetensors")
    fields = dict(model_type="internlm2", bias=False, hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False)
    fields |= SMALL | dict(rope_theta=1e6, rope_scaling=dict(type="dynamic", factor=2.0))
    (tmp_path / "internlm2" / "config.json").write_text(json.dumps(fields))
    ours, llama = (mllm_jax.load_pretrained(tmp_path / name) for name in ("internlm2", "llama"))
    assert ours.config.decoder == llama.config.decoder
    jax.tree.map(np.testing.assert_array_equal, ours.params, llama.params)
    mllm_jax.save_pretrained(ours, tmp_path / "again")
    again = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert mllm_jax.load_pretrained(tmp_path / "again").config == ours.config


KINDS = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=2.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=64),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "longrope": dict(
        short_factor=[1.0 + n / 9 for n in range(16)],
        long_factor=[1.0 + n for n in range(16)],
        original_max_position_embeddings=64,
        factor=4.0,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [40, 100])
def test_kinds_of_rotary_positions(kind, length):
    """Frequencies and table size equal transformers'; config.json represents them in both directions."""
    rope = dict(rope_type=kind, rope_theta=5e5) | KINDS[kind]
    fields = SMALL | dict(head_dim=32, max_position_embeddings=64, rope_parameters=rope)
    config = transformers.LlamaConfig(**fields)
    expected, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    attention = FAMILIES["llama"].decoder_from_hf(fields).attention
    stretch = attention.rope_scaling
    asked = (jnp.full((1,), length),) if stretch.by_length else ()
    got = np.asarray(stretch.frequencies(5e5, 32, *asked))
    np.testing.assert_allclose(got.reshape(-1), expected.numpy(), rtol=3e-6)
    assert stretch.table_scale == pytest.approx(scale)
    said = FAMILIES["llama"].decoder_to_hf(FAMILIES["llama"].decoder_from_hf(fields))
    assert FAMILIES["llama"].decoder_from_hf(said).attention == attention


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_conversations_of_a_row_turn_as_if_alone(kind):
    rope = dict(rope_type=kind, rope_theta=5e5) | KINDS[kind]
    attention = (
        FAMILIES["llama"]
        .decoder_from_hf(SMALL | dict(head_dim=32, max_position_embeddings=64, rope_parameters=rope))
        .attention
    )
    lengths = (40, 100)
    alone = [
        attention.rope(np.repeat(np.arange(n)[None, :, None], 3, axis=2), np.ones((1, n), np.int32)) for n in lengths
    ]
    position = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(5, int)])
    segment = np.repeat([1, 2, 0], [*lengths, 5])[None]
    packed = attention.rope(np.repeat(position[None, :, None], 3, axis=2), segment)
    for got, *wanted in zip(packed, *alone):
        np.testing.assert_array_equal(got[:, :140], np.concatenate(wanted, axis=1))


def test_chunked_and_interleaved_sections_equal_transformers():
    fields = SMALL | dict(
        head_dim=32, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6])
    )
    position = np.random.default_rng(0).integers(0, 50, (2, 7, 3))
    ids, ones = torch.from_numpy(position).permute(2, 0, 1), torch.ones(1)
    chunked = Qwen2VLRotaryEmbedding(transformers.Qwen2VLConfig(text_config=fields).text_config)
    interleaved = Qwen3VLTextRotaryEmbedding(transformers.Qwen3VLConfig(text_config=fields).text_config)
    for theirs, decoder in (
        (chunked, qwen2.seeing_decoder_from_hf(fields)),
        (interleaved, qwen3.seeing_decoder_from_hf(fields, "qwen3_vl")),
    ):
        got = decoder.attention.rope(position, np.ones((2, 7), np.int32))
        for ours, expected in zip(got, theirs(ones, ids)):
            np.testing.assert_allclose(ours, expected[..., :16], atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    kind, size = name.split()
    family = FAMILIES[kind]
    config = family.config(size)
    assert sum(count_params(config).values()) == PUBLISHED[name]
    assert family.from_hf(family.to_hf(config)) == config
    assert by_model_type.decoder_from_hf(by_model_type.decoder_to_hf(config.decoder)) == config.decoder
    expand(family.weights(config), abstract_params(config))


@pytest.mark.parametrize(
    "decoder",
    [llama.SIZES["3.1-8b"], gemma2.SIZES["2b"], internlm2.SIZES["7b"], gpt2.SIZES["124m"]],
    ids=["llama", "gemma2", "internlm2", "gpt2"],
)
def test_a_run_states_every_field(decoder):
    run = Run(
        model=ModelConfig(None, None, decoder, family="llama"), data=ScenesData(batch=8, tokens=512, text_only=True)
    )
    assert read_run(run_config(run)).model.decoder == decoder


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("llama", {"hidden_act": "xielu"}, "activation='xielu': not supported. Did you mean 'silu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "proportional"}},
            r'rope_parameters.rope_type="proportional": must be "default" or "linear" or "dynamic"',
        ),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp=2: must be 1"),
        (
            "gemma2",
            {"layer_types": ["chunked_attention"]},
            r'layer_types.0.="chunked_attention": must be "sliding_attention"',
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true: must be false"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=false: must be true"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_config_json_may_not_say(family, change, message):
    family = FAMILIES[family]
    with pytest.raises(ValueError, match=message):
        family.from_hf(family.to_hf(next(iter(family.sizes.values()))) | change)


def test_a_decoder_that_config_json_cannot_say():
    config = FAMILIES["gpt2"].config("124m")
    with pytest.raises(ValueError, match="GPT-2's config.json cannot .* saving decoder.embed_scale=2.0 would load as"):
        FAMILIES["gpt2"].to_hf(replace(config, decoder=replace(config.decoder, embed_scale=2.0)))
    with pytest.raises(ValueError, match="no text_config of .* can represent it"):
        by_model_type.decoder_to_hf(replace(config.decoder, embed_scale=2.0))
    with pytest.raises(ValueError, match="one window size"):
        FAMILIES["qwen2"].decoder_to_hf(replace(qwen2.SIZES["7b"], sliding_windows=(4, 8)))
    with pytest.raises(ValueError, match="DecoderConfig.norm='.*': must be one of rms"):
        replace(config.decoder, norm="batch")
    with pytest.raises(ValueError, match="rope_layout='.*': must be one of"):
        replace(qwen2.SIZES["7b"].attention, rope_layout="spiral")
    with pytest.raises(ValueError, match="latent attention has no windows"):
        count_params(ModelConfig(None, None, replace(deepseek.SIZES["v2"], sliding_windows=(8,)), family="deepseek_v2"))
    with pytest.raises(ValueError, match="Set decoder.prefix to False"):
        count_params(ModelConfig(None, None, replace(deepseek.SIZES["v2"], prefix=True), family="deepseek_v2"))


def test_the_model_type_of_a_decoder():
    kinds = {"30b-a3b": "qwen3_moe", "8b": "qwen3"}
    assert {size: by_model_type.decoder_to_hf(qwen3.SIZES[size])["model_type"] for size in kinds} == kinds
    assert by_model_type.decoder_to_hf(mistral.SIZES["7b-v0.1"])["model_type"] == "mistral"
    for kind, decoder in {"phi3": phi3.SIZES["3-mini-4k"], "internlm2": internlm2.SIZES["7b"]}.items():
        alike = by_model_type.decoder_to_hf(replace(decoder, family=""))["model_type"]
        assert by_model_type.decoder_to_hf(decoder)["model_type"] == kind != alike  # others have the same layers
        assert by_model_type.decoder_from_hf(by_model_type.decoder_to_hf(decoder)).family == kind
    with pytest.raises(ValueError, match="decoder.family='lama': not supported. Did you mean 'llama'"):
        by_model_type.decoder_to_hf(replace(llama.SIZES["7b"], family="lama"))
    with pytest.raises(ValueError, match="model_type='bloom': not supported.*Supported: gemma, .*qwen3"):
        by_model_type.decoder_from_hf({"model_type": "bloom"})


def test_more_tokens_than_learned_positions(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    vlm = mllm_jax.load_pretrained(tmp_path)
    batch = mllm_jax.from_hf_inputs(vlm.config, {"input_ids": np.full((1, 10), 7)})
    with pytest.raises(ValueError, match="max_new_tokens=504: needs 513 positions with the longest prompt"):
        mllm_jax.generate_ids(vlm, batch, 504)
