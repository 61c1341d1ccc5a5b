"""configs/sft.py:FOLDER fine-tunes the model in a folder, and python -m mllm_jax.export writes what was trained."""

import json

import jax
import numpy as np
import peft
import pytest
import tiny_chat
from sft_files import conversations, tokenizer
from tiny_models import MODELS, class_of, tiny
from tiny_run import load_config

import mllm_jax
from mllm_jax.common.config import ConfigError
from mllm_jax.export import main as export
from mllm_jax.nn.runtime import Runtime
from mllm_jax.pretrained.api import published_config
from mllm_jax.train.checkpoint.restore import first_params
from mllm_jax.train.loop import Training
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.monitor.processes import StopSignal
from mllm_jax.train.runs.config import read_run


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder that transformers wrote, with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("published")
    ids = tokenizer(folder, {})
    text = MODELS["qwen3_vl"][2]["text_config"] | {"vocab_size": 300, "max_position_embeddings": 512}
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    named = {f"{name}_token_id": ids[f"<|{token}|>"] for name, token in tokens.items()}
    tiny("qwen3_vl", text_config=text, **named).save_pretrained(folder)
    return folder


def small(config, data):
    """Steps that take milliseconds, in fp32."""
    config.model.runtime.update(dtype="float32", remat="none")
    config.data.path, config.data.root = str(conversations(data)), str(data)
    config.data.update(batch=8, tokens=192, patch_rows=1, patches_per_row=260, max_pixels=32 * 32, workers=0)
    config.optim.update(steps=2, warmup=1, learning_rate=3e-2)
    config.train.update(log_every=1, evaluate_every=0, save_every=0, loss_chunk=32)
    return config


@pytest.fixture(scope="module")
def trained(published, tmp_path_factory):
    """A run with adapters on the folder's weights."""
    folder = tmp_path_factory.mktemp("trained")
    config = small(load_config("sft", str(published)), folder)
    config.lora.rank = 2
    training = Training(config, read_run(config), folder / "run")
    training.run(StopSignal())
    training.close()
    return folder / "run"


def test_the_model_of_a_folder_is_trained(published, trained):
    config = load_config("sft", str(published))
    assert config.init == config.processor == str(published)
    assert config.model.runtime.dtype == "bfloat16" and config.data.patch_rows == 2
    losses = [line["loss"] for line in read_metrics(trained) if "loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0]
    ours, theirs = mllm_jax.load_workdir(trained), mllm_jax.load_pretrained(published)
    base = jax.tree.map(np.array_equal, theirs.params, {part: _base(x) for part, x in ours.params.items()})
    assert all(jax.tree.leaves(base))
    assert ours.processor.tokenizer.encode("on the") == theirs.processor.tokenizer.encode("on the")


def _base(tree):
    """The weights of a part without the adapters beside them."""
    return {name: _base(x) if isinstance(x, dict) else x for name, x in tree.items() if not name.startswith("lora")}


def test_the_model_of_a_run_is_trained_on(trained):
    config = load_config("sft", str(trained))
    assert config.init == str(trained) and "lora" not in config.model and config.lora.rank == 0
    assert read_run(config).model.decoder == mllm_jax.load_workdir(trained).config.decoder


@pytest.mark.parametrize("kind", [kind for kind, model in MODELS.items() if model[1] != "Model"])
def test_the_architecture_of_every_family_is_read(kind, tmp_path):
    import transformers

    first, _, fields = MODELS[kind]
    getattr(transformers, f"{first}Config")(**fields).save_pretrained(tmp_path)
    run = read_run(load_config("sft", f"{tmp_path},charts,texts"))
    found = published_config(tmp_path)
    assert (run.model.encoder, run.model.connector, run.model.decoder, run.model.inputs) == (
        found.encoder,
        found.connector,
        found.decoder,
        found.inputs,
    )
    assert bool(run.data.budget.patch_rows) == (found.encoder is not None) and set(run.data.sources) == {
        "charts",
        "texts",
    }


def test_a_model_of_texts_is_trained(tmp_path):
    tiny_chat.write_tokenizer(tmp_path)
    tiny("llama", vocab_size=300).save_pretrained(tmp_path)
    run = read_run(load_config("sft", str(tmp_path)))
    assert run.data.budget.patch_rows == 0 and run.model.encoder is None
    mesh = mllm_jax.make_mesh({}, devices=jax.devices()[:1])
    params = first_params(run, mesh)
    theirs = mllm_jax.load_pretrained(tmp_path, runtime=Runtime()).params
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, params, theirs)))


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "there is no folder"),
        ({}, "it is not a model in Hugging Face's format"),
        ({"config.json": "{"}, "not readable JSON"),
        ({"config.json": json.dumps({"model_type": "bert"})}, "model_type"),
        ({"config.json": json.dumps({"model_type": "clip_vision_model"})}, "does not answer questions"),
    ],
    ids=["absent", "empty", "broken", "unknown", "tower"],
)
def test_a_folder_without_a_model_is_one_error(content, said, tmp_path):
    folder = tmp_path / "model"
    if content is not None:
        folder.mkdir()
    for name, text in (content or {}).items():
        (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=f"^configs/sft.py:{folder}: ") as raised:
        load_config("sft", str(folder))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_is_no_published_model(trained):
    for read in (mllm_jax.load_pretrained, published_config):
        with pytest.raises(
            ValueError, match=f"{trained} is the folder of a training run.*load_workdir.*mllm_jax.export"
        ):
            read(trained)


def test_a_run_with_adapters_is_exported_merged(trained, tmp_path, capsys):
    folder = tmp_path / "merged"
    assert export(["--checkpoint", str(trained), str(folder)]) == 0
    told = capsys.readouterr()
    assert f"reading {trained}" in told.err and f"wrote {folder}" in told.out
    vlm = mllm_jax.load_pretrained(folder)
    expected = mllm_jax.merge_adapters(mllm_jax.load_workdir(trained)).params
    jax.tree.map(np.testing.assert_array_equal, vlm.params, expected)
    assert vlm.processor is not None
    assert export(["--checkpoint", str(trained), "--dtype", "bfloat16", "--step", "2", str(folder)]) == 0  # replaced
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    halves = mllm_jax.load_pretrained(folder, "bfloat16").params
    jax.tree.map(np.testing.assert_array_equal, halves, jax.tree.map(lambda x: x.astype("bfloat16"), expected))


def test_adapters_are_exported_alone_and_merged_into_a_model(published, trained, tmp_path):
    adapter, whole = tmp_path / "adapter", tmp_path / "whole"
    assert export(["--checkpoint", str(trained), "--adapters_only", str(adapter)]) == 0
    written = peft.PeftConfig.from_pretrained(adapter)
    assert written.base_model_name_or_path == str(published) and written.r == 2
    assert export(["--checkpoint", str(published), "--adapters", str(adapter), str(whole)]) == 0
    model = class_of("qwen3_vl").from_pretrained(published, attn_implementation="eager").eval()
    theirs = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    ours = class_of("qwen3_vl").from_pretrained(whole)
    changed = 0
    before = class_of("qwen3_vl").from_pretrained(published).state_dict()
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[name], tensor, atol=1e-6, rtol=0)
        changed += not np.array_equal(before[name], tensor)
    assert changed >= 7 * 2


def test_what_cannot_be_exported_is_one_line(published, trained, tmp_path, capsys):
    full, new = tmp_path / "full", tmp_path / "new"
    full.mkdir()
    (full / "config.json").write_text('{"theme": "dark"}')
    run, model, adapters = str(trained), str(published), ["--adapters", str(tmp_path)]
    cases = {
        "is not empty and has no config.json": ["--checkpoint", run, str(full)],
        "is not empty and has no adapter_config.json": ["--checkpoint", run, "--adapters_only", str(full)],
        "is the folder of a training run": ["--checkpoint", model, run],
        "is read from": ["--checkpoint", model, model],
        "has no adapter_config.json": ["--checkpoint", model, *adapters, str(new)],
        "already has adapters": ["--checkpoint", run, *adapters, str(new)],
        "--adapters_only writes what a run trained": ["--checkpoint", model, "--adapters_only", str(new)],
        "--step=3: ": ["--checkpoint", model, "--step=3", str(new)],
        "has no checkpoint 77": ["--checkpoint", run, "--step=77", str(new)],
        "there is no folder": ["--checkpoint", str(tmp_path / "absent"), str(new)],
    }
    for said, words in cases.items():
        assert export(words) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and said in last, words
    assert [path.name for path in full.iterdir()] == ["config.json"] and not new.exists()
