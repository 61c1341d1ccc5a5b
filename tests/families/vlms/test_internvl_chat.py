"""InternVL in OpenGVLab's own files: the same models as transformers' under other names, other decoders too."""

import json

import jax
import numpy as np
import pytest
import safetensors.torch
import tiny_chat
import torch
import transformers
from PIL import Image
from reference import as_internlm2, assert_parity, to_torch
from tiny_llava import INTERN, TEXT, inputs_of, random_model

import mllm_jax
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.text.chat_template import ChatTemplate
from mllm_jax.data.vision.tiles import Tiles
from mllm_jax.families import FAMILIES, spec_for
from mllm_jax.families.vlms import internvl_chat
from mllm_jax.model.vlm import abstract_params, count_params
from mllm_jax.pretrained.api import published_config
from mllm_jax.weights.table import expand

SMALL = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, patch_size=4)
ROPE = dict(rope_theta=1e6, rope_scaling=dict(type="dynamic", factor=2.0))
LLM = TEXT | dict(tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=1e4)
CASES = {  # transformers' text config of a model, what OpenGVLab's file says of its decoder, and of its tower
    "internlm2": (
        dict(model_type="llama", rope_parameters=dict(rope_type="dynamic", rope_theta=1e6, factor=2.0)),
        dict(model_type="internlm2", bias=False, hidden_act="silu", **ROPE),
        dict(qkv_bias=False, qk_normalization=True, norm_type="rms_norm"),
    ),
    "qwen2": (dict(model_type="qwen2"), dict(model_type="qwen2"), dict(qkv_bias=True)),
    "phi3": (
        dict(model_type="phi3", pad_token_id=0, sliding_window=None),
        dict(model_type="phi3", sliding_window=None, rms_norm_eps=1e-5),
        dict(qkv_bias=True),
    ),
}
PLAIN = dict(qk_normalization=False, norm_type="layer_norm")


def theirs_of(name):
    """Transformers' config."""
    fields, _, tower = CASES[name]
    tower = PLAIN | tower
    vision = dict(INTERN, attention_bias=tower["qkv_bias"], use_qk_norm=tower["qk_normalization"])
    return transformers.InternVLConfig(
        vision_config=dict(vision, norm_type=tower["norm_type"]),
        text_config=dict(TEXT, **fields),
        image_token_id=150,
        tie_word_embeddings=False,
    )


def as_published(model, decoder: str) -> dict[str, torch.Tensor]:
    """Tensors of a transformers InternVL under OpenGVLab's names, with `qkv` as their code splits it."""
    tensors, found, text = {k: v.contiguous() for k, v in model.state_dict().items()}, {}, {}
    tower = {
        "attention.projection_layer": "attn.proj",
        "attention.q_norm": "attn.q_norm",
        "attention.k_norm": "attn.k_norm",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "lambda_1": "ls1",
        "lambda_2": "ls2",
        "encoder.layer.": "encoder.layers.",
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    }
    connector = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}
    for name, tensor in tensors.items():
        if name.startswith("model.language_model."):
            text[name.replace("model.language_model.", "model.")] = tensor
        elif name.startswith("lm_head."):
            text[name] = tensor
        elif name.startswith("model.multi_modal_projector."):
            _, _, part, kind = name.split(".")
            found[f"{connector[part]}.{kind}"] = tensor
        elif "q_proj" in name:
            qkv = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            new = name.replace("attention.q_proj", "attn.qkv").replace("encoder.layer.", "encoder.layers.")
            found[new.replace("model.vision_tower.", "vision_model.")] = torch.cat(qkv)
        elif "k_proj" not in name and "v_proj" not in name:
            for old, new in tower.items():
                name = name.replace(old, new)
            found[name.replace("model.vision_tower.", "vision_model.")] = tensor
    if decoder == "internlm2":
        text = as_internlm2(text, model.config.text_config)
    return found | {f"language_model.{name}": tensor for name, tensor in text.items()}


def config_json(name, **changes):
    _, llm, tower = CASES[name]
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 16,
        "img_context_token_id": 150,
        "llm_config": {"architectures": [internvl_chat.ARCHITECTURES[name]], **LLM, **llm},
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "vision_config": {"model_type": "intern_vit_6b", "image_size": 16, **PLAIN, **SMALL, **tower},
    } | changes


def write(folder, name, model):
    folder.mkdir()
    safetensors.torch.save_file(as_published(model, name), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(name)))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_files(name, tmp_path, record_property):
    """Files contain the parameters of transformers' model and are written back unchanged."""
    model = random_model(theirs_of(name))
    model.save_pretrained(tmp_path / "transformers")
    ours = mllm_jax.load_pretrained(write(tmp_path / "own", name, model))
    other = mllm_jax.load_pretrained(tmp_path / "transformers")
    assert (ours.config.encoder, ours.config.decoder) == (other.config.encoder, other.config.decoder)
    assert ours.config.decoder.family == name
    jax.tree.map(np.testing.assert_array_equal, ours.params, other.params)

    mllm_jax.save_pretrained(ours, tmp_path / "again")
    tensors, again = as_published(model, name), safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
    said = json.loads((tmp_path / "again" / "config.json").read_text())
    assert said["llm_config"]["architectures"] == [internvl_chat.ARCHITECTURES[name]]
    assert mllm_jax.load_pretrained(tmp_path / "again").config == ours.config
    if name == "internlm2":
        inputs = inputs_of(model)
        with torch.no_grad():
            expected = model(**to_torch(inputs)).logits.numpy()
        out = jax.jit(ours.model.apply)({"params": ours.params}, mllm_jax.from_hf_inputs(ours.config, inputs))
        real = inputs["attention_mask"] == 1
        assert_parity(record_property, "internvl_chat", np.asarray(out.logits)[real], expected[real])


@pytest.mark.parametrize("top, llm", [(True, False), (False, True), (None, True), (True, None)])
def test_the_decoder_says_whether_its_head_is_tied(top, llm, tmp_path):
    """Their config class takes the decoder's flag and ignores the top level."""
    told = config_json("qwen2") | ({} if top is None else {"tie_word_embeddings": top})
    told["llm_config"] |= {"tie_word_embeddings": llm}
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert published_config(tmp_path).decoder.tie_embeddings == bool(llm)


# Millions, as the cards of the published models say them.
CARDS = {
    "1.5-26b": 25514,
    "2-1b": 938,
    "2-2b": 2206,
    "2-8b": 8075,
    "2-26b": 25514,
    "2.5-1b": 938,
    "2.5-2b": 2206,
    "2.5-4b": 3713,
    "2.5-8b": 8075,
    "2.5-26b": 25514,
    "2.5-38b": 38388,
    "2.5-78b": 78408,
}


ROUNDED = {"2-40b": "40.1 B", "2-76b": "76.3 B"}


def test_published_sizes():
    for name, config in internvl_chat.SIZES.items():
        total = sum(count_params(config).values())
        assert round(total / 1e6) == CARDS.get(name, round(total / 1e6)), name
        assert f"{total / 1e9:.1f} B" == ROUNDED.get(name, f"{total / 1e9:.1f} B"), name
        assert FAMILIES["internvl_chat"].from_hf(FAMILIES["internvl_chat"].to_hf(config)) == config
        names = expand(FAMILIES["internvl_chat"].weights(config), abstract_params(config))
        assert config.inputs.chat in internvl_chat.CHATS
        head = "output" if config.decoder.family == "internlm2" else "lm_head"
        assert {f"language_model.{head}.weight", "mlp1.3.bias", "vision_model.encoder.layers.0.ls1"} <= names.keys()
    assert FAMILIES["internvl_chat"].config("2-8b").tokens.image == 92546  # <IMG_CONTEXT>
    assert FAMILIES["internvl_chat"].config("2.5-4b").tokens.image == 151667
    assert FAMILIES["internvl_chat"].config("2-40b").tokens.image == 64000


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(ps_version="v1"), 'ps_version="v1": must be "v2"'),
        (dict(dynamic_image_size=False), "dynamic_image_size=false: must be true"),
        (dict(force_image_size=32), "force_image_size=32: must be the tower's 16"),
        (dict(use_llm_lora=16), "use_llm_lora=16: must be 0"),
        (dict(downsample_ratio=0.3), "downsample_ratio=0.3: must be 1, 1/2"),
        (
            dict(llm_config=dict(LLM, model_type="internlm3")),
            "'internlm3': not .*Did you mean 'internlm2'",
        ),
    ],
    ids=str,
)
def test_what_config_json_may_not_say(change, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES["internvl_chat"].from_hf(config_json("qwen2", **change))


# What the conversations of OpenGVLab's code come to, for one question with an image and its answer.
PROMPTS = {
    "Hermes-2": "<|im_start|>system\n{first}<|im_end|><|im_start|>user\n{image}\nWhat?<|im_end|>"
    "<|im_start|>assistant\nA cat.<|im_end|>",
    "internlm2-chat": "<s><|im_start|>system\n{first}<|im_end|><|im_start|>user\n{image}\nWhat?<|im_end|>"
    "<|im_start|>assistant\nA cat.<|im_end|>",
    "phi3-chat": "<|system|>\n{first}<|end|><|user|>\n{image}\nWhat?<|end|><|assistant|>\nA cat.<|end|>",
    "internvl2_5": "<s><|im_start|>system\n{second}<|im_end|>\n<|im_start|>user\n{image}\nWhat?<|im_end|>\n"
    "<|im_start|>assistant\nA cat.<|im_end|>\n",
}


@pytest.mark.parametrize("chat", PROMPTS)
def test_prompts(chat):
    template, end = internvl_chat.CHATS[chat]
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    systems = {"first": internvl_chat._SYSTEM_1_5, "second": internvl_chat._SYSTEM_2_5, "image": "<IMG_CONTEXT>"}
    expected = PROMPTS[chat].format(**systems)
    assert ChatTemplate(template).render(messages, bos_token="<s>") == expected and end in expected
    asked = ChatTemplate(template).render(messages[:1], generate=True, bos_token="<s>")
    assert asked + "A cat." == expected[: len(asked) + 6]
    told = ChatTemplate(template).render([{"role": "system", "content": "Be brief."}, *messages])
    assert "Be brief." in told and systems["first"] not in told


def test_a_folder_becomes_a_processor(tmp_path):
    """Tiles come from config.json rather than preprocessor_config.json; the chat template comes from its name there."""
    tiny_chat.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    named = {"<|image_pad|>": "<IMG_CONTEXT>", "<|vision_start|>": "<img>", "<|vision_end|>": "</img>"}
    text = (tmp_path / "tokenizer_config.json").read_text()
    for ours, own in named.items():
        text = text.replace(ours, own)
    told = json.loads(text) | {"chat_template": "{{ messages[0].content }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    clip = dict(crop_size=16, do_center_crop=True, do_resize=True, size=16, image_mean=[0.485, 0.456, 0.406])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip))
    config = FAMILIES["internvl_chat"].from_hf(config_json("qwen2"))
    processor = Processor.from_folder(tmp_path, spec_for(config))
    assert processor.spec.rule == Tiles(16, 1, 6)
    question = [{"type": "image", "image": Image.new("RGB", (64, 32))}, {"type": "text", "text": "What?"}]
    example = processor([{"role": "user", "content": question}], generate=True)
    grids = [image.grid for image in example.images]
    assert grids == [(4, 4)] * 3 and example.visual.sum() == 3 * 4  # two tiles and the whole image
    begin, end = np.flatnonzero(example.visual)[[0, -1]]
    around = [processor.tokenizer.id(token) for token in ("<img>", "</img>")]
    assert [example.tokens[begin - 1], example.tokens[end + 1]] == around

    processor.save(tmp_path / "saved")
    assert Processor.from_folder(tmp_path / "saved", spec_for(config)).spec == processor.spec
