"""Files and strings to embeddings and labels: equal to transformers', and the code of docs/dual_encoders.md runs."""

import json
import re
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from paths import ROOT
from PIL import Image
from tiny_dual_encoders import tiny
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors

import mllm_jax
from mllm_jax.data.text.tokenizer import Tokenizer
from mllm_jax.pretrained import embeddings

TEXTS = ["A photo of a cat.", "two dogs!", "red  square"]
SIZES = [(20, 30), (16, 16), (50, 9)]


def clip_tokenizer():
    letters = list("abcdefghijklmnopqrstuvwxyz.!")
    vocabulary = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={token: i + 10 for i, token in enumerate(vocabulary)}, merges=[])


def gemma_tokenizer():
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    letters = list("▁abcdefghijklmnopqrstuvwxyz.!")
    tokenizer = transformers.Siglip2Tokenizer(vocab={token: i for i, token in enumerate(special + letters)}, merges=[])
    template = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def images(sizes=SIZES):
    rng = np.random.default_rng(2)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def write_folder(kind, folder):
    """A random model with a small tokenizer; returns transformers' model, its tokenizer and its image processor."""
    if kind == "clip":
        tokenizer, ends = clip_tokenizer(), dict(eos_token_id=67)
        reader = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_mean=[0.4, 0.5, 0.6]
        )
    else:
        tokenizer, ends = gemma_tokenizer(), {}
        reader = transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=20)
    model = tiny(kind, max_position_embeddings=32, **ends)
    for part in (model, tokenizer, reader):
        part.save_pretrained(folder)
    return model, tokenizer, reader


@pytest.fixture(scope="module", params=["clip", "siglip2"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    theirs = write_folder(request.param, folder)
    return mllm_jax.load_pretrained(folder), *theirs, folder


def reference(model, tokenizer, reader, texts):
    """Their logits, padded as the models were trained."""
    own = dict(padding="max_length", max_length=32, return_tensors="pt")
    words = tokenizer(texts, **own)
    if model.config.model_type != "clip":
        words.pop("attention_mask")
    with torch.no_grad():
        return model(**words, **reader(images(), return_tensors="pt"))


def test_the_whole_way(pair, tmp_path):
    ours, model, tokenizer, reader, _ = pair
    if model.config.model_type != "clip":
        tokenizer.padding_side = "right"
    expected = reference(model, tokenizer, reader, TEXTS)
    np.testing.assert_allclose(mllm_jax.encode_text(ours, TEXTS), expected.text_embeds, atol=1e-4)
    np.testing.assert_allclose(mllm_jax.encode_image(ours, images()), expected.image_embeds, atol=1e-4)
    logits = expected.logits_per_image
    chances = logits.softmax(-1) if model.config.model_type == "clip" else logits.sigmoid()
    np.testing.assert_allclose(mllm_jax.classify(ours, images(), TEXTS, "{}"), chances, atol=1e-4)
    mllm_jax.save_pretrained(ours, tmp_path)
    again = mllm_jax.load_pretrained(tmp_path)
    assert again.processor.rule == ours.processor.rule and again.processor.mean == ours.processor.mean
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    read_back = type(reader)(**{key: value for key, value in written.items() if key != "image_processor_type"})
    for image, theirs in zip(images(), reader(images())["pixel_values"]):
        np.testing.assert_array_equal(read_back(image)["pixel_values"][0], theirs)


def test_batches_of_one_size(pair, monkeypatch):
    ours = pair[0]
    expected = mllm_jax.encode_image(ours, images())
    monkeypatch.setattr(embeddings, "BATCH", 2)
    np.testing.assert_allclose(mllm_jax.encode_image(ours, images()), expected, atol=1e-5)


def test_several_prompts_are_averaged(pair):
    ours = pair[0]
    prompts = ["a {}.", "the {}!"]
    both = mllm_jax.encode_text(ours, ["a cat.", "the cat!", "a dog.", "the dog!"])
    mean = sum(both[:2]) / np.linalg.norm(sum(both[:2]))
    scale, bias = ours.model.apply({"params": ours.params}, method="temperature")
    logit = scale * (mllm_jax.encode_image(ours, images()) @ mean) + bias
    chances = mllm_jax.classify(ours, images(), ["cat", "dog"], prompts)
    assert chances.shape == (3, 2)
    if ours.config.loss == "sigmoid":
        np.testing.assert_allclose(chances[:, 0], 1 / (1 + np.exp(-logit)), atol=1e-5)
    else:
        np.testing.assert_allclose(chances.sum(axis=1), 1, atol=1e-5)


def test_refusals(pair):
    ours = pair[0]
    with pytest.raises(ValueError, match="a text has 4. tokens, the model reads 32; shorten 'aaaa"):
        mllm_jax.encode_text(ours, ["a" * 40])
    with pytest.raises(ValueError, match="prompts: 'a photo' has no {}. Write {} in place"):
        mllm_jax.classify(ours, images(), ["cat"], "a photo")
    with pytest.raises(ValueError, match="is not a list of items"):
        mllm_jax.encode_text(ours, "a cat")
    with pytest.raises(ValueError, match="is not a list of items"):
        mllm_jax.encode_image(ours, [])
    with pytest.raises(FileNotFoundError):
        mllm_jax.encode_image(ours, ["no such image.png"])


def test_odd_images(pair):
    """Images of one pixel, in gray, in CMYK, with transparency, and one too long to enlarge in memory."""
    ours = pair[0]
    gray = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30))
    odd = [Image.new("RGB", (1, 1), "red"), gray, Image.new("CMYK", (20, 30)), Image.new("RGBA", (9, 50))]
    found = mllm_jax.encode_image(ours, odd)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1], mllm_jax.encode_image(ours, [gray.convert("RGB")])[0], atol=1e-5)
    long = Image.new("RGB", (20000, 3))
    if ours.config.family == "siglip2":
        assert np.isfinite(mllm_jax.encode_image(ours, [long])).all()
    else:
        with pytest.raises(ValueError, match="an image of 20000x3 has an aspect ratio over 200"):
            mllm_jax.encode_image(ours, [long])


def test_other_models_are_refused():
    from mllm_jax.families import FAMILIES

    model = mllm_jax.Pretrained(FAMILIES["qwen3"].config("0.6b"), None, None)
    with pytest.raises(ValueError, match="family=qwen3.*: is no dual encoder. Load a model such as CLIP or SigLIP"):
        mllm_jax.encode_text(model, ["a cat"])


def test_the_first_siglip_reads_no_punctuation(pair):
    words = models.WordLevel({"a": 0, "cat": 1, "[UNK]": 2, "</s>": 3}, unk_token="[UNK]")
    raw = RawTokenizer(words)
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    config = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "eos_token": "</s>"}
    processor = replace(pair[0].processor, tokenizer=Tokenizer(raw, config), length=6, reads_padding=True)
    batch = processor.texts(["A (cat)!", "dog"])
    assert batch.tokens.tolist() == [[0, 1, 3, 3, 3, 3], [2, 3, 3, 3, 3, 3]] and batch.segment.all()


def test_real_tokens(shared, pair):
    """CLIP's own vocabulary: tokens of texts in many scripts are OpenAI's."""
    folder = shared / "data/tokenizers/clip"
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.config.setdefault("eos_token", "<|endoftext|>")
    processor = replace(pair[0].processor, tokenizer=tokenizer, length=77, reads_padding=False)
    cases = json.loads((shared / "data/tokenizers/cases.json").read_text())["clip"]
    cases = [case for case in cases if unicodedata.is_normalized("NFC", case["text"])]  # which OpenAI leaves to ftfy
    assert len(cases) > 10
    for case in cases:
        batch = processor.texts([case["text"]])
        assert batch.tokens[0][batch.segment[0] == 1].tolist() == case["ids"], case["text"]


def test_the_code_of_the_page(pair, monkeypatch, tmp_path, capsys):
    page = (ROOT / "docs" / "dual_encoders.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    images()[0].save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    scope = {"mllm_jax": mllm_jax}
    exec(code.replace("openai/clip-vit-base-patch32", str(pair[-1])), scope)
    label, cosines = capsys.readouterr().out.split("\n", 1)
    assert label in scope["labels"] and cosines.count("[") == 2
    assert scope["images"].shape[0] == 1 and scope["texts"].shape[0] == 2
    assert len(code.splitlines()) <= 10
