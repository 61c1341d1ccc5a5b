"""Folders with a tokenizer.model alone: tokens are SentencePiece's and transformers', prompts those of LLaVA's code."""

import builtins
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
from examples import random_params
from PIL import Image
from transformers import LlamaTokenizer
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import mllm_jax
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.text.chat_template import ChatTemplate
from mllm_jax.data.text.tokenizer import Tokenizer
from mllm_jax.data.vision.resize import Square, rule_from_hf
from mllm_jax.families import FAMILIES, spec_for
from mllm_jax.families.towers import in_vlms
from mllm_jax.families.vlms import llava_llama
from mllm_jax.pretrained.api import Pretrained

TEXTS = [
    "A cat.",
    "",
    " lead",
    "two  spaces and\n\nlines\t",
    "Größe 12345 çé 你好 😀",
    "the USER: user's",
    "</s> <s>",
    "▁",
]
CORPUS = ["A chat between a curious user and an assistant. USER: What is it? ASSISTANT: A cat, the red one."] * 9 + [
    "The assistant gives helpful, detailed, and polite answers to the user's questions; Frame1: [INST] [/INST]"
] * 9


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny SentencePiece model of Llama's kind."""
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(path), model_type="bpe", vocab_size=400, byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, minloglevel=2,
    )  # fmt: skip
    return path.with_suffix(".model")


def write_folder(folder, model, added=(), **config):
    """Writes the tokenizer files of a published model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    names = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    listed = {str(400 + n): {"content": token, "special": True, "normalized": False} for n, token in enumerate(added)}
    config = names | {"add_bos_token": True, "added_tokens_decoder": listed} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def reference(model, prefix: bool = True):
    """SentencePiece's own tokenizer; `prefix`: it puts a space before every text."""
    from sentencepiece import sentencepiece_model_pb2 as protocol

    proto = protocol.ModelProto()
    proto.ParseFromString(model.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = prefix
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def test_texts_equal_sentencepiece(model, tmp_path):
    own, tokenizer = reference(model), Tokenizer.from_folder(write_folder(tmp_path, model))
    assert len(tokenizer) == own.get_piece_size() == 400
    for text in TEXTS:
        assert tokenizer.encode(text) == (own.encode(text) if text else []), text
        assert tokenizer.decode(tokenizer.encode(text)) == own.decode(own.encode(text)), text
        assert tokenizer.encode(text, begins=False) == reference(model, prefix=False).encode(text), text
    assert tokenizer.frame == ([1], []) and tokenizer.special_tokens()["bos_token"] == "<s>"


def test_markup_equals_transformers(model, tmp_path):
    """Text after a special token gets no leading space if the config sets that."""
    folder = write_folder(tmp_path, model, ["<|im_start|>", "<|im_end|>"], legacy=False)
    ours, theirs = Tokenizer.from_folder(folder), LlamaTokenizer.from_pretrained(folder)
    for text in ("A cat.</s>USER: What</s> is", "<s>A cat", "<|im_start|>user\nWhat?<|im_end|>\n", *TEXTS[:6]):
        assert ours.encode_markup(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    ours.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode_markup("A</s>USER: cat") == ours.encode_markup("A</s>USER: cat")


def by_chunks(model, prompt: str, legacy: bool) -> list[int]:
    """Ids as LLaVA's code makes them: text between images is tokenized separately, after one <s>."""
    begins, inner = reference(model), reference(model, prefix=legacy)
    found = []
    for number, chunk in enumerate(prompt.split("<image>")):
        found += [llava_llama.IMAGE] if number else [begins.bos_id()]
        for place, stretch in enumerate(chunk.split("</s>")):
            found += [begins.eos_id()] if place else []
            found += (inner if place else begins).encode(stretch)
    return found


@pytest.fixture(scope="module")
def config():
    """A tiny LLaVA 1.5 in its own config.json."""
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    tower = in_vlms.CLIP.from_hf(dict(image_size=8, patch_size=4, **small))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(llava_llama.TOWERS, "clip-tiny", tower)
        told = dict(model_type="llava_llama", vocab_size=400, rms_norm_eps=1e-6, rope_theta=1e4, **small)
        told |= dict(mm_vision_tower="openai/clip-tiny", mm_projector_type="mlp2x_gelu", image_aspect_ratio="pad")
        yield FAMILIES["llava_llama"].from_hf(told | dict(tie_word_embeddings=False))


def make_image(height=9, width=5):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


TURNS = [
    {"role": "user", "content": [{"type": "image", "image": make_image()}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Is it the red one?"},
    {"role": "assistant", "content": "the answers"},
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"
    "USER: Is it the red one? ASSISTANT: the answers</s>"
)


@pytest.mark.parametrize("legacy", [True, False])
def test_prompts_of_llava(model, config, legacy, tmp_path):
    processor = Processor.from_folder(write_folder(tmp_path, model, legacy=legacy), spec_for(config))
    example = processor(TURNS)
    expected = by_chunks(model, VICUNA, legacy)
    place = expected.index(llava_llama.IMAGE)
    assert example.tokens.tolist() == expected[:place] + [llava_llama.IMAGE] * 4 + expected[place + 1 :]
    inner, end = reference(model, prefix=False), reference(model).eos_id()
    learned = [*inner.encode(" A cat."), end, *inner.encode(" the answers"), end]
    assert example.tokens[example.weight > 0].tolist() == learned
    asked = processor(TURNS[:1], generate=True).tokens
    np.testing.assert_array_equal(example.tokens[: len(asked)], asked)
    assert processor.decode(example.tokens).count("ASSISTANT") == 2

    processor.save(tmp_path / "saved")
    again = Processor.from_folder(tmp_path / "saved", spec_for(config))
    assert again.spec == processor.spec
    np.testing.assert_array_equal(again(TURNS).tokens, example.tokens)


def test_published_ids_of_llava(shared, tmp_path):
    """Ids of a question to LLaVA 1.5, as users print them from its own code with Llama's vocabulary."""
    shutil.copy(shared / "data/tokenizers/phi3_mini/tokenizer.json", tmp_path)  # Llama's, with tokens after the last
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    content = [TURNS[0]["content"][0], {"type": "text", "text": "What's the content of the image?"}]
    processor = Processor.from_folder(tmp_path, spec_for(FAMILIES["llava_llama"].config("1.5-7b")))
    tokens = processor([{"role": "user", "content": content}], generate=True).tokens.tolist()
    expected = [319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892]
    expected += [13173, 29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889, 3148, 1001, 29901]
    expected += [29871, *[-200] * 576, 29871, 13, 5618, 29915, 29879, 278, 2793, 310, 278, 1967, 29973]
    assert tokens == [*expected, 319, 1799, 9047, 13566, 29901]


def test_other_prompts_of_llava():
    """Prompts as llava/conversation.py writes them."""
    messages = [{"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "What?"}]}]
    messages += [{"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}]
    expected = {
        "mistral_instruct": "[INST] <image>\nWhat? [/INST] A cat. </s>[INST] Sure? [/INST]",
        "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
        "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n",
    }
    for name, text in expected.items():
        template, end = llava_llama.CHATS[name]
        assert ChatTemplate(template).render(messages, generate=True, eos_token="</s>") == text
        assert end is None or end in text
    sizes = {"1.0-7b": "vicuna_v1", "next-mistral-7b": "mistral_instruct", "next-34b": "chatml_direct"}
    for size, name in sizes.items():
        assert spec_for(FAMILIES["llava_llama"].config(size)).template == llava_llama.CHATS[name][0]


def test_llava_reads_its_own_folder(model, config, tmp_path, monkeypatch):
    vlm = Pretrained(config, config.build(), random_params(config))
    monkeypatch.setitem(llava_llama.TOWERS, "clip-tiny", replace(config.encoder, features=()))
    mllm_jax.save_pretrained(vlm, tmp_path)
    vlm = mllm_jax.load_pretrained(write_folder(tmp_path, model))
    assert vlm.config == config and vlm.processor.spec.rule == Square(8, (122, 116, 104))
    assert len(mllm_jax.generate(vlm, [TURNS[:1], TURNS[:3]], max_new_tokens=3)) == 2


@pytest.mark.parametrize("size", [(480, 640), (333, 70), (50, 50), (1, 1)], ids=str)
def test_padded_images_equal_transformers(size):
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    rule, image = Square(56, (122, 116, 104)), make_image(*size)
    theirs = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_mean=mean, image_std=std
    )
    expected = (theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0) * std + mean) * 255
    assert np.abs(rule.read(image) - expected).max() <= 1
    assert rule_from_hf(theirs.to_dict()) == rule_from_hf(rule.to_hf() | {"image_mean": mean}) == rule


def test_prompts_of_internlm2(model, tmp_path):
    """OpenGVLab's folders: added tokens are in a separate file in older ones."""
    added = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    told = dict(
        ps_version="v2", dynamic_image_size=True, use_thumbnail=True, force_image_size=16, template="internvl2_5"
    )
    tower = dict(model_type="intern_vit_6b", norm_type="layer_norm", qk_normalization=False, qkv_bias=True)
    tower |= dict(image_size=16, patch_size=4, **small)
    text = dict(model_type="internlm2", vocab_size=405, num_key_value_heads=1, rms_norm_eps=1e-5, bias=False)
    told |= dict(vision_config=tower, llm_config=text | small | dict(rope_theta=1e6, hidden_act="silu"))
    spec = spec_for(FAMILIES["internvl_chat"].from_hf(told | dict(img_context_token_id=404)))
    folder = write_folder(tmp_path, model, added)
    example = Processor.from_folder(folder, spec)(TURNS[:2])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": {}}))
    (folder / "added_tokens.json").write_text(json.dumps({token: 400 + n for n, token in enumerate(added)}))
    np.testing.assert_array_equal(Processor.from_folder(folder, spec)(TURNS[:2]).tokens, example.tokens)
    own, tail = reference(model), example.tokens.tolist()
    tail = tail[-tail[::-1].index(403) :]  # what follows the last </img>
    expected = [*own.encode("\nWhat is it?"), 401, *own.encode("\n"), 400]
    assert tail[: len(expected)] == expected and example.tokens[0] == own.bos_id()


def test_files_that_are_not_read(model, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "damaged", model)
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="tokenizer.model: not a SentencePiece model"):
        Tokenizer.from_folder(folder)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), model_type="unigram", vocab_size=60,
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="only SentencePiece models of type BPE .*Save the tokenizer as tokenizer"):
        Tokenizer.from_folder(folder)
    with pytest.raises(ValueError, match="added token '<s>' cannot have the id 400"):
        Tokenizer.from_folder(write_folder(tmp_path / "ids", model, ["<s>"]))

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sentencepiece"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=r"tokenizer.model: needs SentencePiece. Run pip install -e '\.\[sentencepiece\]'"
    ):
        Tokenizer.from_folder(write_folder(tmp_path / "none", model))
