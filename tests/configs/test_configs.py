"""Every run in configs/ can be read, and fits its model, its processor and its budget."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from tiny_run import CONFIGS, load_config

from mllm_jax.common.config import ConfigError, dump, load
from mllm_jax.data.pipeline.packing import place
from mllm_jax.model.vlm import ModelConfig, count_params
from mllm_jax.train.input.processors import chat_processor
from mllm_jax.train.loop import Training
from mllm_jax.train.monitor.metrics import read_metrics
from mllm_jax.train.monitor.processes import StopSignal
from mllm_jax.train.runs.config import read_run

ARGUMENTS = {
    "compose": ("siglip,mlp,llama", "dinov2,pixel_shuffle,gemma2,prefix", "qwen2_5_vl,patch_merger,qwen3_vl"),
    "scenes": ("", "blind", "experts"),
    "qwen3_vl_sft": ("", "115m", "2b", "4b", "8b", "32b"),
}
RUNS = [
    (path.stem, arg)
    for path in sorted(CONFIGS.glob("*.py"))
    if path.stem != "certify"
    for arg in ARGUMENTS.get(path.stem, ("",))
]


@pytest.mark.parametrize(("name", "argument"), RUNS)
def test_a_config_is_read_and_survives_json(name, argument):
    config = load_config(name, argument)
    if name == "rlhf":
        config.algorithm.reward_model = "runs/reward"
    run = read_run(config)
    assert read_run(load(dump(config))) == run
    if isinstance(run.model, ModelConfig):
        assert run.data.patches_per_row % run.model.connector.patches_per_token == 0
    assert run.data.batch % run.train.grad_accum_steps == 0


def test_the_small_model_has_seventy_million_parameters_beside_its_vocabulary():
    run = read_run(load_config("qwen3_vl_sft", "115m"))
    vocabulary = run.model.decoder.vocab * run.model.decoder.width
    assert round((sum(count_params(run.model).values()) - vocabulary) / 1e6) in range(30, 60)


def test_scenes_fit_their_budget():
    run = read_run(load_config("scenes"))
    processor = chat_processor(run.processor, run.model, run.data)
    source = run.data.source("heldout")
    for index in range(200):
        record = source[index]
        example = processor(record["messages"])
        assert len(example.tokens) <= run.data.tokens
        assert place([len(image.patches) for image in example.images], run.data.budget) is not None


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="no size '3b'"):
        load_config("qwen3_vl_sft", "3b")


def test_a_processor_of_another_model_is_refused():
    run = read_run(load_config("qwen3_vl_sft"))
    with pytest.raises(ConfigError, match="the id of image tokens is"):
        chat_processor("scenes", run.model, run.data)
    with pytest.raises(ConfigError, match="config.processor is empty. Set it to a folder"):
        chat_processor("", run.model, run.data)


@pytest.mark.slow
def test_fine_tuning_on_real_images(shared, tmp_path):
    """The path of somebody's own data: JSON Lines, real photos, Qwen's tokenizer; a smaller model, smaller images."""
    config = load_config("qwen3_vl_sft", "115m")
    config.processor = str(qwen_processor(shared, tmp_path / "processor"))
    config.data.path = str(shared / "data" / "conversations.jsonl")
    tasks = ("presence", "counting", "vqa", "caption")
    config.data.update(where={"split": "train", "task": tasks}, heldout_where={"split": "test", "task": tasks})
    config.data.update(tokens=192, patch_rows=1, patches_per_row=288, min_pixels=1024, max_pixels=128 * 128)
    config.model.encoder.update(width=32, layers=2, heads=2, mlp=32, deepstack_layers=(0,))
    config.model.decoder.update(width=16, layers=2, mlp=32)
    config.model.decoder.attention.update(heads=2, kv_heads=1, head_dim=16, rope_sections=(4, 2, 2))
    config.model.runtime.dtype = "float32"
    config.optim.update(steps=8, warmup=1, learning_rate=1e-2)
    config.train.update(log_every=2, evaluate_every=0, num_eval_examples=16, loss_chunk=32)
    training = Training(config, read_run(config), tmp_path / "run")
    training.run(StopSignal())
    training.close()
    lines = read_metrics(tmp_path / "run")
    losses = [line["loss"] for line in lines if "heldout" not in line]
    assert np.mean(losses[-4:]) < losses[0] - 1
    assert training.train_step._cache_size() == 1
    assert all("dropped" not in line and "skipped" not in line for line in lines)
    assert {"all", "presence"} <= set(lines[-1]["heldout"]["exact_match"])


def qwen_processor(shared: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The published tokenizer and template under the names that they have beside published weights."""
    folder.mkdir()
    source = shared / "data" / "tokenizers" / "qwen2"
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, folder / name)
    config = json.loads((source / "qwen3_tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(source / "qwen3vl_instruct_chat_template.jinja", folder / "chat_template.jinja")
    return folder
