"""generation_config.json: which tokens end an answer, and how tokens are drawn, as transformers reads it."""

import json

import pytest
import tiny_chat
import transformers

from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.text.generation_config import GenerationDefaults


@pytest.fixture
def folder(tmp_path):
    return tiny_chat.write_tokenizer(tmp_path / "model")


def write(folder, **content):
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("ends, expected", [(7, {7}), ([7, 9], {7, 9}), (None, set()), ([], set())])
def test_end_tokens_are_those_of_the_file_and_of_the_tokenizer(folder, ends, expected):
    own = Processor.from_folder(folder).stop_ids
    processor = Processor.from_folder(write(folder, eos_token_id=ends))
    assert processor.stop_ids == tuple(sorted({*own, *expected}))


def test_saving_writes_it_back(folder, tmp_path):
    write(folder, eos_token_id=[7, 9], pad_token_id=3, do_sample=True, top_k=20, max_new_tokens=5, bos_token_id=None)
    processor = Processor.from_folder(folder)
    for _ in range(2):
        processor.with_spec(fps=1.0).save(tmp_path / "saved")
        processor = Processor.from_folder(tmp_path / "saved")
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "saved")
    assert saved.eos_token_id == list(processor.stop_ids) and {7, 9} < set(saved.eos_token_id)
    assert (saved.pad_token_id, saved.do_sample, saved.top_k, saved.max_new_tokens) == (3, True, 20, 5)
    assert processor.generation.sampling == {"temperature": 1.0, "top_k": 20, "top_p": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        {"do_sample": True, "temperature": None},
        {"do_sample": False, "temperature": 0.7},
        {"do_sample": None, "top_k": 5},
        {},
    ],
)
def test_sampling_is_transformers(folder, content):
    defaults = GenerationDefaults.from_folder(write(folder, **content))
    theirs = transformers.GenerationConfig.from_dict(content)
    theirs.update(**theirs._get_default_generation_params(), defaults_only=True)
    drawn = {name: getattr(theirs, name) for name in ("temperature", "top_k", "top_p")} if theirs.do_sample else {}
    assert defaults.sampling == drawn
    assert ("repetition_penalty" in defaults.unsupported) == (theirs.repetition_penalty != 1)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"eos_token_id": "</s>"}, r"eos_token_id=\['</s>'\]"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"do_sample": True, "temperature": "hot"}, "temperature='hot'"),
        ({"do_sample": True, "top_p": -1}, "top_p=-1"),
    ],
)
def test_what_cannot_be_is_named(folder, content, message):
    with pytest.raises(ValueError, match=f"generation_config.json: {message}"):
        Processor.from_folder(write(folder, **content))
