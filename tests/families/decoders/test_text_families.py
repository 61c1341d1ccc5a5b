"""Models of text alone: DeepSeek-V2, V2-Lite and V3, Qwen3 dense and with experts, equal to transformers in fp32."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chat
import torch
import transformers
from reference import assert_export, assert_step, to_torch
from tiny_text_families import CASES, LENGTHS, inputs_of, tiny

import mllm_jax
from mllm_jax.common.trees import flatten
from mllm_jax.families import FAMILIES
from mllm_jax.model.vlm import abstract_params, count_params, init_cache
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.algorithms.supervised import CrossEntropy
from mllm_jax.train.monitor.flops import count_flops, useful
from mllm_jax.train.step.context import TrainContext, state_from_params
from mllm_jax.train.step.optimizer import OptimConfig
from mllm_jax.train.step.train_step import make_train_step
from mllm_jax.weights.table import expand

NEW = 12


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """transformers' model, and the same read from its folder."""
    model = tiny(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return mllm_jax.load_pretrained(folder), model


def test_logits_and_gradients(pair, tmp_path, record_property):
    """No token may have chosen an expert, and a bias that only selects has no gradient."""
    batches = [inputs_of("right"), inputs_of("left")]
    assert_step(record_property, *pair, batches, tmp_path, unused=r"\.experts\.|e_score_correction_bias")


def test_greedy_tokens_equal_transformers(pair):
    vlm, model = pair
    inputs = {name: value for name, value in inputs_of("left").items() if name != "labels"}
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        expected = model.generate(**tensors, max_new_tokens=NEW, do_sample=False, pad_token_id=0).numpy()
    expected = expected[:, max(LENGTHS) :]
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(
        mllm_jax.generate_ids(vlm, mllm_jax.from_hf_inputs(vlm.config, inputs), NEW), expected
    )


def test_prefill_and_decode_equal_a_whole_pass(pair):
    vlm, model = pair
    inputs, cut = inputs_of(), 7
    batch = mllm_jax.from_hf_inputs(vlm.config, inputs)
    with torch.no_grad():
        whole = model(**to_torch(inputs)).logits.numpy()

    @jax.jit
    def read(part, cache):
        out = vlm.model.apply({"params": vlm.params}, part, cache)
        return out.logits, out.cache

    cache = init_cache(vlm.config, len(LENGTHS), max(LENGTHS) + 3)
    pieces, starts = [], [0, *range(cut, max(LENGTHS))]
    for start, end in zip(starts, [*starts[1:], max(LENGTHS)]):
        logits, cache = read(jax.tree.map(lambda x, window=slice(start, end): x[:, window], batch), cache)
        pieces.append(logits)
    real = inputs["attention_mask"] == 1
    np.testing.assert_allclose(np.concatenate(pieces, axis=1)[real], whole[real], atol=1e-4, rtol=1e-4)


def test_transformers_loads_what_is_saved(pair, tmp_path):
    assert_export(*pair, inputs_of(), tmp_path)


def test_biases_that_select_keep_fp32(tmp_path):
    model = tiny("deepseek_v3")
    model.save_pretrained(tmp_path)
    vlm = mllm_jax.load_pretrained(tmp_path, dtype="bfloat16")
    kinds = {path: leaf.dtype.name for path, leaf in flatten(vlm.params).items()}
    assert {kinds.pop(path) for path in [*kinds] if path.endswith("mlp/bias")} == {"float32"}
    assert set(kinds.values()) == {"bfloat16"}
    entries = expand(FAMILIES["deepseek_v3"].weights(vlm.config), vlm.params)
    for name, bias in model.named_buffers():
        if name in entries:
            np.testing.assert_array_equal(flatten(vlm.params)[entries[name].path][entries[name].index], bias)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A DeepSeek-V3 with a tokenizer that knows no images, and transformers' model."""
    folder = tiny_chat.write_tokenizer(tmp_path_factory.mktemp("chat"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    seen = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    added = {number: token for number, token in config["added_tokens_decoder"].items() if token["content"] not in seen}
    first = min(map(int, added))
    added = {str(first + place): token for place, token in enumerate(added.values())}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": added}))
    model = tiny("deepseek_v3", vocab_size=280)
    model.save_pretrained(folder)
    return mllm_jax.load_pretrained(folder), model


def test_answers_without_a_tower(small, tmp_path):
    vlm, _ = small
    answers = mllm_jax.generate(vlm, ["the sea", "the second"], max_new_tokens=5)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    mllm_jax.save_pretrained(vlm, tmp_path)
    assert not list(tmp_path.glob("*preprocessor*"))
    assert mllm_jax.generate(mllm_jax.load_pretrained(tmp_path), ["the sea", "the second"], 5) == answers
    image = [{"role": "user", "content": [{"type": "image", "image": np.zeros((32, 32, 3), np.uint8)}]}]
    with pytest.raises(ValueError, match="0 placeholders for 1 images"):
        mllm_jax.generate(vlm, [image])
    with pytest.raises(ValueError, match="unknown inputs .'pixel_values'"):
        mllm_jax.from_hf_inputs(vlm.config, inputs_of() | {"pixel_values": np.zeros((4, 4))})


def test_a_step_of_training(small):
    """Its loss is transformers'; the next one is lower; FLOPs are counted where there is no tower."""
    vlm, model = small
    inputs, optim = inputs_of(), OptimConfig(learning_rate=1e-3, schedule="constant")
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    context = TrainContext(vlm.config, optim, mesh)
    step = make_train_step(context, CrossEntropy(vlm.config, chunk=8))
    state = state_from_params(context, jax.tree.map(jnp.copy, vlm.params))
    batch = mllm_jax.from_hf_inputs(vlm.config, inputs)
    losses = []
    for _ in range(2):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[0], model(**to_torch(inputs)).loss.item(), rtol=1e-5)
    assert losses[1] < losses[0]
    flops = count_flops(vlm.config, useful(batch))
    assert flops["encoder"].total == flops["connector"].total == 0 < flops["head"].total < flops["decoder"].total


def test_quantized_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}}'
    )
    with pytest.raises(ValueError, match="quantized"):
        mllm_jax.load_pretrained(tmp_path)


PUBLISHED = {  # parameters, and what the authors say they are
    "deepseek v2-lite": (15_706_484_224, "15.7B"),
    "deepseek v2": (235_741_434_880, "236B"),
    "deepseek v3": (671_026_419_200, "671B"),
    "qwen3 0.6b": (596_049_920, "0.6B"),
    "qwen3 1.7b": (1_720_574_976, "1.7B"),
    "qwen3 4b": (4_022_468_096, "4.0B"),
    "qwen3 8b": (8_190_735_360, "8.2B"),
    "qwen3 14b": (14_768_307_200, "14.8B"),
    "qwen3 32b": (32_762_123_264, "32.8B"),
    "qwen3 30b-a3b": (30_532_122_624, "30.5B"),
    "qwen3 235b-a22b": (235_093_634_560, "235B"),
}


def on_disk(tensors) -> dict[str, np.ndarray]:
    """Tensors of a transformers model under published names, with one tensor per expert."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".experts.")
        if part == "gate_up_proj":
            for e, (gate, up) in enumerate(zip(*tensor.chunk(2, dim=1))):
                found[f"{stem}.experts.{e}.gate_proj.weight"] = gate
                found[f"{stem}.experts.{e}.up_proj.weight"] = up
        elif part == "down_proj":
            found |= {f"{stem}.experts.{e}.down_proj.weight": down for e, down in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Names and shapes of all tensors are transformers', as files have them."""
    kind, size = name.split()
    family, (total, stated) = FAMILIES[{"deepseek": "deepseek_v3"}.get(kind, kind)], PUBLISHED[name]
    config = family.config(size)
    assert sum(count_params(config).values()) == total
    assert f"{total / 1e9:.{len(stated.partition('.')[2]) - 1 if '.' in stated else 0}f}B" == stated
    assert family.from_hf(family.to_hf(config)) == config
    fields = family.to_hf(config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        )
    ours = {name: entry.shape for name, entry in expand(family.weights(config), abstract_params(config)).items()}
    tied = {"lm_head.weight"} if config.decoder.tie_embeddings else set()
    tensors = on_disk(model.state_dict()).items()
    assert ours == {name: tuple(tensor.shape) for name, tensor in tensors if name not in tied}


LATENT_AS_PUBLISHED = {  # what config.json of all three says alike
    "hidden_act": "silu",
    "attention_bias": False,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    "size, kind, mscale, stated",
    [
        ("v2-lite", "deepseek_v2", 0.707, "102400 2048 10944 1408 27 16 16 2 64 1.0 greedy 1 1 6 1 False softmax"),
        (
            "v2",
            "deepseek_v2",
            0.707,
            "102400 5120 12288 1536 60 128 128 2 160 16.0 group_limited_greedy 8 3 6 1 False softmax",
        ),
        ("v3", "deepseek_v3", 1.0, "129280 7168 18432 2048 61 128 128 1 256 2.5 noaux_tc 8 4 8 3 True sigmoid"),
    ],
)
def test_published_configs(size, kind, mscale, stated):
    """Configs in the layout before transformers 5, as published on the hub."""
    names = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads n_shared_experts n_routed_experts routed_scaling_factor topk_method n_group topk_group "
        "num_experts_per_tok first_k_dense_replace norm_topk_prob scoring_func"
    )
    words = {"True": True, "False": False}
    number = lambda text: words[text] if text in words else json.loads(text) if text[0].isdigit() else text
    fields = {name: number(text) for name, text in zip(names.split(), stated.split(), strict=True)}
    scaling = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, original_max_position_embeddings=4096)
    scaling |= dict(mscale=mscale, mscale_all_dim=mscale)
    published = LATENT_AS_PUBLISHED | fields | {"model_type": kind, "rope_scaling": scaling}
    published["q_lora_rank"] = None if size == "v2-lite" else 1536
    assert FAMILIES["deepseek_v3"].from_hf(published) == FAMILIES["deepseek_v3"].config(size)
